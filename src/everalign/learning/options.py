"""Options of a run: method, adapter, training, rollouts and distillation. Importing them loads nothing heavy."""

import difflib
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from everalign.errors import InputError
from everalign.methods import table
from everalign.options import Options, PrecisionChoice
from everalign.training.objectives import OBJECTIVES
from everalign.training.options import (
    TOKENS_PER_BATCH,
    BatchSize,
    CheckpointSteps,
    Deterministic,
    Epochs,
    LearningRate,
    LoggingSteps,
    MaxGradNorm,
    MaxLength,
    Quantization,
    Recompute,
    Scheduler,
    StageOptions,
    TokensPerBatch,
    Warmup,
    WeightOptions,
)

Reference = Literal["base", "stage_start", "previous_task"]
Attention = Literal["sdpa", "flex"]
Preset = Literal["default", "paper"]
Space = Literal["none", "product", "factors"]
Step = Literal["fixed", "fitted"]
Share = Annotated[float, Field(ge=0, le=1)]

DEFAULT_METHOD = table.DEFAULT
DEFAULT_OBJECTIVE = "fpo"

# Spread of rewards, in deviations, below which a prompt's first answers agree.
_AGREE_WITHIN = 0.5
# Characters of regular expressions that no module's name has.
_EXPRESSION = re.compile(r"[*+?\[\](){}|^$\\]")


class MethodOptions(Options, title="Method"):
    """Arguments of the methods; None leaves one at the method's own default. See `everalign.methods`."""

    gamma: float | None = Field(default=None, ge=0, description="Focusing exponent of fpo; 2 by default (lifealign).")
    energy: Share | None = Field(
        default=None,
        description="Share of an update's energy to keep; 0.9 by default (lifealign, with --space), 1 by default "
        "(lifealign-rf).",
    )
    keep: Share | None = Field(
        default=None,
        description="Share of what overlaps earlier tasks to keep; 0.5 by default (lifealign, with --space), 1 by "
        "default (lifealign-rf).",
    )
    space: Space | None = Field(
        default=None, description="Where updates are consolidated; none by default (lifealign)."
    )
    rank_cap: int | None = Field(
        default=None, ge=1, description="Highest rank of the long-term memory; 64 by default (lifealign, with --space)."
    )
    replay: Share | None = Field(
        default=None,
        description="Share of a task's rows to keep; 0.2 by default (lifealign, er, gem, ogpsa, copr, gdumb).",
    )
    capacity: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of rows kept; 3000 by default (lifealign, er, gem, ogpsa, copr, gdumb).",
    )
    anchors: float | None = Field(
        default=None,
        ge=0,
        description="Pull of replayed answers back to how likely they were; 0 by default (lifealign, er).",
    )
    review: Share | None = Field(
        default=None,
        description="Share of a task's steps, its last, that see all tasks alike; by default 0.3 "
        "(lifealign that replays and has no --space) or 0 (er).",
    )
    average: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Decay of an average over a task's steps; 0 for none, the default (lifealign).",
    )
    strength: float | None = Field(
        default=None,
        ge=0,
        description="Strength of the method; by default 1 (ewc, ogpsa, lifealign-rf), 0.5 (gem, "
        "olora) or 0.1 (l2p, cppo).",
    )
    memory_rows: int | None = Field(
        default=None, ge=1, description="Rows of a task's gradient; 16 by default (gem, ogpsa)."
    )
    refresh: int | None = Field(
        default=None, ge=1, description="Steps between two such gradients; 5 by default (gem, ogpsa)."
    )
    online: bool | None = Field(
        default=None, description="One penalty for all tasks, or one each; on by default (ewc)."
    )
    decay: Share | None = Field(
        default=None, description="Share of the earlier penalty to keep; 1 by default (ewc, online)."
    )
    fisher_rows: int | None = Field(
        default=None, ge=1, description="Most rows of a Fisher information; 200 by default (ewc)."
    )
    shrinkage: float | None = Field(default=None, ge=0, description="Pull of a new adapter to 0; 0 by default (olora).")
    bound: float | None = Field(
        default=None, ge=0, description="Deviations beyond which a row is special; 1 by default (cppo)."
    )
    lowest: float | None = Field(
        default=None, ge=0, description="Weight of rows to learn or keep less; 0.5 by default (cppo)."
    )
    highest: float | None = Field(
        default=None, ge=0, description="Weight of rows to learn or keep more; 2 by default (cppo)."
    )
    own_answers: Share | None = Field(
        default=None, description="Share of the prompts that the policy answers first; 0.1 by default (lifealign-rf)."
    )
    pool_size: int | None = Field(default=None, ge=1, description="Learned prompts in the pool; 10 by default (l2p).")
    prompt_length: int | None = Field(
        default=None, ge=1, description="Vectors of a learned prompt; 5 by default (l2p)."
    )
    top_prompts: int | None = Field(
        default=None, ge=1, description="Learned prompts in front of each prompt; 5 by default (l2p)."
    )
    prompt_rate: float | None = Field(
        default=None, gt=0, description="Learning rate of prompts, in units of --learning-rate; 300 by default (l2p)."
    )
    rate: float | None = Field(
        default=None, ge=0, description="Rate of the multipliers' ascent; 0.1 by default (copr)."
    )
    step: Step | None = Field(
        default=None,
        description="Length of a task's update: fixed, the default, or fitted on held-back rows (lifealign).",
    )


