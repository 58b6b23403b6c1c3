"""Which headers pass the gateway, in both directions.

Only listed headers pass: proxies, clouds and upstreams keep inventing headers for credentials and identities, so a list
of forbidden ones would always lack the next. Operators can add to the lists.
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
# Known to one side of the gateway only, or belonging to one connection: no operator can mean these.
_NEVER = re.compile(
    r"authorization|proxy-.*|(x-)?api-key|cookie2?|set-cookie2?|host|connection|keep-alive|te|trailer|upgrade|expect"
    r"|transfer-encoding|content-(length|type|encoding)|accept(-encoding)?|access-control-.*|x-everalign-.*"
)
_NAME = re.compile(r"[a-z0-9!#$%&'+.^_`|~-]+\*?")


@dataclass(frozen=True)
class HeaderRules:
    """Headers that pass besides the usual ones: names, or beginnings of names with a `*` behind.

    Args:
        forward: headers of clients that upstreams get.
        back: headers of upstreams that clients get.
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
        """Return the client's headers that the upstream gets, with lower-case names."""
        given = [(name.lower(), value) for name, value in headers]
        # What a Connection header names belongs to that connection.
        own = {word.strip().lower() for name, value in given if name == "connection" for word in value.split(",")}
        found: dict[str, str] = {}
        for name, value in given:
            if name not in own and _passes(name, _REQUEST, self.forward):
                found[name] = f"{found[name]}, {value}" if name in found else value
        return found

    def returned(self, headers: Mapping[str, str], key: str) -> dict[str, str]:
        """Return the upstream's headers that the client gets; none with the upstream's key in it."""
        found = ((name.lower(), value) for name, value in headers.items())
        return {name: value for name, value in found if _passes(name, _REPLY, self.back) and not (key and key in value)}


def _passes(name: str, usual: re.Pattern[str], added: tuple[str, ...]) -> bool:
    if usual.fullmatch(name):
        return True
    listed = any(name.startswith(one[:-1]) if one.endswith("*") else name == one for one in added)
    return listed and not _NEVER.fullmatch(name)


USUAL = HeaderRules()
