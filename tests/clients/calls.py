"""What the clients in Python have in common."""

import json
import sys
from collections.abc import Callable
from typing import Any

WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def run(calls: Callable[[str, str], dict[str, Callable[[], Any]]]) -> None:
    """Make the calls against the server that the command line names, and print what each gave."""
    found = {name: call() for name, call in calls(*sys.argv[1:3]).items()}
    print(json.dumps(found, default=str, sort_keys=True))
