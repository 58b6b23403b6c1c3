"""What the verbs print: results on standard output, everything else on standard error."""

import json
import sys
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

# Lines in a file or a pipe are not wrapped: what reads them wants whole ones.
_WIDEST = 10_000

# Standard error: announcements, progress, warnings, errors. Lines are left to the terminal to wrap.
notes = Console(stderr=True, soft_wrap=True, highlight=False)


def say(label: str, message: str, style: str) -> None:
    """Print `label: message` on standard error, the label in a style."""
    notes.print(Text.assemble((f"{label}:", style), f" {message}"))


def show(*results: RenderableType) -> None:
    """Print tables and texts on standard output; where that is no terminal, as wide as they are."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDEST)
    for result in results:
        console.print(result)


def has_colours() -> bool:
    """Whether what is printed on standard output can be told apart by colours."""
    console = Console()
    return console.color_system is not None and not console.no_color


def show_line(label: str, value: object) -> None:
    """Print a label and a value on one line, however long: a path stays in one piece, to be copied."""
    Console(highlight=False, soft_wrap=True).print(Text.assemble((f"{label:<8}", "dim"), str(value)))


def show_yaml(value: dict[str, Any]) -> None:
    """Print a YAML document on standard output."""
    import yaml

    print(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), end="")


def show_json(value: dict[str, Any]) -> None:
    """Print one JSON object on standard output."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
    print()
