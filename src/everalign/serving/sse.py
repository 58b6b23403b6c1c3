"""Server-sent events, as OpenAI's streams use them: a parser, and frames; and the gateway's strict JSON.

The parser follows https://html.spec.whatwg.org/multipage/server-sent-events.html: lines end with CR, LF or CRLF,
wherever the network cuts them; lines that begin with a colon are comments; several `data` lines are one text. An event
that the end of the stream cuts off is dropped.
"""

import json
import re
from typing import Any

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
"""A comment, which clients skip; it keeps proxies from closing an idle connection."""

LARGEST_EVENT = 4 << 20  # bytes

_LINE_END = re.compile(rb"\r\n|\r|\n")
_BOM = b"\xef\xbb\xbf"


class BrokenEvents(Exception):  # noqa: N818 (the name says what is wrong)
    """The bytes are no usable events."""


class EventParser:
    """Turns bytes, cut anywhere, into the data of whole events, of at most `largest` bytes each."""

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
        self._check_size()
        events: list[str] = []
        for following in others:
            line, self._line = bytes(self._line), bytearray(following)
            if not self._begun:
                line, self._begun = line.removeprefix(_BOM), True
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
                self._size += len(line)
                self._check_size()
            elif line == b"data":
                self._data.append(b"")
            elif not line:
                if self._data:
                    try:
                        events.append(b"\n".join(self._data).decode())
                    except UnicodeDecodeError:
                        raise BrokenEvents("an event is not UTF-8") from None
                self._data, self._size = [], 0
        self._check_size()
        return events

    def _check_size(self) -> None:
        if self._size + len(self._line) > self._largest:
            raise BrokenEvents(f"an event is larger than {self._largest} bytes")


def _refuse(constant: str) -> float:
    raise ValueError(constant)


# Made once: `json.loads` and `json.dumps` make a new one for each call with such arguments.
_DECODER = json.JSONDecoder(parse_constant=_refuse)
_ENCODER = json.JSONEncoder(separators=(",", ":"))


def strict_json(content: bytes | str) -> Any:
    """Return parsed JSON; raises ValueError for anything else, NaN, infinities and deep nesting among it."""
    text = content.decode(json.detect_encoding(content), "surrogatepass") if isinstance(content, bytes) else content
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_bytes(value: Any) -> bytes:
    """Return JSON in ASCII: UTF-8 cannot encode the halves of surrogate pairs that models write."""
    return _ENCODER.encode(value).encode()


def data_frame(value: Any) -> bytes:
    return b"data: " + json_bytes(value) + b"\n\n"
