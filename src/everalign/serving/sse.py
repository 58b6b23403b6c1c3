"""Server-sent events, as chat completions are streamed: bytes to data, and data to bytes.

The parser follows https://html.spec.whatwg.org/multipage/server-sent-events.html: lines end with CR, LF or CRLF,
wherever the network cuts them; lines that begin with a colon are comments; several `data` lines are one text. An event
that the stream's end cuts off is none.
"""

import json
import re
from typing import Any

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
"""A comment, which clients skip and which keeps connections from being closed as idle."""

LARGEST_EVENT = 4 << 20  # bytes

_LINE_END = re.compile(rb"\r\n|\r|\n")
_BOM = b"\xef\xbb\xbf"


class BrokenEvents(Exception):  # noqa: N818 (what is wrong is in the name)
    """The bytes are no events that could be used."""


class EventParser:
    """Takes bytes as they come and returns the data of the events that are whole.

    Args:
        largest: bytes of an event, from where on it is refused.
    """

    def __init__(self, largest: int = LARGEST_EVENT) -> None:
        self._largest = largest
        self._line = bytearray()  # the beginning of a line whose end has not come
        self._data: list[bytes] = []
        self._size = 0
        self._after_return = self._begun = False

    def feed(self, chunk: bytes) -> list[str]:
        """Return the data of each event that ends in these bytes; raises BrokenEvents."""
        if not chunk:
            return []
        # A CR that ended the last bytes ended its line; an LF that follows belongs to it.
        chunk, self._after_return = chunk.removeprefix(b"\n") if self._after_return else chunk, chunk.endswith(b"\r")
        first, *others = _LINE_END.split(chunk)
        self._line += first
        self._check(len(self._line))
        found: list[str] = []
        for following in others:
            self._end_line(found)
            self._line = bytearray(following)
        self._check(len(self._line))
        return found

    def _end_line(self, found: list[str]) -> None:
        line = bytes(self._line)
        if not self._begun:
            line, self._begun = line.removeprefix(_BOM), True
        if not line:
            if self._data:
                found.append(_text(b"\n".join(self._data)))
            self._data, self._size = [], 0
        elif line.startswith(b"data:"):
            self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            self._size += len(line)
            self._check(0)
        elif line == b"data":
            self._data.append(b"")

    def _check(self, more: int) -> None:
        if self._size + more > self._largest:
            raise BrokenEvents(f"an event is larger than {self._largest} bytes")


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BrokenEvents("an event is no UTF-8") from None


def json_bytes(value: Any) -> bytes:
    """Return JSON in ASCII: UTF-8 has no bytes for the halves of surrogate pairs that models write."""
    return json.dumps(value, separators=(",", ":")).encode()


def data_frame(value: Any) -> bytes:
    """Return one event."""
    return b"data: " + json_bytes(value) + b"\n\n"
