"""What one batch teaches: pure, un-reduced functions of small tensors, on top of torch alone."""

from everalign.objectives.likelihood import token_nll
from everalign.objectives.preference import dpo_loss, fpo_loss, implicit_margin

__all__ = ["dpo_loss", "fpo_loss", "implicit_margin", "token_nll"]
