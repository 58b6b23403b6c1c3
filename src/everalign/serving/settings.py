"""Which addresses the gateway sends requests to.

They come from the operator alone, on the command line, never from a request: so loopback and private networks are
allowed, where operators do run their models. What no operator means are the addresses at which clouds hand out
credentials. An address is taken apart by httpx, which also fetches it: two readers of one address are how such rules
are got around (CVE-2026-24779). Redirects are never followed.
"""

import ipaddress
import math
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import httpx

from everalign.errors import InputError
from everalign.llm_client import checked_key, checked_url
from everalign.serving.headers import USUAL, HeaderRules
from everalign.serving.security import UNLIMITED, Allowance, Keys

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
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def resolved(host: str) -> list[str]:
    """Return the addresses of a name, none where nobody knows it now; a server may be started before its upstream."""
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        return []


def checked_upstream(text: str, resolve: Resolve = resolved) -> str:
    """Return an upstream's address, below which `chat/completions` is.

    Raises:
        InputError: it is none, names a user, or leads to where clouds keep credentials.
    """
    if not text.isascii() or any(sign.isspace() for sign in text):
        raise InputError(f"upstream {text!r}: the address must be plain ASCII without spaces")
    address = checked_url(text)
    host = httpx.URL(address).host
    name = host.rstrip(".").lower()
    if name in _NAMES or any(_is_forbidden(found) for found in (name, *resolve(host))):
        raise InputError(f"upstream {address}: is an address of credentials or of nobody; name the model's server")
    return address


def _is_forbidden(text: str) -> bool:
    address = _address(text)
    return address is not None and any(address in network for network in _NETWORKS)


def _address(text: str) -> _Address | None:
    """The address that a text is, taken out of an IPv6 address that holds an IPv4 one."""
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if inner is None and found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        return inner or found
    return found


Mode = Literal["off", "shadow", "correct", "strict"]
OnFailure = Literal["open", "closed"]
Keep = Literal["all", "opted-in", "none"]
StrictStructured = Literal["refuse", "pass", "correct-strings"]

MODES: tuple[Mode, ...] = get_args(Mode)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")


def _values(settings: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(settings, field.name)) for field in fields(settings)]


@dataclass(frozen=True)
class UpstreamSettings:
    """A server that answers.

    Args:
        name: what it is called in model names where there are several.
        url: its address; see `checked_upstream`.
        key: what it asks for; empty for nothing.
    """

    name: str
    url: str
    key: str = ""

    def __repr__(self) -> str:
        return f"UpstreamSettings({self.name!r}, {self.url!r})"  # never the key

    def checked(self, resolve: Resolve = resolved) -> "UpstreamSettings":
        """Return it with its whole address; raises InputError."""
        if not _NAME.fullmatch(self.name):
            raise InputError(f"upstream {self.name!r}: a name is a letter and up to 31 letters, digits, - and _")
        return UpstreamSettings(self.name, checked_upstream(self.url, resolve), checked_key(self.key))


@dataclass(frozen=True)
class Access:
    """Who comes in, and how the gateway is reached.

    Args:
        keys_file: has keys besides those that are given, one a line, and is read again when it changes.
        no_auth: serve whoever comes, where there are no keys.
        cors_origins: of web pages that may use the API, such as `https://app.example`; `*` for all.
        trusted_proxies: addresses and networks whose `X-Forwarded-For` and `X-Forwarded-Proto` are believed.
        root_path: what a proxy has in front of the gateway's own paths, such as `/everalign`.
        allowance: what each key may use for which the file says nothing else.
        headers: that cross besides the usual ones.
    """

    keys_file: Path | None = None
    no_auth: bool = False
    cors_origins: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    root_path: str = ""
    allowance: Allowance = UNLIMITED
    headers: HeaderRules = USUAL

    def __post_init__(self) -> None:
        for origin in self.cors_origins:
            parts = urlsplit(origin)
            if origin != "*" and (origin != f"{parts.scheme}://{parts.netloc}" or not parts.scheme or not parts.netloc):
                raise InputError(f"--cors-origin {origin}: must be as browsers send it, such as https://app.example")
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError:
                raise InputError(f"--trusted-proxy {proxy}: must be an address or a network, as 10.0.0.0/8") from None
        path = self.root_path.rstrip("/")
        if path and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", path):
            raise InputError(f"--root-path {self.root_path}: must be a path of letters and digits, such as /everalign")
        object.__setattr__(self, "root_path", path)
        for name, most in _values(self.allowance):
            if most is not None and most < 1:
                raise InputError(f"--{name.replace('_', '-')}: must be at least 1, found {most}")


@dataclass(frozen=True)
class Timeouts:
    """Seconds.

    Args:
        connect: until a connection to the upstream stands.
        total: for a whole answer of the upstream, streamed or not, all attempts together.
        models: for its list of models.
        correction: for one correction, waiting for its turn and all attempts included.
        store: until an exchange or feedback is kept, or read.
        head: until the head of a client's request is there.
        stalled: for a client that reads too little of what is sent to it.
    """

    connect: float = 5.0
    total: float = 600.0
    models: float = 10.0
    correction: float = 60.0
    store: float = 5.0
    head: float = 10.0
    stalled: float = 60.0

    def __post_init__(self) -> None:
        for name, value in _values(self):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"timeout {name}: must be above 0 seconds, found {value}")


