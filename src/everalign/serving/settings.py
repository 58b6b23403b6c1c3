"""Settings of the gateway, which headers pass it, and which upstream addresses it allows (SSRF protection).

Only listed headers pass, in both directions: proxies, clouds and upstreams keep inventing headers for credentials and
identities, so a list of forbidden ones would always lack the next. Operators can add to the lists.

Upstream addresses come only from the operator's command line, never from a request, so loopback and private networks
are allowed: models do run there. The addresses at which clouds hand out credentials are refused. httpx parses an
address, since httpx also requests it: two parsers that differ are how such checks are evaded (CVE-2026-24779).
Redirects are never followed.
"""

import ipaddress
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from everalign.errors import InputError
from everalign.options import Options
from everalign.serving.security import UNLIMITED, Allowance, Keys

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
_HEADER = re.compile(r"[a-z0-9!#$%&'+.^_`|~-]+\*?")


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
        for flag, attribute in (("forward-header", "forward"), ("return-header", "back")):
            names = tuple(name.strip().lower() for name in getattr(self, attribute))
            for name in names:
                if not _HEADER.fullmatch(name) or _NEVER.fullmatch(name.rstrip("*")) or name == "*":
                    raise InputError(
                        f"--{flag} {name}: must be a header's name, or its beginning and *, and none of those that "
                        "hold keys or cookies or belong to one connection"
                    )
            object.__setattr__(self, attribute, names)

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

