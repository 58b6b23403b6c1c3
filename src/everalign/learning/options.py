"""Options of a run: the adapter, training, rollouts and self-training."""

import math
import re
from dataclasses import dataclass, fields
from difflib import SequenceMatcher
from typing import Any, Literal, get_args

from everalign.data.tokenization import SHORTEST_MAX_LENGTH
from everalign.errors import InputError
from everalign.modeling.loading import PrecisionChoice
from everalign.modeling.runtime import Checkpointing
from everalign.modeling.sampling import SamplingOptions
from everalign.training.stage import TOKENS_PER_BATCH, StageOptions

Reference = Literal["base", "stage_start", "previous_task"]
Scheduler = Literal["cosine", "linear", "constant_with_warmup"]
Attention = Literal["sdpa", "flex"]
Preset = Literal["default", "paper"]


# What module names never hold.
_EXPRESSION = re.compile(r"[*+?\[\](){}|^$\\]")


def _require(holds: bool, name: str, what: str, found: Any) -> None:
    if not holds:
        raise InputError(f"{name} must be {what}, found {found!r}")


def _require_whole(name: str, found: Any, least: int) -> None:
    holds = isinstance(found, int) and not isinstance(found, bool) and found >= least
    _require(holds, name, f"a whole number of at least {least}", found)


def _is_number(found: Any) -> bool:
    return isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)


