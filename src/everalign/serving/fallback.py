"""An upstream as requests see it: with the one that answers in its place, and with what keys use counted."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

from everalign.serving.completion_json import without_usage
from everalign.serving.errors import GatewayError, UsageRefused
from everalign.serving.limits import Allowances, tokens_of
from everalign.serving.sse import json_bytes
from everalign.serving.upstream import Answered, Asked, Passed, Streamed, Upstream
from everalign.serving.upstream_transport import Circuits

# The time that there is for an answer is over when an upstream has taken all of it.
_AWAY = ("upstream_unreachable", "upstream_unavailable", "upstream_cut", "upstream_malformed", "upstream_auth")


class Answering:
    """Answers.

    Args:
        first: who is asked.
        allowances: count what keys use.
        fallback: is asked where the first one is away or fails before its answer begins; None for nobody.
        fallback_model: what that one calls the model; None for the same name.
    """

    def __init__(
        self,
        first: Upstream,
        allowances: Allowances,
        fallback: Upstream | None = None,
        fallback_model: str | None = None,
    ) -> None:
        self._first, self._allowances = first, allowances
        self._fallback, self._fallback_model = fallback, fallback_model
        self.send = first.send
        self.models = first.models
        self.close = first.close

    @property
    def name(self) -> str:
        """What it is called."""
        return self._first.name

    @property
    def circuits(self) -> Circuits:
        """Those of who is asked first."""
        return self._first.circuits

    @property
    def reports_usage(self) -> bool:
        """Whether a stream can be asked for its usage."""
        return self._first.reports_usage

    @reports_usage.setter
    def reports_usage(self, known: bool) -> None:
        self._first.reports_usage = known

    async def chat(self, asked: Asked) -> Answered:
        """Return a whole answer; errors as `Upstream.chat`."""
        try:
            answered = await self._first.chat(asked)
        except GatewayError as error:
            if self._fallback is None or not _is_away(error):
                raise
            answered = _by_fallback(await self._fallback.chat(self._asked_instead(asked)))
        if self._allowances.counts_tokens(asked.key_id):
            size = len(json_bytes(asked.payload)) + len(json_bytes(answered.body))
            self._allowances.spend(asked.key_id, tokens_of(answered.body.get("usage"), size))
        return answered

    @asynccontextmanager
    async def stream(self, asked: Asked) -> AsyncIterator[Streamed]:
        """Open a streamed answer; errors as `Upstream.stream`."""
        counts = self._allowances.counts_tokens(asked.key_id)
        adds = counts and self.reports_usage and _lacks_usage(asked)
        async with AsyncExitStack() as stack:
            try:
                streamed = await stack.enter_async_context(self._first.stream(_with_usage(asked) if adds else asked))
            except UsageRefused:
                if not adds:
                    raise
                self.reports_usage = adds = False
                streamed = await stack.enter_async_context(self._first.stream(asked))
            except GatewayError as error:
                if self._fallback is None or not _is_away(error):
                    raise
                adds = False
                instead = self._fallback.stream(self._asked_instead(asked))
                streamed = _by_fallback(await stack.enter_async_context(instead))
            yield replace(streamed, events=self._counted(asked, streamed.events, adds)) if counts else streamed

    async def _counted(
        self, asked: Asked, events: AsyncIterator[list[dict[str, Any]]], drops: bool
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield events, and count their tokens when they end, however that comes."""
        usage, size = None, len(json_bytes(asked.payload))
        try:
            async for some in events:
                for event in some:
                    response = event.get("response")
                    told = event.get("usage") or (response.get("usage") if isinstance(response, dict) else None)
                    usage = told or usage
                    size += len(json_bytes(event.get("choices") or event.get("delta") or ""))
                kept = [without_usage(event) for event in some] if drops else some
                if left := [event for event in kept if event is not None]:
                    yield left
        finally:
            self._allowances.spend(asked.key_id, tokens_of(usage, size))

    def _asked_instead(self, asked: Asked) -> Asked:
        if self._fallback_model is None or asked.payload is None:
            return asked
        payload = {**asked.payload, "model": self._fallback_model}
        return replace(asked, payload=payload, model=self._fallback_model)


def _is_away(error: GatewayError) -> bool:
    return error.code != "upstream_timeout" and (error.code in _AWAY or error.status >= 500)


def _by_fallback(found: Any) -> Any:
    return replace(found, headers={**found.headers, "x-everalign-upstream": "fallback"})


def _lacks_usage(asked: Asked) -> bool:
    options = (asked.payload or {}).get("stream_options")
    told = isinstance(options, Mapping) and options.get("include_usage")
    return asked.path == "chat/completions" and not told


def _with_usage(asked: Asked) -> Asked:
    payload = asked.payload or {}
    options = payload.get("stream_options")
    known = options if isinstance(options, Mapping) else {}
    return replace(asked, payload={**payload, "stream_options": {**known, "include_usage": True}})


__all__ = ["Answering", "Passed"]
