"""The server process: its socket, its client connections, and graceful shutdown."""

import asyncio
import errno
import ipaddress
import re
import resource
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from everalign.errors import EveralignError, InputError
from everalign.serving.errors import overloaded
from everalign.serving.security import is_loopback
from everalign.serving.settings import UpstreamSettings
from everalign.serving.sse import json_bytes

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from everalign.serving.gateway import Gateway

_SPARE_FILES = 256  # for the store, the corrector and the log
_MOST_FILES = 65536
_LARGEST_HEAD = 64 << 10  # bytes
_NETWORK_BITS = 64  # of an IPv6 address; whoever has one, has all of these


@dataclass(frozen=True)
class ConnectionLimits:
    """What connections may.

    Args:
        most: connections at once.
        per_address: of them from one address, or one network of IPv6.
        head_seconds: until the head of a request is there, from its first byte or from connecting on.
        stalled_seconds: for which a client may read too little of what it is sent.
        exempt: proxies, whose connections are those of many clients.
    """

    most: int
    per_address: int
    head_seconds: float
    stalled_seconds: float
    exempt: tuple[str, ...] = ()


def spare_files(concurrency: int) -> int:
    """Return how many connections of clients there can be besides those to upstreams; asks for as many as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    files = _MOST_FILES if soft == resource.RLIM_INFINITY else soft
    return max(files // 4, files - concurrency - _SPARE_FILES)


class Door:
    """The connections of one server, by address. Used in one event loop."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self._limits = limits
        self._exempt = [ipaddress.ip_network(one) for one in limits.exempt]
        self._addresses: dict[str, OrderedDict[_Client, None]] = {}
        self._count = 0
        self._every = min(1.0, limits.head_seconds / 2, limits.stalled_seconds / 2)
        self._sweeping: asyncio.TimerHandle | None = None

    def enter(self, client: "_Client", host: str) -> bool:
        """Take a connection in; False where there is no place for it."""
        address, bound = self._address(host)
        of_address = self._addresses.get(address, OrderedDict())
        if bound and len(of_address) >= self._limits.per_address and not self._make_room(address):
            return False
        if self._count >= self._limits.most:
            crowded = max(self._addresses, key=lambda name: len(self._addresses[name]))
            if not (self._make_room(crowded) or any(self._make_room(name) for name in tuple(self._addresses))):
                return False
        client.address = address
        self._addresses.setdefault(address, OrderedDict())[client] = None
        self._count += 1
        if self._sweeping is None:
            self._sweeping = asyncio.get_running_loop().call_later(self._every, self._sweep)
        return True

    def leave(self, client: "_Client") -> None:
        """Let a connection go; once, however often it is called."""
        of_address = self._addresses.get(client.address, OrderedDict())
        if client in of_address:
            del of_address[client]
            self._count -= 1
            if not of_address:
                del self._addresses[client.address]

    def _make_room(self, address: str) -> bool:
        idle = next((client for client in self._addresses.get(address, ()) if not client.busy), None)
        if idle is None:
            return False
        self.leave(idle)
        idle.transport.abort()
        return True

    def _sweep(self) -> None:
        """Close those that were silent, or read nothing, for too long."""
        self._sweeping = None
        now = time.monotonic()
        for of_address in tuple(self._addresses.values()):
            for client in tuple(of_address):
                head, stalled, unread = (
                    client.waits_since,
                    client.stalled_since,
                    client.transport.get_write_buffer_size(),
                )
                if client.transport.is_closing() and not unread:
                    self.leave(client)  # also one that became another protocol's
                elif client.transport.is_closing() and stalled is None:
                    client.stalled_since = now
                elif head is not None and now >= head + self._limits.head_seconds:
                    client.end()
                elif stalled is not None and now >= stalled + self._limits.stalled_seconds:
                    client.transport.abort()
        if self._count:
            self._sweeping = asyncio.get_running_loop().call_later(self._every, self._sweep)

    def _address(self, host: str) -> tuple[str, bool]:
        """Return what connections are counted by, and whether they are limited."""
        try:
            found = ipaddress.ip_address(host)
        except ValueError:
            return host, True
        if isinstance(found, ipaddress.IPv6Address):
            if found.ipv4_mapped is None:
                network = ipaddress.ip_network((int(found) >> _NETWORK_BITS << _NETWORK_BITS, _NETWORK_BITS))
                return str(network), not any(found in one for one in self._exempt)
            found = found.ipv4_mapped
        return str(found), not any(found in one for one in self._exempt)


