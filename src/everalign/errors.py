"""What Everalign raises on purpose. Every message names the file, line or field and what to do about it."""

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
