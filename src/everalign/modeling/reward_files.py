"""A reward model's folder: a plain Hugging Face classifier, its tokenizer, and what its rewards mean."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from everalign.data.templating import template_fingerprint
from everalign.errors import InputError
from everalign.files import new_folder, read_json, write_json
from everalign.modeling.loading import Precision, load_tokenizer
from everalign.modeling.reward_model import RewardModel, load_classifier
from everalign.modeling.runtime import training_device

FACTS_FILE = "everalign_reward.json"


class RewardFacts(BaseModel):
    """What is known of a reward model, as `everalign_reward.json` holds it.

    Args:
        format: of the file.
        mean: mean of the classifier's rewards of all training answers, which scoring subtracts.
        scale: their standard deviation; scoring does not divide by it.
        max_length: longest prompt plus answer, in tokens; longer ones are cut as in training.
        template: fingerprint of the tokenizer and its chat template.
        base_model: what it was trained from, as the user named it.
        base_fingerprint: of the weights that it was trained from, without the head.
        data: fingerprint of the training pairs.
        pairs: number of training pairs.
        accuracy: share of held-out pairs that it ranks as wished; None without held-out pairs.
        settings: how it was trained.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal[1] = 1
    mean: FiniteFloat
    scale: Annotated[FiniteFloat, Field(ge=0)]
    max_length: Annotated[int, Field(ge=1)]
    template: str
    base_model: str
    base_fingerprint: str
    data: str
    pairs: Annotated[int, Field(ge=1)]
    accuracy: Annotated[FiniteFloat, Field(ge=0, le=1)] | None
    settings: dict[str, Any]


def check_free(folder: Path) -> None:
    """Refuse an output folder that exists and is not empty; what is there is never overwritten."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty: choose another output folder")


def save_reward_model(folder: Path, model: RewardModel, tokenizer: Any, facts: RewardFacts) -> None:
    """Write a reward model's folder, whole or not at all; refuses one that is not empty."""
    check_free(folder)
    with new_folder(folder) as temporary:
        model.classifier.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / FACTS_FILE, facts.model_dump())


def load_reward_model(folder: Path) -> tuple[RewardModel, Any, RewardFacts]:
    """Load what `save_reward_model` wrote: the model (on the GPU if there is one), its tokenizer and its facts.

    Raises:
        InputError: the folder is no reward model's, a file of it is damaged, or its tokenizer or chat template is not
            the one that it was trained with.
    """
    if not (folder / FACTS_FILE).is_file():
        raise InputError(f"{folder}: no reward model (it has no {FACTS_FILE}); train one with everalign reward train")
    facts = _read_facts(folder / FACTS_FILE)
    tokenizer = load_tokenizer(str(folder))
    if template_fingerprint(tokenizer) != facts.template:
        raise InputError(
            f"{folder}: the tokenizer or the chat template is not the one that this reward model was trained with, so "
            "its rewards would mean nothing; restore the folder's files"
        )
    classifier = load_classifier(str(folder), fresh_head=False, device=training_device())
    # As they were computed when the mean was found that is subtracted from them.
    precision: Precision = "bf16" if facts.settings.get("precision") == "bf16" else "fp32"
    return RewardModel(classifier, precision), tokenizer, facts


def _read_facts(path: Path) -> RewardFacts:
    content = read_json(path)
    try:
        return RewardFacts.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"{path}: field {field!r}: {first['msg']}; restore the file") from None