def _check_targets(targets: str) -> str:
    if not all(name.strip() for name in targets.split(",")):
        raise ValueError("must be module names separated by commas, or all-linear")
    return targets


class AdapterOptions(Options, title="Training"):
    """Shape of the LoRA adapter that a task trains."""

    rank: int = Field(default=8, ge=1, description="Rank of a task's LoRA adapter.")
    alpha: float = Field(default=16.0, gt=0, description="LoRA's α: an update is (α/rank)·B·A.")
    targets: Annotated[str, AfterValidator(_check_targets)] = Field(
        default="all-linear",
        description="Modules to adapt: names with commas, an expression, all-linear.\nNames may be last parts; a "
        "regular expression matches whole names.",
    )

    def module_names(self) -> str | list[str]:
        """Returns a list of names, or `all-linear` or a regular expression."""
        if _EXPRESSION.search(self.targets):
            return self.targets
        names = [name.strip() for name in self.targets.split(",")]
        return names[0] if names == ["all-linear"] else names


class RolloutOptions(Options, title="Sampled answers (given --reward)"):
    """How answers are sampled to the prompts of a task that has prompts alone.

    R rounds are mirror descent on the KL divergence: each moves towards π ∝ π_before · exp(reward / temperature), with
    the temperature divided by R in all.
    """

    samples: int = Field(default=8, ge=1, description="Answers sampled for each prompt (K).")
    sampling_temperature: float = Field(
        default=1.0,
        gt=0,
        description="Divides the logits; 1 draws from the policy itself.\nWith any other value rewards are traded "
        "against the tempered policy.",
    )
    max_new_tokens: int = Field(
        default=256, ge=1, description="Longest answer, in tokens; unfinished answers are left out."
    )
    rounds: int = Field(
        default=1, ge=1, description="Number of rounds, each with answers sampled from the updated policy."
    )
    first_samples: int | None = Field(
        default=None,
        ge=2,
        description="Sample so many first, and the rest only where their rewards disagree.\nPrompts whose first "
        "rewards agree would teach little: their weights are nearly equal. Every answer counts once, so that prompts "
        "whose rewards disagree count more than others. Off if not given.",
    )
    agree_within: float | None = Field(
        default=None,
        ge=0,
        description="Widest spread of rewards that agree; 0.5 by default (first_samples).\nIn the unit of "
        "`temperature`: deviations of all first answers' rewards, or rewards as they are without `scale_rewards`. The "
        "largest weight among answers that agree is at most exp(agree_within / temperature) times the smallest.",
    )

    @model_validator(mode="after")
    def _check_first(self) -> "RolloutOptions":
        if self.first_samples is None:
            if self.agree_within is not None:
                raise InputError("agree_within is for first_samples: give both, or leave it out", field="agree_within")
        elif self.first_samples >= self.samples:
            problem = f"first_samples: must be fewer than samples, {self.samples}, found {self.first_samples}"
            raise InputError(problem, field="first_samples")
        elif self.agree_within is None:
            object.__setattr__(self, "agree_within", _AGREE_WITHIN)
        return self


