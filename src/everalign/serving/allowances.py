"""What each key may use: requests in a minute, tokens in a day; counted by this process, from its start on."""

import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from everalign.serving.auth import Allowance
from everalign.serving.errors import GatewayError, overloaded

_DAY = 86400
_BYTES_PER_TOKEN = 4
_TAIL = 64 << 10  # bytes at the end of a reply, where its usage stands
_TOLD = re.compile(rb'(?<!\\)"total_tokens"\s{0,9}:\s{0,9}(\d{1,12})')


@dataclass
class _Used:
    """What a key has used: requests that it may begin now, since when, and the tokens of a day."""

    left: float
    since: float
    day: int = 0
    tokens: int = 0


class Allowances:
    """Counts what keys use, and turns away those that have used enough. Used in one event loop.

    Args:
        of_key: what one key may use, if anything is said of it.
        usual: what others may.
        clock: seconds that only grow.
        now: seconds since 1970.
    """

    def __init__(
        self,
        of_key: Callable[[str], Allowance | None],
        usual: Allowance,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._of_key, self._usual, self._clock, self._now = of_key, usual, clock, now
        self._used: dict[str, _Used] = {}

    def of(self, key_id: str) -> Allowance:
        """Return what a key may use."""
        return self._of_key(key_id) or self._usual

    def enter(self, key_id: str) -> None:
        """Count a request; raises GatewayError 429 for a key that has used up what it may."""
        allowance = self.of(key_id)
        if allowance.requests_per_minute is None and allowance.tokens_per_day is None:
            return
        used = self._of_today(key_id, allowance)
        if allowance.tokens_per_day is not None and used.tokens >= allowance.tokens_per_day:
            message = (
                f"this key has used its {allowance.tokens_per_day} tokens of today; there are more after midnight UTC"
            )
            wait = _DAY - self._now() % _DAY
            advice = {"retry-after": f"{round(wait) + 1}", "x-should-retry": "false"}
            raise GatewayError(429, message, "insufficient_quota", "insufficient_quota", headers=advice)
        if allowance.requests_per_minute is None:
            return
        now, most = self._clock(), float(allowance.requests_per_minute)
        used.left, used.since = min(most, used.left + (now - used.since) * most / 60), now
        if used.left < 1:
            message = f"this key may begin {allowance.requests_per_minute} requests a minute"
            raise overloaded(message, "rate_limit_exceeded", (1 - used.left) * 60 / most)
        used.left -= 1

    def counts_tokens(self, key_id: str) -> bool:
        """Whether a key's tokens are limited."""
        return self.of(key_id).tokens_per_day is not None

    def spend(self, key_id: str, tokens: int) -> None:
        """Count tokens."""
        if self.counts_tokens(key_id):
            self._of_today(key_id, self.of(key_id)).tokens += tokens

    async def metered(self, key_id: str, parts: AsyncIterator[bytes], sent: int) -> AsyncIterator[bytes]:
        """Yield a reply that is passed on, and count the tokens that it tells of; else its bytes, and those `sent`."""
        tail, size = b"", sent
        try:
            async for part in parts:
                tail, size = (tail + part)[-_TAIL:], size + len(part)
                yield part
        finally:
            told = _TOLD.findall(tail)
            self.spend(key_id, int(told[-1]) if told else size // _BYTES_PER_TOKEN)

    def _of_today(self, key_id: str, allowance: Allowance) -> _Used:
        used = self._used.get(key_id)
        if used is None:
            used = self._used[key_id] = _Used(float(allowance.requests_per_minute or 0), self._clock())
        day = int(self._now() // _DAY)
        if used.day != day:
            used.day, used.tokens = day, 0
        return used


def tokens_of(usage: Any, characters: int) -> int:
    """Return the tokens of a usage; where none is told, what so many characters come to."""
    told = usage.get("total_tokens") if isinstance(usage, Mapping) else None
    return told if isinstance(told, int) and told >= 0 else characters // _BYTES_PER_TOKEN
