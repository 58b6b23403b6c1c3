"""Which version of a run is current: a finished one is promoted, or an earlier one is gone back to.

`current` is replaced in one step, so that a kill leaves the version before or the version after, and nothing between.
"""

import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from everalign.errors import InputError
from everalign.files import differing_files, write_text
from everalign.learning.gate import what_fell
from everalign.learning.run_data import BASE, RunData, VersionData, check_is_run, load_run, work_folder
from everalign.storage import alone

LOCK = ".lock"


@dataclass(frozen=True)
class Rollback:
    """What a rollback did.

    Args:
        before: the version that was current; "000" is the base model.
        current: the one that is now.
        left_out: versions that were in the line and are no longer.
        taken_back: versions that are in the line again.
    """

    before: str
    current: str
    left_out: tuple[str, ...]
    taken_back: tuple[str, ...]


def alone_in(run: Path) -> AbstractContextManager[None]:
    """Keep other processes from writing into a run for the while; may be nested.

    Raises:
        InputError: another one is at it, or there is a file of that name.
    """
    if run.exists() and not run.is_dir():
        raise InputError(f"{run} is no directory: choose another output directory")
    return alone(run / LOCK, "learning into this run")


def promote(path: Path, version: str) -> None:
    """Make a version, or the base model, current and drop the checkpoints of the task that led to it."""
    write_text(path / "current", version + "\n")
    shutil.rmtree(path / "work", ignore_errors=True)


def is_settled(run: RunData) -> bool:
    """Whether the newest version was promoted, or refused, to the end: a kill in between leaves its checkpoints."""
    return not run.everything or not work_folder(run.path, run.everything[-1].id).exists()


def rollback(path: Path, version: str | None = None, force: bool = False) -> Rollback:
    """Make an earlier version of a run current, or one that was rolled back.

    Args:
        path: the run directory.
        version: its folder's name or number, "000" for the base model; the current version's parent when None.
        force: take one that the gate refused.

    Raises:
        InputError: there is no such version, it is damaged or was refused by the gate, or another process is learning
            into the run.
    """
    check_is_run(path)
    with alone_in(path):
        return roll_back(load_run(path), version, force)


def roll_back(run: RunData, version: str | None, force: bool) -> Rollback:
    """As `rollback`, of a run whose lock is held."""
    if run.regime != "sequential":
        raise InputError(
            f"{run.path}: the versions of {run.facts.method.name} do not build on each other, so there is none to go "
            "back to: export the one you want"
        )
    target = _parent(run) if version is None else _named(run, version)
    if target is not None:
        _check(run, target, force)
    current = BASE if target is None else target.id
    # First of all: the interrupted task's checkpoints go on from the version that is being left, and those of a
    # version that a kill kept from being promoted would promote it after all.
    if (run.path / "work").exists():
        shutil.rmtree(run.path / "work")
    write_text(run.path / "current", current + "\n")
    before, after = ([version.id for version in line] for line in (run.versions, load_run(run.path).versions))
    return Rollback(
        before=run.tip,
        current=current,
        left_out=tuple(name for name in before if name not in after),
        taken_back=tuple(name for name in after if name not in before),
    )


def _parent(run: RunData) -> VersionData | None:
    """The version before the current one; None for the base model."""
    if not run.versions:
        raise InputError(f"{run.path}: the base model is current: there is nothing to roll back")
    return run.versions[-2] if len(run.versions) > 1 else None


def _named(run: RunData, name: str) -> VersionData | None:
    """The version of that name or number; None for the base model."""
    if name == BASE:
        return None
    found = [version for version in run.everything if name in (version.id, version.id.partition("-")[0])]
    if len(found) != 1:
        known = ", ".join([BASE, *(version.id for version in run.everything)])
        raise InputError(f"{run.path}: has no version {name!r}: choose one of {known}")
    return found[0]


def _check(run: RunData, version: VersionData, force: bool) -> None:
    """Refuse a damaged version, and one that the gate refused."""
    folder = run.path / "versions" / version.id
    check_version(folder, version.manifest.files)
    verdict = version.manifest.gate
    if verdict is not None and version.refused and not force:
        why = (
            "was not promoted for want of evidence"
            if verdict.outcome == "not enough evidence"
            else "was refused by the gate"
        )
        raise InputError(f"{version.id} {why} ({what_fell(verdict)}): force it, or choose another")


def check_version(folder: Path, files: dict[str, str]) -> None:
    """Refuse a version of which a file is not as its manifest lists it."""
    if wrong := differing_files(folder, files):
        raise InputError(f"{folder / wrong[0]}: missing or changed since it was written; restore the file")
