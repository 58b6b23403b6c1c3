"""Sequential fine-tuning: one adapter goes through all tasks, nothing guards the earlier ones."""

from everalign.methods.base import Method


class SequentialFineTuning(Method):
    """Train the same adapter on task after task: the control that shows how much there is to forget."""

    name = "seqft"
