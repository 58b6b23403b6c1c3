"""Options of correctors. Importing them loads nothing heavy."""

from pydantic import Field, model_validator

from everalign.options import Options
from everalign.training.options import (
    LEARNING_RATE,
    LORA_LEARNING_RATE,
    TOKENS_PER_BATCH,
    BatchSize,
    CheckpointSteps,
    ComputePrecision,
    Deterministic,
    Epochs,
    LearningRate,
    LoraAlpha,
    LoraRank,
    MaxLength,
    Quantization,
    Recompute,
    StageOptions,
    TokensPerBatch,
    check_adapter,
)


class CorrectorOptions(Options):
    """How a corrector is trained; the defaults are the Aligner paper's where it states any."""

    template: str | None = Field(
        default=None,
        title="ID",
        description="Prompt template of the corrector, such as aligner-1; everalign-1 by default.\nOr that of the "
        "corrector that is trained further, or everalign-1.",
    )
    objectives: tuple[str, ...] | None = Field(
        default=None,
        title="WORDS",
        description='What corrections should improve: "helpful,harmless".\nNamed in every prompt, where the template '
        "has a place for them. Those of the corrector that is trained on, or none, if not given.",
    )
    identity: float = Field(
        default=0.2, ge=0, le=1, description="Share of the rows that the warm-up learns to copy; 0 for no warm-up."
    )
    identity_epochs: Epochs = Field(default=1.0, description="Passes of the warm-up over these rows.")
    identity_learning_rate: LearningRate | None = Field(
        default=None, description="Peak learning rate of the warm-up; that of the second stage if not given."
    )
    learning_rate: LearningRate | None = Field(
        default=None, description="Peak learning rate; 2e-5, or 2e-4 of an adapter, if not given."
    )
    epochs: Epochs = Field(default=3.0, description="Passes over the corrections; fractions allowed.")
    batch_size: BatchSize = 32
    max_length: MaxLength | None = Field(
        default=None,
        description="Longest prompt plus correction, in tokens; 2,048 or the model's limit if not given.",
    )
    tokens_per_batch: TokensPerBatch = TOKENS_PER_BATCH
    checkpointing: Recompute = "auto"
    warmup: float = Field(
        default=0.03, ge=0, le=1, description="Share of a stage's steps for the learning-rate warm-up."
    )
    lora_rank: LoraRank = 0
    lora_alpha: LoraAlpha | None = None
    quantize: Quantization = None
    precision: ComputePrecision = "auto"
    checkpoint_steps: CheckpointSteps = 200
    deterministic: Deterministic = False

    @model_validator(mode="after")
    def _check_adapter(self) -> "CorrectorOptions":
        check_adapter(self.lora_rank, self.lora_alpha, self.quantize)
        return self

    @property
    def alpha(self) -> float:
        """LoRA's α in use."""
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    def stage(self, warming_up: bool) -> StageOptions:
        """Returns how a stage is optimised."""
        rate = self.learning_rate or (LORA_LEARNING_RATE if self.lora_rank else LEARNING_RATE)
        own = {
            "learning_rate": (self.identity_learning_rate or rate) if warming_up else rate,
            "epochs": self.identity_epochs if warming_up else self.epochs,
        }
        return StageOptions(**{**self.shared_with(StageOptions), **own})