class _Client:
    """One connection, in front of uvicorn's protocol."""

    door: Door
    cycle: Any
    transport: asyncio.Transport
    address = ""
    waits_since: float | None = None
    stalled_since: float | None = None
    _head: int | None = 0  # bytes of a head that is not whole

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A client has connected."""
        peer = transport.get_extra_info("peername")
        super().connection_made(transport)  # type: ignore[misc]
        self.waits_since = time.monotonic()
        if not self.door.enter(self, str(peer[0]) if peer else ""):
            error = overloaded("too many connections are open already", "too_many_connections", status=503)
            self._reply(b"503 Service Unavailable", json_bytes(error.body()))

    def data_received(self, data: bytes) -> None:
        """Bytes of a client have come."""
        if self.transport.is_closing():
            return
        super().data_received(data)  # type: ignore[misc]
        if self.busy:
            self.waits_since, self._head = None, None
            return
        # The beginning of a request, or the rest of a body that nobody waits for.
        if self.waits_since is None:
            self.waits_since = time.monotonic()
        if self._head is not None:
            self._head += len(data)
            if self._head > _LARGEST_HEAD and not self.transport.is_closing():
                self._reply(b"431 Request Header Fields Too Large", b"")

    def on_message_begin(self) -> None:
        """The head of a request begins; only httptools says so, and h11 has a limit of its own."""
        super().on_message_begin()  # type: ignore[misc]
        self._head = 0

    def connection_lost(self, error: Exception | None) -> None:
        """The client is gone."""
        self.door.leave(self)
        super().connection_lost(error)  # type: ignore[misc]

    def pause_writing(self) -> None:
        """The client reads less than it is sent."""
        super().pause_writing()  # type: ignore[misc]
        self.stalled_since = time.monotonic()

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()  # type: ignore[misc]
        self.stalled_since = None

    def end(self) -> None:
        """Close a connection whose request does not come."""
        self._reply(b"408 Request Timeout", b"")

    def _reply(self, status: bytes, body: bytes) -> None:
        head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.waits_since = None
        self.transport.write(head % (status, len(body)) + body)
        self.transport.close()


def client_protocol(limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol with limits, for `uvicorn.Config(http=...)`."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    made: type[asyncio.Protocol] = type("ClientProtocol", (_Client, AutoHTTPProtocol), {"door": Door(limits)})
    return made


KEYS_VARIABLE = "EVERALIGN_API_KEYS"
_OWN_VARIABLES = ("CORRECTOR_API_KEY", "APPROVER_API_KEY", "FALLBACK_API_KEY")
_UNNAMED = "default"
_BACKLOG = 2048
_LAST_SECONDS = 30  # for requests under way when the server is told to end


def read_keys(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the clients' keys from EVERALIGN_API_KEYS, where commas divide them."""
    text = environment.get(KEYS_VARIABLE, "")
    return tuple(key.strip() for key in text.split(",")) if text.strip() else ()


def read_upstream(text: str, environment: Mapping[str, str]) -> UpstreamSettings:
    """Return the upstream of a flag, URL or NAME=URL, with its key from OPENAI_API_KEY or NAME_API_KEY.

    Raises:
        InputError: the flag is neither.
    """
    if text.startswith(("http://", "https://")):
        return UpstreamSettings(_UNNAMED, text, environment.get("OPENAI_API_KEY", ""))
    name, found, url = text.partition("=")
    if not found or not url.startswith(("http://", "https://")):
        raise InputError(f"--upstream {text}: must be URL or NAME=URL, such as http://127.0.0.1:8000/v1")
    # The operator's key goes to the server that it is meant for, and to no other.
    variable = key_variable(name)
    if variable in _OWN_VARIABLES:
        raise InputError(f"--upstream {name}=...: {variable} is another server's key; choose another name")
    return UpstreamSettings(name, url, environment.get(variable, ""))


def read_upstreams(texts: Iterable[str], environment: Mapping[str, str]) -> tuple[UpstreamSettings, ...]:
    """Return the upstreams of all flags; raises InputError also where two would be sent the same key."""
    found = tuple(read_upstream(text, environment) for text in texts)
    named: dict[str, str] = {}
    for one in found:
        former = named.setdefault(key_variable(one.name), one.name)
        if former != one.name:
            raise InputError(
                f"--upstream {one.name}=...: its key would be read from {key_variable(one.name)}, which is that of the "
                f"upstream {former!r}; choose another name"
            )
    return found


