"""Labelled experts: an adapter for each label, such as a customer, a product or a locale."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from everalign.methods.base import Method, ModuleRecord, Task
from everalign.modeling.policy import Policy

Factors = Mapping[str, tuple[Tensor, Tensor]]


class LabelledExperts(Method):
    """Keeps an adapter for each label and trains it on the tasks of that label alone.

    For tasks that contradict each other and whose prompts come with a label: nothing that one label teaches can change
    what the model answers to another. A label's first task starts from the base model, a later one from the label's
    adapter, and each adapter is, bit for bit, what sequential fine-tuning makes of its label's tasks alone.

    Adapters share nothing but the base model. A part that all labels train would change what earlier ones have
    learned; one that is frozen can be had by starting from a model, or from an adapter, that has learned it before.
    """

    name = "experts"
    labelled = True

    def __init__(self) -> None:
        self._adapters: dict[str | None, Factors] = {}

    def begin_task(self, policy: Policy, task: Task) -> None:
        """Makes the policy the one of the task's label."""
        self._use(policy, task.label)

    def end_task(self, policy: Policy, task: Task) -> list[ModuleRecord]:
        """Keeps the adapter."""
        self.adopt(policy, task.label)
        return []

    def adopt(self, policy: Policy, label: str | None) -> None:
        """Takes the policy as it is now as the label's."""
        self._adapters[label] = policy.factors()

    @contextmanager
    def answering(self, policy: Policy, label: str | None) -> Iterator[None]:
        """Makes the policy the label's inside the `with` block: the base model where nothing of it was learned yet."""
        before = policy.factors()
        self._use(policy, label)
        try:
            yield
        finally:
            policy.write_factors(before)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Forgets all adapters: the run's versions hold them, and `adopt` is called with each."""
        self._adapters = {}

    def _use(self, policy: Policy, label: str | None) -> None:
        known = self._adapters.get(label)
        if known is None:
            policy.start_short_term(policy.seed)
        else:
            policy.write_factors(known)
