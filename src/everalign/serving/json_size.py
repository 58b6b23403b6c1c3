"""How long it takes to read JSON, told before it is read: by its values, not by its bytes.

A picture of thirty megabytes is one value and read in an instant; as many bytes of empty lists take seconds, in which
no other request is answered.
"""

import re
from collections.abc import Callable
from typing import TypeVar

import anyio.to_thread

MOST_VALUES = 500_000
"""Values of one body: a fifth of a second for the slowest kind."""

AT_ONCE = 64 << 10
"""Bytes that are read in the event loop; more of them are read in a thread."""

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_SIGNS = (b",", b"[", b"{")

Result = TypeVar("Result")


def too_many_values(content: bytes) -> bool:
    """Whether JSON in UTF-8 has more than `MOST_VALUES` values; takes time that grows with its length and no faster."""
    if sum(map(content.count, _SIGNS)) <= MOST_VALUES:
        return False
    # Most may stand in texts: only what is between these counts.
    values = end = 0
    for string in _STRING.finditer(content):
        values += sum(content.count(sign, end, string.start()) for sign in _SIGNS)
        end = string.end()
        if values > MOST_VALUES:
            return True
    return values + sum(content.count(sign, end) for sign in _SIGNS) > MOST_VALUES


async def aside(content: bytes, read: Callable[[], Result]) -> Result:
    """Return what `read` makes of a body; in a thread where that may take long."""
    return read() if len(content) <= AT_ONCE else await anyio.to_thread.run_sync(read)
