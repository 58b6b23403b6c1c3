"""Options of training: stages, reward models, and the weights of VAR. Importing them loads nothing heavy."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from everalign.errors import InputError
from everalign.options import Checkpointing, Options, PrecisionChoice, Quantize

SHORTEST_MAX_LENGTH = 8
LEARNING_RATE = 2e-5
# An adapter starts at 0 and has far to go.
LORA_LEARNING_RATE = 2e-4
# On validation prompts better than 1, and not told apart from 0.1, which moves further (bench/results/rewards.md).
VAR_TEMPERATURE = 0.25
_SET_A_RANK = "set --lora-rank (lora_rank) too, or leave it out"

# Declared once, used by every section that has the option.
LearningRate = Annotated[float, Field(gt=0, description="Peak learning rate.")]
Epochs = Annotated[float, Field(gt=0, description="Passes over the rows; fractions allowed.")]
BatchSize = Annotated[int, Field(ge=1, description="Rows of an optimiser step, over all processes.")]
TokensPerBatch = Annotated[
    int,
    Field(
        ge=1,
        description="Tokens computed at once, padding included.\nFewer save memory and change no result.",
    ),
]
MaxLength = Annotated[int, Field(ge=SHORTEST_MAX_LENGTH, description="Longest prompt plus response, in tokens.")]
Recompute = Annotated[
    Checkpointing,
    Field(
        description="Compute activations twice to save memory; auto, the default, does so where memory is short.\n"
        "`on` keeps only the inputs of each layer and computes the rest again in the backward pass. "
        "It changes no result."
    ),
]
Deterministic = Annotated[
    bool,
    Field(
        description="The same bits each time, also on a GPU.\nOperations that have no deterministic version are an "
        "error that names them. Slower on a GPU, and without effect on a CPU, which computes so anyway."
    ),
]
Quantization = Annotated[
    Quantize | None,
    Field(
        description="Quantise the base model as it is loaded; nf4 is 4 bits a weight (QLoRA).\nFor adapters: needs "
        "`lora_rank` where all weights would be trained. Needs bitsandbytes (`pip install everalign[quantize]`). The "
        "head, the embeddings and the adapters stay as they are."
    ),
]
Warmup = Annotated[float, Field(ge=0, lt=1, description="Share of the steps for the learning-rate warm-up.")]
CheckpointSteps = Annotated[int, Field(ge=0, description="Steps between two checkpoints; 0 for none.")]
LoraRank = Annotated[
    int, Field(ge=0, description="Rank of an adapter to train and merge at the end; 0 trains all weights.")
]
LoraAlpha = Annotated[float, Field(gt=0, description="The adapter's α; twice its rank if not given.")]
ComputePrecision = Annotated[
    PrecisionChoice,
    Field(
        description="Precision of the computation; auto, the default, is bf16 on a GPU that has "
        "it.\nThe weights under an adapter "
        "are kept in it too. What is learned is fp32."
    ),
]
Scheduler = Literal["cosine", "linear", "constant_with_warmup"]
MaxGradNorm = Annotated[float, Field(ge=0, description="Gradient clipping; 0 for none.")]
LoggingSteps = Annotated[int, Field(ge=1, description="Steps between logged points of the training curve.")]

TOKENS_PER_BATCH = 8192


class StageOptions(Options):
    """How one stage is optimised (AdamW without weight decay)."""

    learning_rate: LearningRate
    epochs: Epochs = 1.0
    batch_size: BatchSize = 16
    tokens_per_batch: TokensPerBatch = TOKENS_PER_BATCH
    warmup: Warmup = 0.1
    scheduler: str = Field(default="cosine", description="Learning-rate schedule, by its name in transformers.")
    max_grad_norm: MaxGradNorm = 1.0
    logging_steps: LoggingSteps = 5
    checkpoint_steps: CheckpointSteps = 200
    checkpointing: Recompute = "auto"


class FineTuningOptions(Options):
    """What the trainings of reward models and correctors share: all weights learn, or an adapter that is merged."""

    learning_rate: LearningRate | None = Field(
        default=None, description="Peak learning rate; 2e-5, or 2e-4 of an adapter, if not given."
    )
    batch_size: BatchSize = 32
    tokens_per_batch: TokensPerBatch = TOKENS_PER_BATCH
    checkpointing: Recompute = "auto"
    lora_rank: LoraRank = 0
    lora_alpha: LoraAlpha | None = None
    quantize: Quantization = None
    precision: ComputePrecision = "auto"
    checkpoint_steps: CheckpointSteps = 200
    deterministic: Deterministic = False

    @model_validator(mode="after")
    def _check_adapter(self) -> "FineTuningOptions":
        if self.lora_rank:
            return self
        if self.lora_alpha is not None:
            raise InputError(f"lora_alpha belongs to an adapter: {_SET_A_RANK}", field="lora_alpha")
        if self.quantize is not None:
            problem = f"quantize freezes the model's own weights, and an adapter learns: {_SET_A_RANK}"
            raise InputError(problem, field="quantize")
        return self

    @property
    def rate(self) -> float:
        """The peak learning rate in use."""
        return self.learning_rate or (LORA_LEARNING_RATE if self.lora_rank else LEARNING_RATE)

    @property
    def alpha(self) -> float:
        """LoRA's α in use."""
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha


