"""The line of versions that a learner goes on from: the current one and its parents."""

import copy

from everalign.errors import InputError
from everalign.learning.run import RunDirectory
from everalign.learning.run_data import BASE
from everalign.learning.setup import Setup


class Line:
    """What a learner has in memory of its run's line; begins the run, or takes up what its current version had learned.

    Args:
        setup: the learner's parts.
        run: where versions are.

    Attributes:
        versions: the line's versions by task, oldest first.

    Raises:
        InputError: the run was begun with other settings, or a file of its current version is missing or changed.
    """

    def __init__(self, setup: Setup, run: RunDirectory) -> None:
        self._setup, self._run = setup, run
        self._at_first = copy.deepcopy(setup.method.state_dict())
        self.versions: dict[str, str] = {}
        if not run.exists:
            run.begin(setup.facts())
            return
        found = run.data
        run.check_same(setup.facts())
        run.settle(found)
        self.restore()

    @property
    def tip(self) -> str:
        """The version that learning goes on from; "000" for the base model."""
        return [BASE, *self.versions.values()][-1]

    def restore(self) -> None:
        """Bring policy and method to where the version left them that is current on disk."""
        found = self._run.data
        self._run.restore(found.tip, self._setup.policy, self._setup.method, self._setup.seed, self._at_first)
        self.versions = {version.task: version.id for version in found.versions}

    def check_up_to_date(self) -> None:
        """Refuse to go on where another learner, or a rollback, has changed the line on disk."""
        if [version.id for version in self._run.data.versions] != list(self.versions.values()):
            raise InputError(f"{self._run.path} was continued by another learner: open it again, with resume")