@dataclass(frozen=True)
class Limits:
    """How much at once, and how large.

    Args:
        concurrency: requests under way.
        per_key: of them with the same key.
        connections_per_address: connections of clients from one address.
        body_bytes: of a request.
        upload_bytes: of one that is passed on and is no JSON, such as a file.
        messages: of a request.
        choices: answers to one request (`n`).
        answer_bytes: of an upstream's answer, decompressed.
        correction_characters: of an answer that is corrected; longer ones are `too_long`.
        waiting: answers that wait for the corrector.
        batch: answers that are corrected at once.
    """

    concurrency: int = 1000
    per_key: int = 500
    connections_per_address: int = 1000
    body_bytes: int = 32 << 20
    upload_bytes: int = 512 << 20
    messages: int = 2000
    choices: int = 16
    answer_bytes: int = 16 << 20
    correction_characters: int = 100_000
    waiting: int = 256
    batch: int = 16

    def __post_init__(self) -> None:
        for name, value in _values(self):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"limit {name}: must be a whole number of at least 1, found {value!r}")


@dataclass(frozen=True)
class GatewaySettings:
    """A gateway.

    Args:
        upstreams: at least one.
        keys: of the clients; none where only this machine is served.
        mode: of requests that name none; `correct` where there is a corrector, else `off`, when None.
        on_failure: what `correct` does without a correction: give the answer as it is (`open`) or an error (`closed`).
        keep: which exchanges are kept: those whose request says `store: true` (`opted-in`), all but those that say
            `store: false` (`all`), or `none`.
        timeouts: in seconds.
        limits: of size and number.
        retries: how often a request to an upstream is repeated, before its first byte.
        longest_wait: seconds; an upstream that asks for a longer pause is not asked again.
        keepalive: seconds of silence in a stream before a comment is sent.
        breaker_failures: failures in a row after which an upstream, or the corrector, is left alone.
        breaker_seconds: for how long.
        access: who comes in, and how.
        passthrough: which endpoints besides chat are passed on to the upstream: `all`, `none`, or their first words,
            divided by commas, such as `embeddings,files`.
        strict_structured: what `strict` does with requests for JSON and with tools; see `policy`.
        fallback: answers what an upstream cannot; None for nobody.
        fallback_model: what the fallback calls the model; None for the same name.
    """

    upstreams: tuple[UpstreamSettings, ...]
    keys: tuple[str, ...] = ()
    mode: Mode | None = None
    on_failure: OnFailure = "open"
    keep: Keep = "opted-in"
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    retries: int = 1
    longest_wait: float = 5.0
    keepalive: float = 15.0
    breaker_failures: int = 5
    breaker_seconds: float = 30.0
    access: Access = Access()
    passthrough: str = "all"
    strict_structured: StrictStructured = "refuse"
    fallback: UpstreamSettings | None = None
    fallback_model: str | None = None

    def __post_init__(self) -> None:
        if not self.upstreams:
            raise InputError("no upstream given: name the server that answers, such as http://127.0.0.1:8000/v1")
        names = [upstream.name for upstream in self.upstreams]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"upstream {twice[0]!r}: is given twice; names tell upstreams apart, as NAME=URL")
        object.__setattr__(self, "upstreams", tuple(upstream.checked() for upstream in self.upstreams))
        if self.fallback is not None:
            object.__setattr__(self, "fallback", self.fallback.checked())
        self._check_openings()
        choices = (("mode", (*MODES, None)), ("on_failure", get_args(OnFailure)), ("keep", get_args(Keep)))
        for name, known in (*choices, ("strict_structured", get_args(StrictStructured))):
            if getattr(self, name) not in known:
                words = ", ".join(word for word in known if word)
                raise InputError(f"{name.replace('_', '-')}: must be one of {words}, found {getattr(self, name)!r}")
        for name in ("longest_wait", "keepalive", "breaker_seconds"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"{name}: must be above 0 seconds, found {getattr(self, name)}")
        if self.retries < 0 or self.breaker_failures < 1:
            raise InputError("retries must be at least 0, and breaker_failures at least 1")

    def _check_openings(self) -> None:
        """Check who is let in, and to what."""
        keys = Keys(self.keys, self.access.keys_file, self.access.no_auth)
        for flag, value in (("trusted-proxy", self.access.trusted_proxies), ("root-path", self.access.root_path)):
            if value and not keys.needed and not self.access.no_auth:
                raise InputError(
                    f"--{flag}: whoever reaches the proxy would be served without a key; set EVERALIGN_API_KEYS or "
                    "--keys-file, or say that this is meant with --no-auth"
                )

        if "*" in self.access.cors_origins and not keys.needed and not self.access.no_auth:
            raise InputError(
                "--cors-origin *: without keys every page that a browser here opens could use the gateway; name the "
                "sites, set EVERALIGN_API_KEYS, or say that this is meant with --no-auth"
            )
        for name in self.passthrough.split(","):
            if not re.fullmatch(r"[a-z][a-z0-9_-]*", name.strip()):
                raise InputError(f"--passthrough {self.passthrough}: must be all, none, or words as embeddings,files")

    def __repr__(self) -> str:
        return f"GatewaySettings({self.upstreams!r}, mode={self.mode!r})"  # never the keys
