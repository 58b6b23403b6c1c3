"""A run's promoted corrector in service: whenever another version becomes current, it takes the former one's place.

    followed = CorrectorReloader(Path("runs/corrector"), load)
    corrector, version = followed.load()
    await followed.follow(service)     # until it is cancelled

Versions are exported once, into the run's folder `serving`; one that cannot be loaded leaves the former one at work.
A run that is rolled back to its base model has no corrector: answers go out as they are, or not at all.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from filelock import FileLock

from everalign.errors import EveralignError, InputError

if TYPE_CHECKING:
    from everalign.correction.corrector import Corrector
    from everalign.serving.corrector_service import CorrectionService

SECONDS = 2.0
"""How often a run is looked at, unless something else is said."""

OnRollback = Literal["uncorrected", "stop"]
"""What becomes of answers while the base model is current: given as they are, or an error."""

_REASONS = {"uncorrected": "rolled_back", "stop": "stopped"}
_FOLDER = "serving"
_log = logging.getLogger(__name__)


def is_run(name: str) -> bool:
    """Whether a corrector's name is that of a run directory."""
    return (Path(name) / "run.json").is_file()


class CorrectorReloader:
    """A run that has learned corrections, and the version of it that is in service.

    Args:
        path: the run directory.
        load: loads an exported corrector's folder.
        on_rollback: what becomes of answers while the run is rolled back to its base model.
        seconds: between two looks at the run.
        log: called with one line whenever another version is in service, or could not be.

    Raises:
        InputError: it is no run, it has learned no corrections, or none of its versions was ever promoted.
    """

    def __init__(
        self,
        path: Path,
        load: Callable[[Path], "Corrector"],
        on_rollback: OnRollback = "uncorrected",
        seconds: float = SECONDS,
        log: Callable[[str], None] = _log.warning,
    ) -> None:
        from everalign.learning.run_data import load_run

        if on_rollback not in get_args(OnRollback):
            raise InputError(f"on-rollback: must be uncorrected or stop, found {on_rollback!r}")
        run = load_run(path)
        if run.facts.objective != "correction":
            raise InputError(
                f"{path}: learns {run.facts.objective}, so it is no corrector: serve its export as the upstream "
                "(everalign export, then transformers serve or vLLM)"
            )
        if all(version.refused for version in run.everything):
            raise InputError(f"{path}: no version of it is promoted: learn corrections first")
        self._on_rollback: OnRollback = on_rollback
        self._path, self._load, self._seconds, self._announce = path, load, seconds, log
        self._served: str | None = None
        self._refused: str | None = None

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._path

    def current(self) -> str:
        """Return the promoted version's name."""
        return (self._path / "current").read_text(encoding="utf-8").strip()

    def load(self) -> tuple["Corrector", str]:
        """Return the promoted version's corrector and its name; blocks while it is exported and loaded."""
        from everalign.learning.export import export_version
        from everalign.learning.run_data import load_run

        version = self.current()
        folder = self._path / _FOLDER / version
        folder.parent.mkdir(exist_ok=True)
        # Another gateway may serve the same run.
        with FileLock(folder.parent / ".lock"):
            if not folder.exists():
                export_version(load_run(self._path), folder, version)
        found = self._load(folder)
        self._served = version
        return found, version

    @property
    def is_rolled_back(self) -> bool:
        """Whether the base model is current, which corrects nothing."""
        from everalign.learning.run_data import BASE

        return self.current() == BASE

    def withdraw(self, service: "CorrectionService") -> None:
        """Take the corrector out of service, because the run is rolled back to its base model."""
        self._served = self.current()
        service.withdraw(self._served, _REASONS[self._on_rollback])

    async def follow(self, service: "CorrectionService") -> None:
        """Exchange the corrector in service whenever another version is promoted, until cancelled.

        Requests under way are finished by the corrector that they came to.
        """
        while True:
            await asyncio.sleep(self._seconds)
            await self._look(service)

    async def _look(self, service: "CorrectionService") -> None:
        name = None
        try:
            name = self.current()
            if name in (self._served, self._refused):
                return
            if self.is_rolled_back:
                self.withdraw(service)
                told = "answers are given uncorrected" if self._on_rollback == "uncorrected" else "no answers are given"
                self._announce(f"{name} is current, the base model, which corrects nothing: {told}")
                return
            corrector, version = await asyncio.to_thread(self.load)
        except (EveralignError, OSError) as error:
            # Told once: the former version goes on until another one is promoted.
            if name is None or name != self._refused:
                self._announce(f"{name or self._path} cannot be served, {self._served} goes on: {error}")
            self._refused = name
            return
        service.swap(corrector, version)
        self._announce(f"{version} is in service")
