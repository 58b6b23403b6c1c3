"""What Everalign raises on purpose. Every message names the file, line or field and what to do about it."""


class EveralignError(Exception):
    """Something failed that the user can act on; `exit_code` is what the command line returns for it."""

    exit_code = 1


class InputError(EveralignError, ValueError):
    """The user's input (a file, a flag, a recipe) is wrong: exit code 2."""

    exit_code = 2