def read_fallback(text: str, environment: Mapping[str, str]) -> tuple[UpstreamSettings, str | None]:
    """Return the server of --fallback, URL or URL#MODEL, and the model, if one is named; raises InputError."""
    url, _, model = text.partition("#")
    if not url.startswith(("http://", "https://")):
        raise InputError(f"--fallback {text}: must be URL or URL#MODEL, such as http://127.0.0.1:8000/v1#qwen2.5")
    return UpstreamSettings("fallback", url, environment.get("FALLBACK_API_KEY", "")), model or None


def description(gateway: "Gateway", address: str, corrector: str | None, store: str | None) -> list[tuple[str, str]]:
    """Return what is in service, line by line, each with its label.

    Args:
        gateway: as it is set up.
        address: that clients give as their base URL.
        corrector: as it was named.
        store: its address, which may hold a password.
    """
    settings, root = gateway.settings, address.removesuffix("/v1")
    access = settings.access
    shown = root + access.root_path
    keys = {1: "1 key"}.get(gateway.keys.count, f"{gateway.keys.count} keys")
    if not gateway.keys.needed:
        keys = "none; whoever reaches the port is served" if access.no_auth else "none; only this machine is served"
    lines = [
        ("playground", f"{shown}/"),
        ("dashboard", f"{shown}/dashboard"),
        ("mode", gateway.parser.mode),
        ("corrector", "none" if corrector is None else f"{corrector}, version {gateway.corrections.version}"),
        ("store", "none" if store is None else re.sub(r"(?<=//)([^/@]*):[^/@]*(?=@)", r"\1:***", store)),
        ("keys", keys),
    ]
    lines += [
        ("upstream", f"{one.name}, {one.url}{'' if one.key else ', without a key'}") for one in settings.upstreams
    ]
    return lines if settings.fallback is None else [*lines, ("fallback", settings.fallback.url)]


def key_variable(name: str) -> str:
    """Return the environment variable that holds an upstream's key."""
    return "OPENAI_API_KEY" if name == _UNNAMED else f"{name.upper().replace('-', '_')}_API_KEY"


def check_host(host: str, keyless: bool, no_auth: bool) -> None:
    """Refuse to serve a network without keys unless that is meant; raises InputError."""
    if keyless and not no_auth and not is_loopback(host):
        raise InputError(
            f"--host {host}: without keys only this machine is served, as 127.0.0.1; set {KEYS_VARIABLE} to the "
            "clients' keys, divided by commas, or serve whoever comes with --no-auth"
        )


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens; raises InputError where the address cannot be had."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port}: must be from 0 (any that is free) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise InputError(f"--host {host}: is no name or address of this machine") from None
    # With its protocol: without, asyncio lets small packets wait for one another (40 ms).
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(_BACKLOG)
    except OSError as error:
        found.close()
        raise InputError(_advice(host, port, error)) from None
    return found


def _advice(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"--port {port}: another program listens there; end it, or choose another port (0 for any that is free)"
    if error.errno == errno.EACCES:
        return f"--port {port}: is not allowed to this user; choose one from 1024 on"
    return f"--host {host}: cannot be listened at: {error.strerror}"


def address_of(listening: socket.socket) -> str:
    """Return the address that clients give as their base URL."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def serve(app: "FastAPI", listening: socket.socket, ready: Callable[[], None], warn: Callable[[str], None]) -> None:
    """Serve until a signal ends it; requests under way are finished, as far as they can in 30 seconds.

    Args:
        app: the gateway.
        listening: its socket.
        ready: called when requests are answered.
        warn: called with what is wrong then.

    Raises:
        EveralignError: the server ended by itself.
    """
    server = make_server(app)
    app.state.ready, app.state.warn = ready, warn
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        return  # how a server is meant to end: what was under way is finished
    if not server.started:
        raise EveralignError("the server could not start; what is printed above says why")


def make_server(app: "FastAPI") -> "uvicorn.Server":
    """Return a server of a gateway, with the limits of its settings on connections."""
    import uvicorn

    settings = app.state.gateway.settings
    limits = ConnectionLimits(
        most=spare_files(settings.limits.concurrency),
        per_address=settings.limits.connections_per_address,
        head_seconds=settings.timeouts.head,
        stalled_seconds=settings.timeouts.stalled,
        exempt=settings.access.trusted_proxies,
    )
    # Uvicorn's log of requests would have their whole paths, and X-Forwarded-For is anyone's word for who they are;
    # see access_log and --trusted-proxy.
    config = uvicorn.Config(
        app,
        http=client_protocol(limits),
        access_log=False,
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    return uvicorn.Server(config)
