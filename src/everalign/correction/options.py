"""Options of correctors. Importing them loads nothing heavy."""

from pydantic import Field

from everalign.training.options import Epochs, FineTuningOptions, LearningRate, MaxLength, StageOptions


class CorrectorOptions(FineTuningOptions):
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
    epochs: Epochs = Field(default=3.0, description="Passes over the corrections; fractions allowed.")
    max_length: MaxLength | None = Field(
        default=None,
        description="Longest prompt plus correction, in tokens; 2,048 or the model's limit if not given.",
    )
    warmup: float = Field(
        default=0.03, ge=0, le=1, description="Share of a stage's steps for the learning-rate warm-up."
    )

    def stage(self, warming_up: bool) -> StageOptions:
        """Returns how a stage is optimised."""
        own = {
            "learning_rate": (self.identity_learning_rate or self.rate) if warming_up else self.rate,
            "epochs": self.identity_epochs if warming_up else self.epochs,
        }
        return StageOptions(**{**self.shared_with(StageOptions), **own})
