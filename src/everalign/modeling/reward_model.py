"""Reward models: a sequence classifier with one output, read at the last token of prompt and answer.

The architecture and its folder are transformers' own (`AutoModelForSequenceClassification` with one label), so that
whatever loads such a model loads ours; its logits are rewards that are not centred yet.
"""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from everalign.data.chat_tokens import template_fingerprint
from everalign.data.collate import Batch, batches_by_length, collate, row_tokens
from everalign.data.messages import Prompt, prompt_key
from everalign.data.tokenization import TokenizedRow, pad_right
from everalign.distributed import share, world
from everalign.errors import EveralignError, InputError
from everalign.modeling.architecture import study_classifier
from everalign.modeling.base_adapter import base_and_adapter
from everalign.modeling.base_weights import check_no_adapter, check_trainable, plain_weights, quantize_on_loading
from everalign.modeling.loading import (
    DTYPES,
    base_key,
    load_config,
    load_model,
    load_tokenizer,
    load_weights,
    model_fingerprint,
    on_meta,
    resolve_model,
)
from everalign.modeling.logprobs import Architecture, SequenceLogProbs
from everalign.modeling.runtime import training_device
from everalign.modeling.trainable import LearnedState
from everalign.options import Precision, Quantize
from everalign.storage import check_free, new_folder, read_json, read_model, write_json

_PADDING = "<|pad|>"