class CorrectionTaskOptions(Options, title="Correctors (objective correction)"):
    """How corrections are learned by the objective `correction`."""

    template: str | None = Field(
        default=None,
        title="ID",
        description="Prompt template of the corrector; everalign-1 by default.\nOr that of the corrector that is "
        "trained further, or everalign-1.",
    )
    objectives: str | None = Field(
        default=None,
        title="WORDS",
        description='What corrections should improve: "helpful,harmless".\nNamed in every prompt, where the template '
        "has a place for them. Those of the corrector that is trained on, or none, if not given.",
    )
    identity: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Rows whose answer stays unchanged, as a share of the others.\nWhere a task has fewer such "
        "rows, some of its corrections are learned as their own corrections.",
    )

    @property
    def words(self) -> tuple[str, ...] | None:
        """The objectives, one by one."""
        if self.objectives is None or not self.objectives.strip():
            return None if self.objectives is None else ()
        return tuple(words.strip() for words in self.objectives.split(","))


class TrainingOptions(Options, title="Training"):
    """How every task is trained: an optional supervised stage on the chosen responses, then the preference stage."""

    reference: Reference | None = Field(
        default=None,
        description="Policy that implicit rewards are measured against; stage_start, or base with "
        "hypo and l2p, by default.\n`base`: always the base model. "
        "`stage_start`: the policy as this stage begins. `previous_task`: the policy before this task, "
        "which is the base model where a method starts each task from it (stl, mtl, gdumb). If not given, base with "
        "hypo, hypo-ln, dpo+hypo-ln and the method l2p, and stage_start with the others.",
    )
    learning_rate: LearningRate = Field(default=1e-4, description="Peak learning rate of the preference stage.")
    epochs: Epochs = 1.0
    sft_epochs: float = Field(
        default=0.0,
        ge=0,
        description="Supervised passes over the chosen responses before the preference stage; 0 for none.",
    )
    sft_learning_rate: LearningRate = Field(default=1e-4, description="Peak learning rate of the supervised stage.")
    beta: float | None = Field(
        default=None,
        gt=0,
        description="Inverse temperature of the implicit reward (β); by default 0.1, or 5 with hypo-ln.",
    )
    batch_size: BatchSize = 16
    tokens_per_batch: TokensPerBatch = TOKENS_PER_BATCH
    max_length: MaxLength = 1024
    precision: PrecisionChoice = Field(
        default="auto",
        description="Precision of the base model; auto, the default, is bf16 on a GPU that has it, else fp32.\nAlso "
        "of the computation. Adapters are always fp32.",
    )
    quantize: Quantization = None
    device_map: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        title="auto|balanced|FILE",
        description="Spread the base model's layers over this machine's devices, in one process.\n`auto` and "
        "`balanced` fill the GPUs evenly, then the CPU, then the disk; a JSON file names a device, `cpu` or `disk` for "
        "each module. It changes no result, and a run may go on with another one.",
    )
    attention: Attention = Field(default="sdpa", description="Attention; flex (FlexAttention) needs a GPU.")
    checkpointing: Recompute = "auto"
    warmup: Warmup = 0.1
    scheduler: Scheduler = Field(default="cosine", description="Learning-rate schedule after the warm-up.")
    max_grad_norm: MaxGradNorm = 1.0
    logging_steps: LoggingSteps = 5
    checkpoint_steps: CheckpointSteps = 200
    deterministic: Deterministic = False
    test_limit: int = Field(
        default=0, ge=0, description="Maximum number of held-out pairs of a task to score, evenly spaced; 0 for all."
    )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "TrainingOptions":
        """Returns a named set of values with some of them changed.

        `paper` is the set-up of LifeAlign's scripts: three epochs of supervised training at 1e-4, three of preference
        training at 5e-6, β 0.1, cosine, warm-up 0.1, and the base model as reference.
        """
        if name not in _PRESETS:
            raise InputError(f"unknown preset {name!r}: choose one of {', '.join(_PRESETS)}", field="preset")
        return cls(**{**_PRESETS[name], **changes})

    def resolved(self, objective: str, reference: str | None = None) -> "TrainingOptions":
        """Returns the options with the objective's own β and reference where none are given.

        Args:
            objective: its name.
            reference: the one that the method makes sense with; None for any.
        """
        entry = OBJECTIVES[objective]
        return self.replace(
            beta=entry.beta if self.beta is None else self.beta,
            reference=(reference or entry.reference) if self.reference is None else self.reference,
        )

    def stage(self, supervised: bool = False) -> StageOptions:
        """Returns the preference stage's options, or those of the supervised stage before it."""
        own = {"learning_rate": self.sft_learning_rate, "epochs": self.sft_epochs} if supervised else {}
        return StageOptions(**{**self.shared_with(StageOptions), **own})