class RewardOptions(FineTuningOptions):
    """How a reward model is trained."""

    epochs: Epochs = 1.0
    max_length: MaxLength | None = Field(
        default=None,
        description="Longest prompt plus answer, in tokens; 1,024 or the model's limit if not given.",
    )
    centring: float = Field(default=0.01, ge=0, description="Weight of the term that keeps a pair's rewards around 0.")


Estimator = Literal["group", "group_loo", "in_batch", "reference", "quantile", "support"]


class WeightOptions(Options, title="Rewards (objectives var, snkl)"):
    """How rewards become weights (see `everalign.objectives.var_weights`)."""

    estimator: Estimator = Field(
        default="group",
        description="Normaliser of var.\n`group`: the prompt's own completions. `group_loo`: the other ones, which "
        "aims at the optimum exactly but with weights of any size. `in_batch`: the other prompts', for data with one "
        "completion a prompt; a reward is compared with the mean of the prompt's other completions or, where some "
        "prompt has but one, with that of the dataset. `reference`: the row's `reference_rewards`, which aims at the "
        "optimum with any number of completions. `quantile`: none; a reward becomes its rank among the "
        "`reference_rewards`, whose normaliser is known. `support`: the completions' probabilities under the base "
        "model times their exponentiated rewards, for distinct completions that were listed and not sampled.",
    )
    temperature: float | None = Field(
        default=None,
        gt=0,
        description="Reward that is worth one nat; by default 0.25 with var, 1 with snkl and in `correct distill`.\nIn "
        "standard deviations of the dataset's rewards, in rewards as they are without `scale_rewards`, or in all ranks "
        "with `quantile`. 1 with the estimators other than `group` and `quantile` if not given.",
    )
    target_ess: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Find the temperature that gives this effective share of the responses; 0 for none.",
    )
    scale_rewards: bool | None = Field(
        default=None,
        description="Divide rewards by their standard deviation over the dataset; on by default, but not with "
        "quantile, whose ranks have no scale.",
    )
    weight_cap: float = Field(default=0.0, ge=0, description="Largest weight; 0 for none.")
    length_normalize: bool = Field(
        default=False,
        description="Divide log-probabilities by the completion's tokens (estimator support).\nSummed ones let length "
        "decide; a heuristic, whose weights no longer aim at the optimum.",
    )
    weight_floor: float = Field(default=0.0, ge=0, lt=1, description="Completions with a smaller weight are left out.")
    drop_constant: bool = Field(default=False, description="Leave out prompts whose rewards are all equal.")

    @model_validator(mode="after")
    def _resolve(self) -> "WeightOptions":
        ranks = self.estimator == "quantile"
        if self.temperature is None and self.estimator != "group":
            object.__setattr__(self, "temperature", 0.25 if ranks else 1.0)
        if self.scale_rewards is None:
            object.__setattr__(self, "scale_rewards", not ranks)
        ignored = {
            "scale_rewards": ranks and self.scale_rewards,
            "length_normalize": self.estimator != "support" and self.length_normalize,
        }
        for name, given in ignored.items():
            if given:
                raise InputError(f"the estimator {self.estimator} would ignore {name}: leave it out", field=name)
        return self

    def resolved(self, temperature: float = VAR_TEMPERATURE) -> "WeightOptions":
        """Returns these options with a temperature: the objective's where none was given."""
        return self if self.temperature is not None else self.model_copy(update={"temperature": temperature})

    def settings(self) -> dict[str, Any]:
        """Returns the values that mean something."""
        found = self.model_dump()
        if self.estimator != "support":
            del found["length_normalize"]
        # Recorded only where they do something.
        for name in ("weight_floor", "drop_constant"):
            if not found[name]:
                del found[name]
        return found


@dataclass(frozen=True)
class ObjectiveOptions:
    """Options that objectives read; each takes its own from them.

    Args:
        beta: inverse temperature of the implicit reward.
        gamma: focusing exponent; None for the objective's own default.
        weighting: how rewards become weights.
        correction: template, objectives in words, and share of identities of a corrector (`CorrectionTaskOptions`).
    """

    beta: float = 0.1
    gamma: float | None = None
    weighting: WeightOptions = field(default_factory=WeightOptions)
    correction: Any = None
