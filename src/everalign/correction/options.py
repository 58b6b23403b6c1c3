"""How a corrector is trained."""

import math
from dataclasses import dataclass

from everalign.data.encoding import SHORTEST_MAX_LENGTH
from everalign.errors import InputError
from everalign.modeling.checkpointing import Checkpointing, check_checkpointing
from everalign.modeling.loading import PrecisionChoice
from everalign.training.stage import TOKENS_PER_BATCH, StageOptions

LEARNING_RATE = 2e-5
# An adapter starts at 0 and has far to go.
LORA_LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class CorrectorOptions:
    """How a corrector is trained; the defaults are the paper's where it states any.

    Args:
        template: id of the template; None for the one of the corrector that is trained on, or `everalign-1`.
        objectives: named in every prompt, where the template has a place for them; None for those of the corrector
            that is trained on, or none.
        identity: share of the rows that the warm-up learns to copy, between 0 (no warm-up) and 1.
        identity_epochs: passes over them.
        identity_learning_rate: peak learning rate of the warm-up; None for that of the second stage.
        learning_rate: peak learning rate; None for 2e-5, or 2e-4 of an adapter.
        epochs: passes over the corrections, fractions allowed.
        batch_size: rows of an optimiser step.
        max_length: longest prompt plus correction, in tokens; None for 2,048, or for what the model can take if it is
            less.
        tokens_per_batch: tokens computed at once, padding included; fewer save memory and change no result.
        checkpointing: `on` keeps only what goes into each layer and computes the rest again in the backward pass,
            `auto` does so where memory would not do otherwise; changes no result.
        warmup: share of a stage's steps in which the learning rate rises.
        lora_rank: rank of an adapter that is trained instead of all weights, and merged at the end; 0 for all weights.
        lora_alpha: LoRA's α; None for twice the rank.
        precision: `bf16` computes in bf16, `auto` does so on a GPU that has it. An adapter's base is then kept in bf16
            too; what is learned is fp32, whether it is an adapter or all weights.
        checkpoint_steps: steps between two checkpoints, from which a killed training goes on; 0 for none.

    Raises:
        InputError: an option is out of its range, or would be ignored.
    """

    template: str | None = None
    objectives: tuple[str, ...] | None = None
    identity: float = 0.2
    identity_epochs: float = 1.0
    identity_learning_rate: float | None = None
    learning_rate: float | None = None
    epochs: float = 3.0
    batch_size: int = 32
    max_length: int | None = None
    tokens_per_batch: int = TOKENS_PER_BATCH
    checkpointing: Checkpointing = "auto"
    warmup: float = 0.03
    lora_rank: int = 0
    lora_alpha: float | None = None
    precision: PrecisionChoice = "auto"
    checkpoint_steps: int = 200

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "tokens_per_batch": 1, "max_length": SHORTEST_MAX_LENGTH, "lora_rank": 0}
        for name, smallest in {**least, "checkpoint_steps": 0}.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise InputError(f"{name} must be at least {smallest}, found {value}")
        for name in ("learning_rate", "epochs", "identity_learning_rate", "identity_epochs", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be a finite number above 0, found {value}")
        for name in ("identity", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be between 0 and 1, found {getattr(self, name)}")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise InputError(f"precision must be auto, fp32 or bf16, found {self.precision!r}")
        check_checkpointing(self.checkpointing)
        if self.lora_alpha is not None and not self.lora_rank:
            raise InputError("lora_alpha belongs to an adapter: set lora_rank too, or leave it out")

    @property
    def alpha(self) -> float:
        """LoRA's α in use."""
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    def stage(self, warming_up: bool) -> StageOptions:
        """Return how a stage is optimised."""
        rate = self.learning_rate or (LORA_LEARNING_RATE if self.lora_rank else LEARNING_RATE)
        return StageOptions(
            learning_rate=(self.identity_learning_rate or rate) if warming_up else rate,
            epochs=self.identity_epochs if warming_up else self.epochs,
            batch_size=self.batch_size,
            tokens_per_batch=self.tokens_per_batch,
            checkpointing=self.checkpointing,
            warmup=self.warmup,
            checkpoint_steps=self.checkpoint_steps,
        )