class RewardNetwork(LearnedState):
    """A classifier as a function of token sequences, of which those with the same prompt can be one row.

    Args:
        classifier: a sequence classifier with one label and a padding token (see `load_classifier`, `set_padding`), or
            such a one with an adapter.
        precision: `bf16` computes under bf16 autocast, all but the score head: steps between neighbouring bf16 numbers
            are as large as the differences between rewards.
    """

    # Scores that are kept name the scorer that gave them: its fingerprint begins with what the class was called then.
    fingerprinted_as = "RewardModel"

    def __init__(self, classifier: Any, precision: Precision = "fp32") -> None:
        super().__init__()
        self.classifier = classifier
        self._mixed = precision == "bf16"

    @property
    def padding(self) -> int:
        """The token that pads, which is never a sequence's last one."""
        token: int = self.classifier.config.get_text_config().pad_token_id
        return token

    @cached_property
    def head(self) -> SequenceLogProbs:
        """Gives the hidden states that rewards are made of; says whether a prompt can be read once for its answers."""
        plain = self._plain
        architecture = Architecture(why_no_prefix_sharing="more than one part makes a reward of hidden states")
        if len(self._score) == 1:
            architecture = study_classifier(plain, self._score[0])
        return SequenceLogProbs(plain, architecture)

    @property
    def _plain(self) -> Any:
        """The classifier, its adapter injected."""
        return self.classifier.get_base_model() if isinstance(self.classifier, PeftModel) else self.classifier

    @property
    def _score(self) -> list[str]:
        """Names of the parts behind the backbone that have weights."""
        parts = self._plain.named_children()
        backbone = self._plain.base_model_prefix
        return [name for name, part in parts if name != backbone and next(part.parameters(), None) is not None]

    def forward(self, batch: Batch) -> Tensor:
        """Return fp32 rewards (S,), not centred.

        Args:
            batch: `input_ids` and `attention_mask` (S, T), padded on the right; or S sequences as `collate` lays them
                out with shared prompts, where `head.shared` allows it.
        """
        with torch.autocast(batch["input_ids"].device.type, dtype=torch.bfloat16, enabled=self._mixed):
            if "predictors" in batch:
                logits = getattr(self._plain, self._score[0])(self.head.last_states(batch))
            else:
                logits = self.classifier(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        rewards: Tensor = logits[:, 0].float()
        return rewards


class _ScoreHead(nn.Linear):
    """A linear layer that computes in fp32 under autocast too."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight.float(), None if self.bias is None else self.bias.float())


_CLASSIFIER = "sequence classifier with one label"


def load_classifier(
    name: str,
    fresh_head: bool,
    seed: int = 0,
    precision: Precision = "fp32",
    device: torch.device | None = None,
    quantize: Quantize | None = None,
) -> Any:
    """Load a sequence classifier with one label, dropout off.

    Dropout stays off because an answer's reward must not depend on which other answer it is compared with, nor on how
    a step is cut into batches.

    Args:
        name: a folder in Hugging Face format, a Hub name, a GGUF file, `tiny` or `smollm2`.
        fresh_head: let the head start with random values where the model has none, as a language model does.
        seed: seeds them.
        precision: of the weights.
        device: where it is to be; the CPU when None.
        quantize: the format that the linear modules below its head are quantised to as they are read; None to leave
            them as they are.

    Raises:
        InputError: nothing loadable is there, its architecture has no sequence classifier, weights are missing, or the
            model cannot be quantised.
    """
    source, adapter = resolve_model(name), base_and_adapter(name, resolve_model(name))[1]
    check_no_adapter(adapter, quantize)
    if adapter is not None:
        with tempfile.TemporaryDirectory() as folder:
            load_model(name).save_pretrained(folder)
            return load_classifier(folder, fresh_head, seed, precision, device)
    config = load_config(source, _CLASSIFIER, name, num_labels=1)
    text = config.get_text_config()
    text.use_cache = False  # only generation needs it
    for key, value in vars(text).items():  # each family has its own names for dropout
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(text, key, 0.0)
    kind, dtype, packing = AutoModelForSequenceClassification, DTYPES[precision], None
    if quantize is not None:
        empty = on_meta(kind, config, dtype)
        below = f"{empty.base_model_prefix}."
        head = [part for part, _ in empty.named_modules() if part and not f"{part}.".startswith(below)]
        packing = quantize_on_loading(config, name, quantize, dtype, head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, loaded = load_weights(kind, _CLASSIFIER, name, source, config, dtype, device, packing)
    backbone = f"{model.base_model_prefix}."
    missing = sorted(key for key in loaded["missing_keys"] if not fresh_head or key.startswith(backbone))
    if missing:
        raise InputError(f"the weights of {name} lack {len(missing)} of the model's parameters, such as {missing[0]}")
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module.out_features == 1 and not name.startswith(backbone):
            module.__class__ = _ScoreHead
    return model.eval()


def backbone_key(classifier: Any, name: str, precision: Precision, quantize: Quantize | None) -> str:
    """Return what identifies the weights below a classifier's head; arguments as in `load_classifier`.

    Of a model that is quantised here, that is the fingerprint of its plain weights and the format, as in `load_base`.
    """
    if quantize is None:
        return model_fingerprint(classifier.base_model)
    source = resolve_model(name)
    config = load_config(source, _CLASSIFIER, name, num_labels=1)
    own = getattr(config, "dtype", None) or torch.float32  # so they stay in the memory map of their files
    plain, _ = load_weights(AutoModelForSequenceClassification, _CLASSIFIER, name, source, config, own)
    return base_key(model_fingerprint(plain.base_model, DTYPES[precision]), quantize)


def add_adapter(classifier: Any, rank: int, alpha: float, seed: int, name: str) -> Any:
    """Return a classifier that learns with an adapter and its score head, in fp32; see `with_adapter_merged`.

    Args:
        classifier: what `load_classifier` returned; its other weights are frozen.
        rank: of the adapter, on all linear modules.
        alpha: LoRA's α.
        seed: seeds the adapter.
        name: the model's, for errors.
    """
    check_trainable(classifier, name, merged=True)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", lora_dropout=0.0, task_type="SEQ_CLS")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(classifier, config).eval()
        except ValueError as error:
            raise InputError(f"{name}: peft finds no modules to adapt: {error}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # peft leaves the head in the precision of the other weights
            parameter.data = parameter.data.float()
    return adapted


def with_adapter_merged(adapted: Any, plain: Any) -> Any:
    """Return a classifier with the adapter and score head of another one.

    Args:
        adapted: what was trained.
        plain: the same model in fp32 without them; changed in place.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Without the embeddings, which peft would add where there is a padding token more: in the precision of the
        # training, and untrained.
        adapted.save_pretrained(folder, save_embedding_layers=False)
        model = PeftModel.from_pretrained(plain_weights(plain), Path(folder))
        merged = model.merge_and_unload(safe_merge=True)
    vars(merged).pop("peft_config", None)
    return merged.eval()


def set_padding(classifier: Any, tokenizer: Any) -> None:
    """Give classifier and tokenizer one padding token, on the right, that is not the end of an answer.

    transformers reads the reward at the last token that is not padding: with EOS as padding, as is common, it would
    pass over the end of the answer. Where the tokenizer has no other padding token, one is added; a tokenizer that an
    earlier call has given one makes room for it in this classifier too.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": _PADDING})
    count = classifier.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id >= count:
        added = classifier.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        # Nothing attends to the new row; zeros, so that the same training writes the same file.
        added.weight.data[count:] = 0
    tokenizer.padding_side = "right"
    classifier.config.get_text_config().pad_token_id = tokenizer.pad_token_id


# Tokens of answers that may share a prompt shorter than that: attention computes what they see of one another too.
_ANSWERS_OF_A_ROW = 1024


def _by_prompt(rows: Sequence[TokenizedRow], most: int) -> list[tuple[list[int], TokenizedRow]]:
    """Put answers to the same prompt into one row of at most `most` tokens, each row with its answers' numbers."""
    found: list[tuple[list[int], TokenizedRow]] = []
    newest: dict[tuple[int, ...], int] = {}  # of each prompt's rows
    number = 0
    for row in rows:
        limit, prompt = min(most - len(row.prompt), max(_ANSWERS_OF_A_ROW, len(row.prompt))), tuple(row.prompt)
        for answer in row.responses:
            place = newest.get(prompt)
            if place is None or sum(map(len, found[place][1].responses)) + len(answer) > limit:
                newest[prompt] = len(found)
                found.append(([number], replace(row, responses=(answer,), weights=(1.0,))))
            else:
                numbers, before = found[place]
                together = replace(before, responses=(*before.responses, answer), weights=(*before.weights, 1.0))
                found[place] = ([*numbers, number], together)
            number += 1
    return found


def sequence_rewards(
    model: RewardNetwork,
    rows: Sequence[TokenizedRow],
    tokens_per_batch: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Compute the rewards, not centred, of all answers of some rows; a prompt is read once for several of them.

    Args:
        model: in evaluation mode; gradients are off.
        rows: prompts and N answers in all.
        tokens_per_batch: tokens computed at once, padding included.
        progress: called with (rows done, rows in all) after each of this process's batches.

    Returns:
        (N,) fp32 on the CPU, answer after answer.

    Raises:
        EveralignError: a reward is NaN or infinite.
    """
    device, processes = next(model.parameters()).device, world()
    groups = _by_prompt(rows, tokens_per_batch)
    count = sum(len(numbers) for numbers, _ in groups)
    shared = len(groups) < count and model.head.shared
    if not shared:
        groups = _by_prompt(rows, 0)

    def compute(batches: Sequence[list[int]]) -> list[Tensor]:
        parts, done = [], 0
        for places in batches:
            some = [groups[place][1] for place in places]
            if shared:
                batch = collate(some, shared)
            else:
                batch = pad_right([row.prompt + row.responses[0] for row in some], model.padding)
            with torch.no_grad():
                parts.append(model({name: values.to(device) for name, values in batch.items()}))
            done += len(places)
            if progress is not None:
                progress(min(done * processes, len(groups)), len(groups))
        if not parts:
            return []
        whole = torch.cat(parts).cpu()  # the device is waited for once
        return [part.clone() for part in torch.split(whole, [len(part) for part in parts])]

    batches = batches_by_length([row_tokens(row, shared) for _, row in groups], tokens_per_batch)
    parts, rewards = share(compute, batches), torch.empty(count)
    if parts:
        rewards[[number for places in batches for place in places for number in groups[place][0]]] = torch.cat(parts)
    if not torch.isfinite(rewards).all():
        raise EveralignError("the model gives NaN or infinite rewards: lower the learning rate, or check its weights")
    return rewards


FACTS_FILE = "everalign_reward.json"
PROMPTS_FILE = "everalign_reward_prompts.json"
"""Keys of the training prompts, by which their overlap with what is to be judged is found."""


class RewardFacts(BaseModel):
    """What is known of a reward model, as `everalign_reward.json` holds it.

    Args:
        format: of the file.
        mean: mean of the classifier's rewards of training answers, which scoring subtracts; of many pairs, of 1,000
            from the first to the last.
        scale: their standard deviation; scoring does not divide by it.
        max_length: longest prompt plus answer, in tokens; longer ones are cut as in training.
        template: fingerprint of the tokenizer and its chat template.
        base_model: what it was trained from, as the user named it.
        base_fingerprint: of the weights that it was trained from, without the head, as plain numbers; and the format
            they were quantised to for it, if any.
        data: fingerprint of the training pairs.
        pairs: number of training pairs.
        accuracy: share of held-out pairs that it ranks as wished; None without held-out pairs.
        settings: how it was trained.
        machine: where, see `machine_facts`.
        libraries: with which versions.
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
    machine: dict[str, Any] = {}
    libraries: dict[str, str] = {}


def save_reward_model(
    folder: Path, model: RewardNetwork, tokenizer: Any, facts: RewardFacts, prompts: Iterable[Prompt]
) -> None:
    """Write a reward model's folder, whole or not at all; refuses one that is not empty.

    Args:
        folder: where.
        model: the classifier.
        tokenizer: its tokenizer.
        facts: what is known of it.
        prompts: those of its training pairs, of which the keys are kept.
    """
    check_free(folder)
    with new_folder(folder) as temporary:
        model.classifier.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / FACTS_FILE, facts.model_dump())
        write_json(temporary / PROMPTS_FILE, sorted(set(map(prompt_key, prompts))))


def read_reward_facts(folder: Path) -> RewardFacts:
    """Return what is known of the reward model in a folder, without loading it.

    Raises:
        InputError: the folder is no reward model's, or the file is damaged.
    """
    if not (folder / FACTS_FILE).is_file():
        raise InputError(
            f"{folder}: not a reward model (it has no {FACTS_FILE}); train one with everalign reward train"
        )
    return read_model(folder / FACTS_FILE, RewardFacts)


def read_reward_prompts(folder: Path) -> set[str] | None:
    """Return the keys of a reward model's training prompts (see `prompt_key`); None where they were not kept."""
    path = folder / PROMPTS_FILE
    if not path.exists():
        return None
    keys = read_json(path)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise InputError(f"{path}: must be a list of keys of prompts: restore the file")
    return set(keys)


def load_reward_model(folder: Path) -> tuple[RewardNetwork, Any, RewardFacts]:
    """Load what `save_reward_model` wrote: the model (on the GPU if there is one), its tokenizer and its facts.

    Raises:
        InputError: the folder is no reward model's, a file of it is damaged, or its tokenizer or chat template is not
            the one that it was trained with.
    """
    facts = read_reward_facts(folder)
    tokenizer = load_tokenizer(str(folder))
    if template_fingerprint(tokenizer) != facts.template:
        raise InputError(
            f"{folder}: the tokenizer or the chat template is not the one that this reward model was trained with, so "
            "its rewards would mean nothing; restore the folder's files"
        )
    classifier = load_classifier(str(folder), fresh_head=False, device=training_device())
    # As they were computed when the mean was found that is subtracted from them.
    precision: Precision = "bf16" if facts.settings.get("precision") == "bf16" else "fp32"
    return RewardNetwork(classifier, precision), tokenizer, facts