@dataclass(frozen=True)
class AdapterOptions:
    """Shape of the LoRA adapter a task trains.

    Args:
        rank: r.
        alpha: α; a module's update is (α/r)·B·A.
        targets: module names (or their last parts) separated by commas, a regular expression for whole names, or
            `all-linear`.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = "all-linear"

    def __post_init__(self) -> None:
        _require_whole("rank", self.rank, 1)
        _require(_is_number(self.alpha) and self.alpha > 0, "alpha", "a number above 0", self.alpha)
        named = isinstance(self.targets, str) and all(self._names())
        _require(named, "targets", "module names separated by commas, or all-linear", self.targets)

    def _names(self) -> list[str]:
        return [name.strip() for name in self.targets.split(",")]

    def module_names(self) -> str | list[str]:
        """Return a list of names, or `all-linear` or a regular expression."""
        if _EXPRESSION.search(self.targets):
            return self.targets
        names = self._names()
        return names[0] if names == ["all-linear"] else names


@dataclass(frozen=True)
class RolloutOptions:
    """How answers to prompts are sampled, where a task has prompts alone.

    Args:
        samples: K, answers drawn independently for each prompt.
        sampling_temperature: what logits are divided by; 1 draws from the policy itself. With any other value the
            tempered policy is what rewards are traded against.
        max_new_tokens: longest answer; what has not ended by then is left out.
        rounds: how often answers are sampled anew, from what the policy has become by then. Each round moves towards
            π ∝ π_before · exp(reward / temperature), so that R rounds are mirror descent on the KL divergence with
            the temperature divided by R in all.
    """

    samples: int = 8
    sampling_temperature: float = 1.0
    max_new_tokens: int = 256
    rounds: int = 1

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "rounds"):
            _require_whole(name, getattr(self, name), 1)
        value = self.sampling_temperature
        _require(_is_number(value) and value > 0, "sampling_temperature", "a number above 0", value)


@dataclass(frozen=True)
class CorrectionTaskOptions:
    """How corrections are learned, by the objective `correction`.

    Args:
        template: id of what the corrector reads; None for that of the corrector that is trained on, or `everalign-1`.
        objectives: in words separated by commas, named in every prompt, where the template has a place for them; None
            for those of the corrector that is trained on, or none.
        identity: share of a task's rows, those that change anything being all, that are to leave a good answer as it
            is. Where a task has fewer such rows, some of its corrections are learned as their own corrections.
    """

    template: str | None = None
    objectives: str | None = None
    identity: float = 0.0

    def __post_init__(self) -> None:
        holds = _is_number(self.identity) and 0 <= self.identity <= 1
        _require(holds, "identity", "a share from 0 to 1", self.identity)

    @property
    def words(self) -> tuple[str, ...] | None:
        """The objectives, one by one."""
        if self.objectives is None or not self.objectives.strip():
            return None if self.objectives is None else ()
        return tuple(words.strip() for words in self.objectives.split(","))


@dataclass(frozen=True)
class TrainingOptions:
    """How every task is trained: an optional supervised stage on the chosen responses, then the preference stage.

    Args:
        reference: the policy that implicit rewards are measured against. `base`: the base model, always.
            `stage_start`: the policy as this stage begins. `previous_task`: the policy before this task.
        learning_rate: peak learning rate of the preference stage.
        epochs: passes over the rows in the preference stage.
        sft_epochs: passes over the chosen responses before that; 0 leaves the stage out.
        sft_learning_rate: peak learning rate of the supervised stage.
        beta: inverse temperature of the implicit reward.
        batch_size: pairs of an optimiser step.
        tokens_per_batch: tokens computed at once, padding included; fewer save memory and change no result.
        max_length: longest prompt plus response, in tokens.
        precision: dtype of the base model and of the computation: `fp32`, `bf16`, or `auto` for bf16 on a GPU that has
            it and fp32 elsewhere. Adapters are always fp32.
        attention: `sdpa`, or `flex` for FlexAttention, which needs a GPU.
        checkpointing: `on` keeps only what goes into each layer and computes the rest again in the backward pass,
            `auto` does so where memory would not do otherwise; changes no result.
        warmup: share of the steps in which the learning rate rises.
        scheduler: course of the learning rate after the warm-up: `cosine`, `linear` (both down to 0) or
            `constant_with_warmup`.
        max_grad_norm: gradient clipping; 0 for none.
        logging_steps: steps between two points of the training curve.
        checkpoint_steps: steps between two checkpoints inside a stage; 0 for none.
        test_limit: most held-out pairs of a task that are scored, evenly spaced; 0 for all.
    """

    reference: Reference = "stage_start"
    learning_rate: float = 1e-4
    epochs: float = 1.0
    sft_epochs: float = 0.0
    sft_learning_rate: float = 1e-4
    beta: float = 0.1
    batch_size: int = 16
    tokens_per_batch: int = TOKENS_PER_BATCH
    max_length: int = 1024
    precision: PrecisionChoice = "auto"
    attention: Attention = "sdpa"
    checkpointing: Checkpointing = "auto"
    warmup: float = 0.1
    scheduler: Scheduler = "cosine"
    max_grad_norm: float = 1.0
    logging_steps: int = 5
    checkpoint_steps: int = 200
    test_limit: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs", "sft_learning_rate", "beta", "sft_epochs", "max_grad_norm"):
            value, zero = getattr(self, name), name in ("sft_epochs", "max_grad_norm")
            holds = _is_number(value) and (value > 0 or (zero and value == 0))
            _require(holds, name, "a number of at least 0" if zero else "a number above 0", value)
        for name, least in _WHOLE.items():
            _require_whole(name, getattr(self, name), least)
        holds = _is_number(self.warmup) and 0 <= self.warmup < 1
        _require(holds, "warmup", "a share from 0 to below 1", self.warmup)
        for name, kind in _CHOICES.items():
            _require(getattr(self, name) in get_args(kind), name, f"one of {get_args(kind)}", getattr(self, name))

    @classmethod
    def preset(cls, name: Preset, **changes: Any) -> "TrainingOptions":
        """Return a named set of values with some of them changed.

        `paper` is the set-up of LifeAlign's scripts: three epochs of supervised training at 1e-4, three of preference
        training at 5e-6, β 0.1, cosine, warm-up 0.1, and the base model as reference.
        """
        if name not in _PRESETS:
            raise InputError(f"unknown preset {name!r}: choose one of {', '.join(_PRESETS)}")
        known = {field.name for field in fields(cls)}
        if unknown := set(changes) - known:
            raise InputError(f"unknown training options {sorted(unknown)}: choose from {sorted(known)}")
        return cls(**{**_PRESETS[name], **changes})

    def sft_stage(self) -> StageOptions:
        """Return the supervised stage's options."""
        return self._stage(self.sft_learning_rate, self.sft_epochs)

    def preference_stage(self) -> StageOptions:
        """Return the preference stage's options."""
        return self._stage(self.learning_rate, self.epochs)

    def _stage(self, learning_rate: float, epochs: float) -> StageOptions:
        shared = ("batch_size", "tokens_per_batch", "checkpointing", "warmup", "scheduler", "max_grad_norm")
        steps = ("logging_steps", "checkpoint_steps")
        return StageOptions(learning_rate, epochs, **{name: getattr(self, name) for name in (*shared, *steps)})


