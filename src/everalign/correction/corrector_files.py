"""A corrector's folder: a Hugging Face language model, its tokenizer, and `corrector.json` with its template."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from everalign.correction.templates import DEFAULT_TEMPLATE, TEMPLATES, Template, get_template
from everalign.correction.tokenization import CorrectionEncoder
from everalign.errors import InputError
from everalign.modeling.loading import resolve_model
from everalign.storage import read_model, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FACTS_FILE = "corrector.json"


class CorrectorFacts(BaseModel):
    """The content of `corrector.json`.

    Args:
        format: of the file.
        template: id of the template it was trained with.
        objectives: those that the template named in training.
        encoding: fingerprint of template and tokenizer (see `CorrectionEncoder.fingerprint`).
        max_length: longest question, answer and correction together, in tokens; longer ones were cut or dropped.
        base_model: the model it was trained from, as the user named it.
        base_fingerprint: of the weights it was trained from, as plain numbers; and the format they were quantised to
            for it, if any.
        data: fingerprint of the training rows.
        rows: number of rows it was trained on.
        held_out: the report on held-out rows; None without any.
        settings: how it was trained.
        machine: where, see `machine_facts`.
        libraries: with which versions.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal[1] = 1
    template: str
    objectives: tuple[str, ...]
    encoding: str
    max_length: Annotated[int, Field(ge=1)]
    base_model: str
    base_fingerprint: str
    data: str
    rows: Annotated[int, Field(ge=1)]
    held_out: dict[str, Any] | None
    settings: dict[str, Any]
    machine: dict[str, Any] = {}
    libraries: dict[str, str] = {}


@dataclass(frozen=True)
class CorrectorFiles:
    """How a corrector is prompted.

    Args:
        name: the corrector's folder, or its name on the Hub.
        template: the one it was trained with.
        objectives: those it was trained with; others may be named where the template has a place for them.
        facts: its `corrector.json`; None where it has none and the user named the template.
    """

    name: str
    template: Template
    objectives: tuple[str, ...]
    facts: CorrectorFacts | None

    def encoder(self, tokenizer: "PreTrainedTokenizerBase") -> CorrectionEncoder:
        """Return the corrector's encoder.

        Raises:
            InputError: this is not the tokenizer that the corrector was trained with.
        """
        encoder = CorrectionEncoder(tokenizer, self.template, self.objectives)
        if self.facts is not None and self.facts.encoding != encoder.fingerprint:
            raise InputError(
                f"{self.name}: the tokenizer is not the one that this corrector was trained with; "
                "restore the folder's files"
            )
        return encoder


def write_corrector_facts(folder: Path, facts: CorrectorFacts) -> None:
    """Write `corrector.json` into a corrector's folder."""
    write_json(folder / FACTS_FILE, facts.model_dump(mode="json"))


def load_corrector_files(folder: str | os.PathLike[str], template: str | None = None) -> CorrectorFiles:
    """Read how a corrector is prompted.

    Args:
        folder: a corrector's folder; or, where `template` is named, any language model's folder or Hub name.
        template: id of the template, for correctors without a `corrector.json` such as the released Aligner
            (`aligner-1`). Where there is one, it has to agree.

    Raises:
        InputError: there is no `corrector.json` and no template is named, the file is damaged, the template is unknown
            or not the one the corrector was trained with.
    """
    named = None if template is None else get_template(template)
    path = Path(folder) / FACTS_FILE
    if not path.is_file():
        if named is None:
            raise InputError(
                f"{folder}: not a corrector (it has no {FACTS_FILE}); train one with everalign correct train, or name "
                f"the template that it was trained with: {', '.join(TEMPLATES)}"
            )
        return CorrectorFiles(str(folder), named, (), None)
    facts = read_model(path, CorrectorFacts)
    try:
        stored = get_template(facts.template)
        stored.check_objectives(facts.objectives)
    except InputError as error:
        raise InputError(f"{path}: {error}; restore the file, or use the version that wrote it") from None
    if named is not None and named != stored:
        raise InputError(
            f"{folder}: was trained with the template {stored.id!r}, not {named.id!r}; leave the template out"
        )
    return CorrectorFiles(str(folder), stored, facts.objectives, facts)


def is_corrector(model: str) -> bool:
    """Whether a model (a folder, a Hub name, `tiny`, ...) has a `corrector.json`."""
    return (Path(resolve_model(model)) / FACTS_FILE).is_file()


def chosen_template(
    model: str, template: str | None, objectives: Sequence[str] | None
) -> tuple[Template, tuple[str, ...]]:
    """Return template and objectives for training a corrector from a model.

    Args:
        model: a corrector, which keeps its template, or any language model.
        template: id of the template; the corrector's or the default one when None.
        objectives: the corrector's, or none, when None.

    Raises:
        InputError: the template is unknown, cannot name the objectives, or is not the one the model was trained with.
    """
    source = resolve_model(model)
    if not (Path(source) / FACTS_FILE).is_file():
        named = get_template(template or DEFAULT_TEMPLATE)
        return named, named.check_objectives(objectives or ())
    files = load_corrector_files(source, template)
    return files.template, files.template.check_objectives(files.objectives if objectives is None else objectives)
