"""Exceptions of Everalign. Every message names the file, line or field, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class EveralignError(Exception):
    """Something failed that the user can act on; `exit_code` is what the command line returns for it."""

    exit_code = 1


class InputError(EveralignError, ValueError):
    """The user's input (a file, a flag, a recipe) is wrong: exit code 2.

    Args:
        message: the whole sentence, which `str()` gives.
        where: the place, such as `pairs.jsonl:7` or `pairs.csv: row 7`.
        field: the column, flag or key that is wrong.
        hint: what to do about it.
    """

    exit_code = 2

    def __init__(
        self, message: str, *, where: str | None = None, field: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.where, self.field, self.hint = where, field, hint

    def at(self, where: str) -> Self:
        """Returns the same error with its place in front of the message."""
        place = where if self.where is None else f"{where}: {self.where}"
        return type(self)(f"{where}: {self}", where=place, field=self.field, hint=self.hint)


class NondeterministicError(EveralignError):
    """Under `deterministic` something was to be computed that has no deterministic version."""


@contextmanager
def naming_nondeterministic() -> Iterator[None]:
    """Turns what torch says of an operation without a deterministic version into a `NondeterministicError`."""
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if found is None:
            raise
        raise NondeterministicError(
            f"deterministic: torch has no deterministic version of {found[1]} on this device: leave deterministic out, "
            "or whatever needs this operation"
        ) from error


class DivergedError(EveralignError):
    """Training left NaN or infinite values; it would do so again."""


def not_installed(what: str, package: str, extras: str) -> InputError:
    """Returns the error for a missing package that one of our extras installs."""
    return InputError(f"{what} needs {package}, which is not installed: pip install 'everalign[{extras}]'")


def system_error(error: OSError, named: bool = True) -> str:
    """Returns what the system says, without its number: `run/x: permission denied`.

    Args:
        error: a failed call of the system.
        named: whether to begin with the file.
    """
    if error.errno is None or error.strerror is None:
        return str(error)
    files = [str(name) for name in (error.filename, error.filename2) if name is not None] if named else []
    reason = error.strerror[:1].lower() + error.strerror[1:]
    return f"{' and '.join(files)}{': ' if files else ''}{reason}"


@contextmanager
def located(where: str) -> Iterator[None]:
    """Puts a place in front of the message of every `InputError` raised inside."""
    try:
        yield
    except InputError as error:
        raise error.at(where) from error.__cause__


class GateRefusedError(EveralignError):
    """The gate refused a finished task: exit code 3. The version before it stays current.

    Args:
        message: which scores fell, and what to do.
        version: the refused version, which stays on disk.
        fell: held-out accuracy (a share) before and after, by task.
    """

    exit_code = 3

    def __init__(self, message: str, version: str, fell: Mapping[str, tuple[float, float]]) -> None:
        super().__init__(message)
        self.version, self.fell = version, fell


class NotEnoughEvidenceError(GateRefusedError):
    """The held-out rows are too few to show whether a finished task does harm: exit code 4."""

    exit_code = 4


WARN_ABOVE = 0.1
"""Share of lost rows above which a warning is given."""

REFUSE_ABOVE = 0.5
"""Share of lost rows above which training is refused."""


class ShortfallError(InputError):
    """More than half of the given rows cannot be used."""


def check_shortfall(lost: int, total: int, what: str, remedy: str, *, refuse: bool = True) -> tuple[str, ...]:
    """Returns a warning if more than a tenth is lost, else nothing.

    Args:
        lost: number of rows, answers or tokens lost.
        total: number given.
        what: what was lost and why, for "12 of 40 WHAT".
        remedy: what to do about it; names the flag.
        refuse: raise if more than half is lost. False where the rest is as good as before.

    Raises:
        ShortfallError: more than half is lost.
    """
    if refuse and lost > REFUSE_ABOVE * total:
        raise ShortfallError(f"{lost} of {total} {what}, more than half: {remedy}")
    return (f"{lost} of {total} {what}: {remedy}",) if lost > WARN_ABOVE * total else ()
