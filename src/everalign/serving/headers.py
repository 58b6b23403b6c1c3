"""Which headers cross the gateway, and the ones it adds.

Both ways by a list of what may cross: proxies, clouds and upstreams have ever new headers for credentials and
identities, of which a list of what may not would lack the next one. Operators add to the lists.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from everalign.errors import InputError

_REQUEST = re.compile(
    r"user-agent|accept-language|openai-beta|x-stainless-[a-z-]+|x-client-request-id|x-request-id|idempotency-key"
    r"|traceparent|tracestate|http-referer|x-title|prefer|anthropic-version|anthropic-beta|x-ms-client-request-id"
)
_REPLY = re.compile(
    r"x-request-id|request-id|openai-processing-ms|openai-version|openai-model|(x|anthropic)-ratelimit-[a-z0-9-]+"
    r"|ratelimit(-[a-z]+)?|retry-after(-ms)?|x-should-retry|traceresponse|apim-request-id|x-ms-request-id|server-timing"
)
# What only one side of the gateway may know, or what belongs to one connection; no operator can mean these.
_NEVER = re.compile(
    r"authorization|proxy-.*|(x-)?api-key|cookie2?|set-cookie2?|host|connection|keep-alive|te|trailer|upgrade|expect"
    r"|transfer-encoding|content-(length|type|encoding)|accept(-encoding)?|access-control-.*|x-everalign-.*"
)
_NAME = re.compile(r"[a-z0-9!#$%&'+.^_`|~-]+\*?")

STREAM_HEADERS = {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}
"""Proxies must neither keep nor gather nor compress what is streamed."""


@dataclass(frozen=True)
class HeaderRules:
    """What an operator lets cross besides the usual headers; names, of which a `*` at the end stands for any ending.

    Args:
        forward: headers of clients for the upstream.
        back: headers of the upstream for clients.
    """

    forward: tuple[str, ...] = ()
    back: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for flag, field in (("forward-header", "forward"), ("return-header", "back")):
            names = tuple(name.strip().lower() for name in getattr(self, field))
            for name in names:
                if not _NAME.fullmatch(name) or _NEVER.fullmatch(name.rstrip("*")) or name == "*":
                    raise InputError(
                        f"--{flag} {name}: must be a header's name, or its beginning and *, and none of those that "
                        "hold keys or cookies or belong to one connection"
                    )
            object.__setattr__(self, field, names)

    def forwarded(self, headers: Iterable[tuple[str, str]]) -> dict[str, str]:
        """Return the headers of a client that its upstream gets; names in small letters."""
        given = [(name.lower(), value) for name, value in headers]
        # What a Connection header names belongs to that connection.
        own = {word.strip().lower() for name, value in given if name == "connection" for word in value.split(",")}
        found: dict[str, str] = {}
        for name, value in given:
            if name not in own and _crosses(name, _REQUEST, self.forward):
                found[name] = f"{found[name]}, {value}" if name in found else value
        return found

    def returned(self, headers: Mapping[str, str], key: str) -> dict[str, str]:
        """Return the headers of an upstream that the client gets; none that holds the upstream's key."""
        found = ((name.lower(), value) for name, value in headers.items())
        return {
            name: value for name, value in found if _crosses(name, _REPLY, self.back) and not (key and key in value)
        }


def _crosses(name: str, usual: re.Pattern[str], added: tuple[str, ...]) -> bool:
    if usual.fullmatch(name):
        return True
    named = any(name.startswith(one[:-1]) if one.endswith("*") else name == one for one in added)
    return named and not _NEVER.fullmatch(name)


USUAL = HeaderRules()


def provenance(
    id: str,
    mode: str,
    outcome: str,
    reason: str | None,
    corrector: str | None,
    template: str | None,
    stored: bool | None = None,
) -> dict[str, str]:
    """Return the headers that say what became of an answer.

    Args:
        id: of the completion.
        mode: of the request.
        outcome: `applied`, `unchanged`, `skipped`, or `pending` for a stream that began before it was known.
        reason: why, where there is one.
        corrector: version of the corrector that was asked, if any.
        template: id of its template.
        stored: whether the exchange is kept; None where nobody asked for that, or where it is not known yet.
    """
    found = {
        "x-everalign-id": id,
        "x-everalign-mode": mode,
        "x-everalign-correction": f"{outcome}; reason={reason}" if reason else outcome,
    }
    if corrector is not None:
        found["x-everalign-corrector"] = re.sub(r"[^\x20-\x7e]", "?", corrector)
    if template is not None:
        found["x-everalign-template"] = template
    if stored is not None:
        found["x-everalign-stored"] = str(stored).lower()
    return found
