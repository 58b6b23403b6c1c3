"""Which headers pass the gateway, and the ones it adds."""

import re
from collections.abc import Iterable, Mapping

_HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "host",
    "content-length",
    "content-type",
    "content-encoding",
    "accept",
    "accept-encoding",
    "expect",
}
# Keys and what goes with them belong to one side of the gateway; who the client is, is not the upstream's business.
_PRIVATE = re.compile(
    r"authori[sz]ation|cookie|api-?key|token|secret|password|credential|^openai-(organization|project)$"
    r"|^x-everalign-|^x-forwarded-|^forwarded$|^x-real-ip$|^proxy-|^via$|^origin$|^referer$|^sec-"
)
_OWN_REPLY = re.compile(
    r"^(date|server|set-cookie2?|alt-svc|strict-transport-security|www-authenticate|location|content-.*|link"
    r"|report-to|nel|cache-control|x-accel-.*|access-control-.*|x-everalign-.*|refresh|clear-site-data)$"
)

STREAM_HEADERS = {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}
"""Proxies must neither keep nor gather nor compress what is streamed."""


def forwarded(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the headers of a client that its upstream gets; names in small letters."""
    return {
        name: value
        for name, value in headers
        if name not in _HOP_BY_HOP and not _PRIVATE.search(name) and name.isascii()
    }


def returned(headers: Mapping[str, str], key: str) -> dict[str, str]:
    """Return the headers of an upstream that the client gets; none that holds the upstream's key."""
    found = ((name.lower(), value) for name, value in headers.items())
    return {
        name: value
        for name, value in found
        if name not in _HOP_BY_HOP and not _OWN_REPLY.match(name) and not (key and key in value)
    }


def provenance(
    id: str, mode: str, outcome: str, reason: str | None, corrector: str | None, template: str | None
) -> dict[str, str]:
    """Return the headers that say what became of an answer.

    Args:
        id: of the completion.
        mode: of the request.
        outcome: `applied`, `unchanged`, `skipped`, or `pending` for a stream that began before it was known.
        reason: why, where there is one.
        corrector: version of the corrector that was asked, if any.
        template: id of its template.
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
    return found