_CHOICES = {
    "reference": Reference,
    "precision": PrecisionChoice,
    "attention": Attention,
    "checkpointing": Checkpointing,
    "scheduler": Scheduler,
}
_WHOLE = {
    "batch_size": 1,
    "tokens_per_batch": 1,
    "max_length": SHORTEST_MAX_LENGTH,
    "logging_steps": 1,
    "checkpoint_steps": 0,
    "test_limit": 0,
}
_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "reference": "base",
        "learning_rate": 5e-6,
        "epochs": 3.0,
        "sft_epochs": 3.0,
        "sft_learning_rate": 1e-4,
        "max_length": 2048,
    },
}

PAPER_ADAPTER = AdapterOptions(rank=8, alpha=16.0, targets="q_proj,v_proj")


Labels = Literal["sft", "dpo", "fpo", "var"]


@dataclass(frozen=True)
class DistillOptions:
    """What the policy learns from corrections.

    Args:
        labels: `sft`: every corrected answer, those that are good as they are included, by plain negative
            log-likelihood (the paper's safe choice). `dpo`, `fpo`: the correction is preferred to the answer. `var`:
            the two are a scored group with rewards 1 and 0. These learn from changed answers alone.
        rounds: how often the policy answers anew.
        sampling_temperature: what logits are divided by.
        max_new_tokens: longest answer; what has not ended by then is left out.
    """

    labels: Labels = "sft"
    rounds: int = 1
    sampling_temperature: float = 1.0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if self.labels not in get_args(Labels):
            raise InputError(f"labels must be one of {', '.join(get_args(Labels))}, found {self.labels!r}")
        if not isinstance(self.rounds, int) or isinstance(self.rounds, bool) or self.rounds < 1:
            raise InputError(f"rounds must be a whole number of at least 1, found {self.rounds!r}")
        self.sampling(1)

    @property
    def objective(self) -> str:
        """The learner's objective; `var` with one completion of weight 1 is the plain negative log-likelihood."""
        return "var" if self.labels == "sft" else self.labels

    def sampling(self, room: int) -> SamplingOptions:
        """Return how answers are sampled to prompts of at most `room` tokens."""
        return SamplingOptions(1, self.sampling_temperature, self.max_new_tokens, room)


@dataclass(frozen=True)
class Round:
    """What happened in one round, as `distill/round-N.json` of the run tells it.

    Args:
        round: from 1 on.
        prompts: that were asked.
        unanswered: prompts whose answer did not end within max_new_tokens, or says nothing; left out.
        answers: that the corrector saw.
        changed: answers that it changed.
        changed_share: of the answers.
        edit: mean share of the words of answer and correction that the other lacks, over changed answers; 0 where
            none was changed.
        rows: that were given to the policy to learn, which leaves out those above max_length (the version's manifest
            counts them); 0 where there was nothing left to learn.
    """

    round: int
    prompts: int
    unanswered: int
    answers: int
    changed: int
    changed_share: float
    edit: float
    rows: int

    def one_line(self) -> str:
        """One line of text for a log."""
        line = f"{self.answers} answers, {self.changed} of them changed ({self.changed_share:.1%})"
        if self.changed:
            line += f", {self.edit:.1%} of their words"
        if self.unanswered:
            line += f"; {self.unanswered} answers did not end within max_new_tokens and are left out"
        return line


def edit_share(answer: str, correction: str) -> float:
    """Return the share of the words of two texts that the other one lacks: 0 for equal ones, 1 for no word in common.

    Words are matched in order, as `difflib` does.
    """
    return 1.0 - SequenceMatcher(None, answer.split(), correction.split(), autojunk=False).ratio()
