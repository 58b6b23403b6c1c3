"""What is said where a package is missing that only some need."""

from everalign.errors import InputError


def not_installed(what: str, package: str, extras: str) -> InputError:
    """Return the error for a package that an extra of ours would have brought."""
    return InputError(f"{what} needs {package}, which is not installed: pip install 'everalign[{extras}]'")