_NETWORKS = tuple(
    ipaddress.ip_network(text)
    for text in (
        "169.254.0.0/16",  # link-local: AWS, Azure, Google, DigitalOcean and others
        "fe80::/10",
        "fd00:ec2::/32",  # AWS
        "100.100.100.200/32",  # Alibaba
        "168.63.129.16/32",  # Azure
        "192.0.0.192/32",  # Oracle
        "0.0.0.0/32",
        "::/128",
    )
)
_NAMES = ("metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Resolve = Callable[[str], Iterable[str]]


def resolved(host: str) -> list[str]:
    """Return the addresses of a host name; none if it is unknown now, since a gateway may start before its upstream."""
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        return []


def checked_upstream(text: str, resolve: Resolve = resolved) -> str:
    """Return an upstream's base address, below which `chat/completions` is.

    Raises:
        InputError: it is no address, contains a user, or belongs to a cloud's credential service.
    """
    import httpx  # here and below: the command line's help needs the settings, but no client

    from everalign.llm_client import checked_url

    if not text.isascii() or any(sign.isspace() for sign in text):
        raise InputError(f"upstream {text!r}: the address must be plain ASCII without spaces")
    address = checked_url(text)
    host = httpx.URL(address).host
    name = host.rstrip(".").lower()
    if name in _NAMES or any(map(_is_forbidden, (name, *resolve(host)))):
        raise InputError(
            f"upstream {address}: must not be a metadata service or an unspecified address; name the model's server"
        )
    return address


def _is_forbidden(host: str) -> bool:
    """Whether a host is an address of `_NETWORKS`, also as an IPv4 address inside an IPv6 one."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        address = inner or address
    return any(address in network for network in _NETWORKS)


Mode = Literal["off", "shadow", "correct", "strict"]
OnFailure = Literal["open", "closed"]
Keep = Literal["all", "opted-in", "none"]
StrictStructured = Literal["refuse", "pass", "correct-strings"]
StreamBy = Literal["answer", "sentence"]

MODES: tuple[Mode, ...] = get_args(Mode)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")


@dataclass(frozen=True)
class UpstreamSettings:
    """An upstream: a server whose models answer.

    Args:
        name: part of model names if there are several upstreams.
        url: its address, see `checked_upstream`.
        key: its API key; empty for none.
    """

    name: str
    url: str
    key: str = field(default="", repr=False)

    def checked(self, resolve: Resolve = resolved) -> "UpstreamSettings":
        """Return it with its base address in full; raises InputError."""
        from everalign.llm_client import checked_key

        if not _NAME.fullmatch(self.name):
            raise InputError(f"upstream {self.name!r}: a name is a letter and up to 31 letters, digits, - and _")
        return UpstreamSettings(self.name, checked_upstream(self.url, resolve), checked_key(self.key))


Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Access(Options):
    """Who is served, and how the gateway is reached."""

    keys_file: Path | None = Field(
        default=None,
        title="FILE",
        description="More API keys, one per line with its limits; reloaded when it changes.",
    )
    no_auth: bool = Field(default=False, description="Serve everybody, without keys.")
    cors_origins: tuple[str, ...] = Field(
        default=(), description="Web pages that may use the API, such as https://app.example; * for all."
    )
    trusted_proxies: tuple[str, ...] = Field(
        default=(), description="Addresses and networks whose X-Forwarded-For and X-Forwarded-Proto are trusted."
    )
    root_path: str = Field(
        default="", title="/PATH", description="Path of the gateway behind a proxy, such as /everalign."
    )
    allowance: Allowance = Field(default=UNLIMITED, description="Limits of each key that has none of its own.")
    headers: HeaderRules = Field(default=USUAL, description="Headers that cross besides the usual ones.")

    @model_validator(mode="after")
    def _check(self) -> "Access":
        for origin in self.cors_origins:
            parts = urlsplit(origin)
            if origin != "*" and (origin != f"{parts.scheme}://{parts.netloc}" or not parts.scheme or not parts.netloc):
                raise InputError(f"--cors-origin {origin}: must be as browsers send it, such as https://app.example")
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError:
                raise InputError(
                    f"--trusted-proxy {proxy}: must be an address or a network, such as 10.0.0.0/8"
                ) from None
        path = self.root_path.rstrip("/")
        if path and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", path):
            raise InputError(f"--root-path {self.root_path}: must be a path of letters and digits, such as /everalign")
        object.__setattr__(self, "root_path", path)
        for name, most in asdict(self.allowance).items():
            if most is not None and most < 1:
                raise InputError(f"--{name.replace('_', '-')}: must be at least 1, found {most}")
        return self


class Timeouts(Options):
    """Seconds."""

    connect: Seconds = Field(default=5.0, description="To connect to the upstream.")
    total: Seconds = Field(
        default=600.0,
        title="SECONDS",
        description="Seconds for an answer of the upstream, streamed or not, all attempts included.",
    )
    models: Seconds = Field(default=10.0, description="For the upstream's list of models.")
    correction: Seconds = Field(
        default=60.0, title="SECONDS", description="Seconds for a correction, waiting and all attempts included."
    )
    store: Seconds = Field(default=5.0, description="To store or read an exchange or feedback.")
    head: Seconds = Field(default=10.0, description="For the head of a client's request.")
    stalled: Seconds = Field(default=60.0, description="For a client that reads too slowly.")


class Limits(Options):
    """How much at once, and how large."""

    concurrency: Count = Field(
        default=1000, description="Maximum number of concurrent requests; a key never has more than are free."
    )
    per_key: Count = Field(default=500, description="Maximum number of concurrent requests with the same key.")
    connections_per_address: Count = Field(
        default=1000, description="Maximum number of connections from one client address; idle ones make room."
    )
    body_bytes: Count = Field(default=32 << 20, description="Of a request.")
    upload_bytes: Count = Field(default=512 << 20, description="Of a request that is passed on and is no JSON.")
    messages: Count = Field(default=2000, description="Of a request.")
    choices: Count = Field(default=16, description="Answers to one request (`n`).")
    answer_bytes: Count = Field(default=16 << 20, description="Of an upstream's answer, decompressed.")
    correction_characters: Count = Field(
        default=100_000, description="Of an answer that is corrected; longer ones are `too_long`."
    )
    waiting: Count = Field(default=256, description="Answers that wait for the corrector.")
    batch: Count = Field(default=16, description="Answers that are corrected at once.")


class GatewaySettings(Options):
    """A gateway."""

    upstreams: tuple[UpstreamSettings, ...] = Field(description="At least one.")
    keys: tuple[str, ...] = Field(
        default=(), description="API keys of the clients; without any, only this machine is served."
    )
    mode: Mode | None = Field(
        default=None, description="Mode of requests without one; by default correct if there is a corrector, else off."
    )
    on_failure: OnFailure = Field(
        default="open", description="Without a correction, return the answer (open) or an error (closed)."
    )
    keep: Keep = Field(
        default="opted-in",
        description="Exchanges to store: those with store: true, all but those with store: false, or none.",
    )
    timeouts: Timeouts = Field(default=Timeouts(), description="In seconds.")
    limits: Limits = Field(default=Limits(), description="Of size and number.")
    retries: Annotated[int, Field(ge=0)] = Field(
        default=1, description="Retries of a request to an upstream, before the first byte of its reply."
    )
    longest_wait: Seconds = Field(
        default=5.0, description="An upstream that asks for a longer pause, in seconds, is not asked again."
    )
    keepalive: Seconds = Field(default=15.0, description="Seconds of silence in a stream before a comment is sent.")
    breaker_failures: Count = Field(
        default=5, description="Failures in a row after which an upstream, or the corrector, is left alone."
    )
    breaker_seconds: Seconds = Field(default=30.0, description="For how long.")
    access: Access = Field(default=Access(), description="Who is served, and how.")
    passthrough: str = Field(
        default="all",
        title="all|none|NAME,NAME..",
        description="Endpoints besides chat that are passed through, by the first part of their path.",
    )
    strict_structured: StrictStructured = Field(
        default="refuse", description="What mode strict does with requests for JSON or with tools."
    )
    stream_by: StreamBy = Field(
        default="answer",
        description="When a stream's corrected text leaves: once the whole answer, or a sentence, has come.",
    )
    fallback: UpstreamSettings | None = Field(default=None, description="Answers when the upstream cannot.")
    fallback_model: str | None = Field(
        default=None, description="The model's name at the fallback; the same name if not given."
    )

    @model_validator(mode="after")
    def _check(self) -> "GatewaySettings":
        if not self.upstreams:
            raise InputError("no upstream given: name the server that answers, such as http://127.0.0.1:8000/v1")
        names = [upstream.name for upstream in self.upstreams]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"upstream {twice[0]!r}: is given twice; names tell upstreams apart, as NAME=URL")
        object.__setattr__(self, "upstreams", tuple(upstream.checked() for upstream in self.upstreams))
        if self.fallback is not None:
            object.__setattr__(self, "fallback", self.fallback.checked())
        for name in self.passthrough.split(","):
            if not re.fullmatch(r"[a-z][a-z0-9_-]*", name.strip()):
                raise InputError(
                    f"--passthrough {self.passthrough}: must be all, none, or names such as embeddings,files"
                )

        if self.stream_by == "sentence" and self.mode == "strict":
            raise InputError(
                "--stream-by sentence: is not for --mode strict, in which only what was checked with the whole answer "
                "leaves; leave one of the two out",
                field="stream_by",
            )

        access = self.access
        keys = Keys(self.keys, access.keys_file, access.no_auth)
        if keys.needed or access.no_auth:
            return self
        if access.trusted_proxies or access.root_path:
            flag = "trusted-proxy" if access.trusted_proxies else "root-path"
            raise InputError(
                f"--{flag}: every client of the proxy would be served without a key; set EVERALIGN_API_KEYS or "
                "--keys-file, or allow it with --no-auth"
            )
        if "*" in access.cors_origins:
            raise InputError(
                "--cors-origin *: without keys every page that a browser here opens could use the gateway; name the "
                "sites, set EVERALIGN_API_KEYS, or allow it with --no-auth"
            )
        return self

    def __repr__(self) -> str:
        return f"GatewaySettings({self.upstreams!r}, mode={self.mode!r})"  # never the keys

    __str__ = __repr__
