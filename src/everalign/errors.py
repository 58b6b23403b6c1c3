"""Errors that Everalign raises on purpose; every message names the file, line or field and what to do about it."""

from collections.abc import Mapping


class EveralignError(Exception):
    """Something failed that the user can act on; `exit_code` is what the command line returns for it."""

    exit_code = 1


class InputError(EveralignError, ValueError):
    """The user's input (a file, a flag, a recipe) is wrong: exit code 2."""

    exit_code = 2


class GateRefusedError(EveralignError):
    """A finished task was refused by the gate: exit code 3. What was learned before it stays current.

    Args:
        message: what fell, and what to do.
        version: the refused version, which stays on disk.
        fell: held-out accuracy (a share) before and after, by task.
    """

    exit_code = 3

    def __init__(self, message: str, version: str, fell: Mapping[str, tuple[float, float]]) -> None:
        super().__init__(message)
        self.version, self.fell = version, fell


class NotEnoughEvidenceError(GateRefusedError):
    """A finished task was neither shown to be harmless nor harmful by its held-out rows: exit code 4."""

    exit_code = 4


WARN_ABOVE = 0.1
"""Share that may be lost without a word, beyond what is logged anyway."""

REFUSE_ABOVE = 0.5
"""Share above which nothing is learned."""


class ShortfallError(InputError):
    """More than half of what was given is lost on the way."""


def check_shortfall(lost: int, total: int, what: str, remedy: str, *, refuse: bool = True) -> tuple[str, ...]:
    """Return a warning if more than a tenth is lost, else nothing.

    Args:
        lost: how many.
        total: of how many.
        what: what they are and what became of them, as in "12 of 40 WHAT".
        remedy: what to do about it; names the flag.
        refuse: whether more than half is an error; where the rest is still as good as it was, it is not.

    Raises:
        ShortfallError: more than half is lost.
    """
    if refuse and lost > REFUSE_ABOVE * total:
        raise ShortfallError(f"{lost} of {total} {what}, more than half: {remedy}")
    return (f"{lost} of {total} {what}: {remedy}",) if lost > WARN_ABOVE * total else ()