_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "reference": "base",
        "beta": 0.1,
        "learning_rate": 5e-6,
        "epochs": 3.0,
        "sft_epochs": 3.0,
        "sft_learning_rate": 1e-4,
        "max_length": 2048,
    },
}

PAPER_ADAPTER = AdapterOptions(rank=8, alpha=16.0, targets="q_proj,v_proj")


Labels = Literal["sft", "dpo", "fpo", "var"]


class DistillOptions(Options, title="Rounds"):
    """What the policy learns from corrections."""

    labels: Labels = Field(
        default="sft",
        description="What is learned.\n`sft`: every corrected answer, unchanged ones included, by plain negative "
        "log-likelihood (the paper's safe choice). `dpo`, `fpo`: the correction is preferred to the answer. `var`: the "
        "two are a scored group with rewards 1 and 0. These learn from changed answers alone.",
    )
    rounds: int = Field(default=1, ge=1, description="Number of rounds, each with new answers of the updated model.")
    sampling_temperature: float = Field(default=1.0, gt=0, description="Divides the logits.")
    max_new_tokens: int = Field(
        default=256, ge=1, description="Longest answer, in tokens; unfinished answers are left out."
    )

    @property
    def objective(self) -> str:
        """The learner's objective; `var` with one completion of weight 1 is the plain negative log-likelihood."""
        return "var" if self.labels == "sft" else self.labels


TRACKERS: Mapping[str, Sequence[str]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow",),
}
"""Experiment trackers by name, each with the packages of which one has to be installed."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not known or not installed; loads nothing.

    Raises:
        InputError: names the tracker and what to do.
    """
    for name in names:
        if name not in TRACKERS:
            known = ", ".join(TRACKERS)
            raise InputError(f"log_to: there is no tracker {name!r}; choose from {known}", field="log_to")
        if all(find_spec(package) is None for package in TRACKERS[name]):
            raise InputError(f"log_to {name}: the package is not installed: pip install {name}", field="log_to")


_SECTIONS: dict[str, type[Options]] = {
    "training": TrainingOptions,
    "adapter": AdapterOptions,
    "weighting": WeightOptions,
    "rollouts": RolloutOptions,
    "correction": CorrectionTaskOptions,
}


def collect_options(sections: Mapping[str, Any], keywords: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Puts a learner's options together.

    Args:
        sections: `training`, `adapter`, ...: their options, a dictionary of them, or None.
        keywords: single options by name, of any section or of the method; they win.

    Returns:
        The options of each section, None where nothing is given, and the method's arguments.

    Raises:
        InputError: an option is unknown, or has a value it cannot have.
    """
    found: dict[str, Any] = {}
    for section, kind in _SECTIONS.items():
        value = sections[section]
        if isinstance(value, Mapping):
            value = kind(**value)
        if value is not None and not isinstance(value, kind):
            what = f"{kind.__name__} or a dictionary of its options, found {type(value).__name__}"
            raise InputError(f"{section}: must be {what}", field=section)
        if own := {name: given for name, given in keywords.items() if name in kind.model_fields}:
            value = kind(**own) if value is None else value.replace(**own)
        found[section] = value
    of_method = {name: given for name, given in keywords.items() if name in MethodOptions.model_fields}
    kinds: list[type[Options]] = [MethodOptions, *_SECTIONS.values()]
    known = [name for kind in kinds for name in kind.model_fields]
    for name in keywords:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "help(everalign.Learner) lists them"
            raise InputError(f"{name!r} is not an option of a learner: {hint}", field=name, hint=hint)
    return found, of_method
