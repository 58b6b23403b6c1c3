"""Reloads a run's corrector: whenever another version is promoted, it replaces the former one in service.

    reloader = CorrectorReloader(Path("runs/corrector"), load)
    corrector, version = reloader.load()
    await reloader.run(service)     # until it is cancelled

Versions are exported once, into the run's folder `serving`; one that cannot be loaded leaves the former one in service.
A run that is rolled back to its base model has no corrector: answers are returned uncorrected, or not at all.
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
"""Default time between two polls of a run."""

OnRollback = Literal["uncorrected", "stop"]
"""What happens to answers while the base model is current: they are returned as they are, or fail."""

_REASONS = {"uncorrected": "rolled_back", "stop": "stopped"}
_FOLDER = "serving"
_log = logging.getLogger(__name__)


class CorrectorReloader:
    """The version of a run's corrector that is in service.

    Every few `seconds` the run is polled. `load` loads a corrector from its folder; `log` gets a line when another
    version is in service, or could not be loaded.

    Raises:
        InputError: it is no run, it learned no corrections, or no version of it was ever promoted.
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
                f"{path}: learns {run.facts.objective}, so it is not a corrector: serve its export as the upstream "
                "(everalign export, then transformers serve or vLLM)"
            )
        if any(version.manifest.label is not None for version in run.all_versions):
            raise InputError(
                f"{path}: keeps a corrector for each label: export the one to serve "
                f"(everalign export {path} DIR --label LABEL), and give that folder as the corrector"
            )
        if all(version.refused for version in run.all_versions):
            raise InputError(f"{path}: no version of it is promoted: learn corrections first")
        self.path = path
        self._on_rollback: OnRollback = on_rollback
        self._load, self._seconds, self._log = load, seconds, log
        self._served: str | None = None
        self._refused: str | None = None

    def current(self) -> str:
        """Return the promoted version's name."""
        return (self.path / "current").read_text(encoding="utf-8").strip()

    def load(self) -> tuple["Corrector", str]:
        """Return the promoted version's corrector and name; blocks while it is exported and loaded."""
        from everalign.learning.export import export_version
        from everalign.learning.run_data import load_run

        version = self.current()
        folder = self.path / _FOLDER / version
        folder.parent.mkdir(exist_ok=True)
        # Another gateway may serve the same run.
        with FileLock(folder.parent / ".lock"):
            if not folder.exists():
                export_version(load_run(self.path), folder, version)
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

    async def run(self, service: "CorrectionService") -> None:
        """Swap the corrector in service whenever another version is promoted, until cancelled.

        Answers under way are finished by the corrector that they came to.
        """
        effects = {"uncorrected": "answers are given uncorrected", "stop": "no answers are given"}
        while True:
            await asyncio.sleep(self._seconds)
            name = None
            try:
                name = self.current()
                if name in (self._served, self._refused):
                    continue
                if self.is_rolled_back:
                    self.withdraw(service)
                    effect = effects[self._on_rollback]
                    self._log(f"{name} is current, the base model, which corrects nothing: {effect}")
                    continue
                corrector, version = await asyncio.to_thread(self.load)
            except (EveralignError, OSError) as error:
                # Logged once: the former version goes on until another one is promoted.
                if name is None or name != self._refused:
                    self._log(f"{name or self.path} cannot be served, {self._served} goes on: {error}")
                self._refused = name
                continue
            service.swap(corrector, version)
            self._log(f"{version} is in service")
