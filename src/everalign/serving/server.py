"""The server process: environment and flags, its socket, limits on client connections, graceful shutdown."""

import asyncio
import errno
import ipaddress
import re
import resource
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from everalign.errors import EveralignError, InputError
from everalign.serving.errors import overloaded
from everalign.serving.security import is_loopback
from everalign.serving.settings import GatewaySettings, UpstreamSettings
from everalign.serving.sse import json_bytes

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from everalign.serving.gateway import Gateway

KEYS_VARIABLE = "EVERALIGN_API_KEYS"
_OWN_VARIABLES = ("CORRECTOR_API_KEY", "APPROVER_API_KEY", "FALLBACK_API_KEY")
_UNNAMED = "default"
_BACKLOG = 2048
_SHUTDOWN_SECONDS = 30  # for requests in progress
_SPARE_FILES = 256  # for the store, the corrector and the log
_MOST_FILES = 65536
_LARGEST_HEAD = 64 << 10  # bytes
_NETWORK_BITS = 64  # an IPv6 client usually has a whole network of this size


class ConnectionTable:
    """The connections of one server, by address: admits them, and closes slow ones. Used in one event loop.

    The connections of trusted proxies are those of many clients, so their number is not limited by address.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self._most = _client_connections(settings.limits.concurrency)
        self._per_address = settings.limits.connections_per_address
        self._head_seconds, self._stalled_seconds = settings.timeouts.head, settings.timeouts.stalled
        self._exempt = [ipaddress.ip_network(one) for one in settings.access.trusted_proxies]
        self._addresses: dict[str, OrderedDict[_LimitedProtocol, None]] = {}
        self._count = 0
        self._interval = min(1.0, self._head_seconds / 2, self._stalled_seconds / 2)
        self._timer: asyncio.TimerHandle | None = None

    def add(self, client: "_LimitedProtocol", host: str) -> bool:
        """Add a connection; False if there is no place for it, even after closing an idle one."""
        address, limited = self._address(host)
        same = self._addresses.get(address, OrderedDict())
        if limited and len(same) >= self._per_address and not self._close_idle(address):
            return False
        if self._count >= self._most:
            crowded = max(self._addresses, key=lambda name: len(self._addresses[name]))
            if not (self._close_idle(crowded) or any(self._close_idle(name) for name in tuple(self._addresses))):
                return False
        client.address = address
        self._addresses.setdefault(address, OrderedDict())[client] = None
        self._count += 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._interval, self._close_slow)
        return True

    def remove(self, client: "_LimitedProtocol") -> None:
        """Remove a connection; may be called again."""
        same = self._addresses.get(client.address, OrderedDict())
        if client in same:
            del same[client]
            self._count -= 1
            if not same:
                del self._addresses[client.address]

    def _close_idle(self, address: str) -> bool:
        idle = next((client for client in self._addresses.get(address, ()) if not client.busy), None)
        if idle is None:
            return False
        self.remove(idle)
        idle.transport.abort()
        return True

    def _close_slow(self) -> None:
        """Close connections that sent no request, or read nothing, for too long."""
        self._timer = None
        now = time.monotonic()
        for client in [client for same in self._addresses.values() for client in same]:
            waits, stalled = client.waits_since, client.stalled_since
            if client.transport.is_closing() and not client.transport.get_write_buffer_size():
                self.remove(client)  # also a connection that was handed to another protocol
            elif client.transport.is_closing() and stalled is None:
                client.stalled_since = now
            elif waits is not None and now >= waits + self._head_seconds:
                client.reply(b"408 Request Timeout")
            elif stalled is not None and now >= stalled + self._stalled_seconds:
                client.transport.abort()
        if self._count:
            self._timer = asyncio.get_running_loop().call_later(self._interval, self._close_slow)

    def _address(self, host: str) -> tuple[str, bool]:
        """Return the name that connections are counted under, and whether their number is limited."""
        try:
            found = ipaddress.ip_address(host)
        except ValueError:
            return host, True
        found = getattr(found, "ipv4_mapped", None) or found
        limited = not any(found in one for one in self._exempt)
        if isinstance(found, ipaddress.IPv6Address):
            return str(ipaddress.ip_network((int(found) >> _NETWORK_BITS << _NETWORK_BITS, _NETWORK_BITS))), limited
        return str(found), limited


class _LimitedProtocol:
    """Mixin for uvicorn's protocol: one client connection that `table` admits and watches."""

    table: ConnectionTable
    cycle: Any
    transport: asyncio.Transport
    address = ""
    waits_since: float | None = None
    stalled_since: float | None = None
    _head: int | None = 0  # bytes of an incomplete head

    @property
    def busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:
        peer = transport.get_extra_info("peername")
        super().connection_made(transport)  # type: ignore[misc]
        self.waits_since = time.monotonic()
        if not self.table.add(self, str(peer[0]) if peer else ""):
            error = overloaded("too many connections are open already", "too_many_connections", status=503)
            self.reply(b"503 Service Unavailable", json_bytes(error.body()))

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)  # type: ignore[misc]
        if self.busy:
            self.waits_since, self._head = None, None
            return
        # The beginning of a request, or the rest of a body that nobody reads.
        if self.waits_since is None:
            self.waits_since = time.monotonic()
        if self._head is not None:
            self._head += len(data)
            if self._head > _LARGEST_HEAD and not self.transport.is_closing():
                self.reply(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        # Only httptools calls this; h11 limits the head itself.
        super().on_message_begin()  # type: ignore[misc]
        self._head = 0

    def connection_lost(self, error: Exception | None) -> None:
        self.table.remove(self)
        super().connection_lost(error)  # type: ignore[misc]

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[misc]
        self.stalled_since = time.monotonic()

    def resume_writing(self) -> None:
        super().resume_writing()  # type: ignore[misc]
        self.stalled_since = None

    def reply(self, status: bytes, body: bytes = b"") -> None:
        """Send a reply of our own and close the connection."""
        head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.waits_since = None
        self.transport.write(head % (status, len(body)) + body)
        self.transport.close()


def read_keys(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the clients' keys from EVERALIGN_API_KEYS, separated by commas."""
    text = environment.get(KEYS_VARIABLE, "")
    return tuple(key.strip() for key in text.split(",")) if text.strip() else ()


def read_upstreams(texts: Iterable[str], environment: Mapping[str, str]) -> tuple[UpstreamSettings, ...]:
    """Return the upstreams of `--upstream URL` or `NAME=URL`, with their keys from OPENAI_API_KEY or NAME_API_KEY.

    Raises:
        InputError: a flag is neither, or its key would be that of another server.
    """
    found: list[UpstreamSettings] = []
    names: dict[str, str] = {}
    for text in texts:
        if text.startswith(("http://", "https://")):
            name, url = _UNNAMED, text
        else:
            name, given, url = text.partition("=")
            if not given or not url.startswith(("http://", "https://")):
                raise InputError(f"--upstream {text}: must be URL or NAME=URL, such as http://127.0.0.1:8000/v1")
        # A key goes to the server that it is meant for, and to no other.
        variable = "OPENAI_API_KEY" if name == _UNNAMED else f"{name.upper().replace('-', '_')}_API_KEY"
        if variable in _OWN_VARIABLES:
            raise InputError(f"--upstream {name}=...: {variable} is another server's key; choose another name")
        former = names.setdefault(variable, name)
        if former != name:
            raise InputError(
                f"--upstream {name}=...: its key would be read from {variable}, which is that of the upstream "
                f"{former!r}; choose another name"
            )
        found.append(UpstreamSettings(name, url, environment.get(variable, "")))
    return tuple(found)


def read_fallback(text: str, environment: Mapping[str, str]) -> tuple[UpstreamSettings, str | None]:
    """Return the server of `--fallback URL` or `URL#MODEL`, and the model, if any; raises InputError."""
    url, _, model = text.partition("#")
    if not url.startswith(("http://", "https://")):
        raise InputError(f"--fallback {text}: must be URL or URL#MODEL, such as http://127.0.0.1:8000/v1#qwen2.5")
    return UpstreamSettings("fallback", url, environment.get("FALLBACK_API_KEY", "")), model or None


def check_host(host: str, keyless: bool, no_auth: bool) -> None:
    """Refuse to serve a network without keys unless `--no-auth` is given; raises InputError."""
    if keyless and not no_auth and not is_loopback(host):
        raise InputError(
            f"--host {host}: without keys only this machine is served, as 127.0.0.1; set {KEYS_VARIABLE} to the "
            "clients' keys, separated by commas, or serve everybody with --no-auth"
        )


def description(gateway: "Gateway", address: str, corrector: str | None, store: str | None) -> list[tuple[str, str]]:
    """Return (label, text) lines on what the gateway serves; a password in the store's address is hidden."""
    settings, root = gateway.settings, address.removesuffix("/v1")
    access = settings.access
    shown = root + access.root_path
    keys = {1: "1 key"}.get(gateway.keys.count, f"{gateway.keys.count} keys")
    if not gateway.keys.needed:
        keys = (
            "none; everybody who reaches the port is served" if access.no_auth else "none; only this machine is served"
        )
    lines = [
        ("playground", f"{shown}/"),
        ("dashboard", f"{shown}/dashboard"),
        ("mode", gateway.parser.mode),
        *([("streams", "corrected by sentence")] if settings.stream_by == "sentence" else []),
        ("corrector", "none" if corrector is None else f"{corrector}, version {gateway.corrections.version}"),
        ("store", "none" if store is None else re.sub(r"(?<=//)([^/@]*):[^/@]*(?=@)", r"\1:***", store)),
        ("keys", keys),
    ]
    lines += [
        ("upstream", f"{one.name}, {one.url}{'' if one.key else ', without a key'}") for one in settings.upstreams
    ]
    return lines if settings.fallback is None else [*lines, ("fallback", settings.fallback.url)]


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket; raises InputError if the address cannot be used."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port}: must be from 0 (any that is free) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise InputError(f"--host {host}: is not a name or address of this machine") from None
    # With the protocol's number: without it, asyncio does not disable Nagle's delay of small packets (40 ms).
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(_BACKLOG)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            advice = "another program listens there; end it, or choose another port (0 for any that is free)"
            raise InputError(f"--port {port}: {advice}") from None
        if error.errno == errno.EACCES:
            raise InputError(f"--port {port}: is not allowed to this user; choose 1024 or higher") from None
        raise InputError(f"--host {host}: cannot listen there: {error.strerror}") from None
    return found


def address_of(listening: socket.socket) -> str:
    """Return the clients' base URL for a socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def serve(app: "FastAPI", listening: socket.socket, ready: Callable[[], None], warn: Callable[[str], None]) -> None:
    """Serve until a signal; requests in progress then have 30 seconds to finish.

    `ready` is called when requests are answered, `warn` with warnings about the gateway's state at that time.

    Raises:
        EveralignError: the server could not start.
    """
    server = make_server(app)
    app.state.ready, app.state.warn = ready, warn
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        return  # the usual end: requests in progress are finished
    if not server.started:
        raise EveralignError("the server could not start; what is printed above says why")


def make_server(app: "FastAPI") -> "uvicorn.Server":
    """Return a server of a gateway, with its settings' limits on connections."""
    import uvicorn
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    table = ConnectionTable(app.state.gateway.settings)
    protocol: Any = type("LimitedProtocol", (_LimitedProtocol, AutoHTTPProtocol), {"table": table})
    # Uvicorn's own log would show whole paths, and its proxy headers believe anybody: see telemetry and
    # --trusted-proxy.
    config = uvicorn.Config(
        app,
        http=protocol,
        access_log=False,
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    return uvicorn.Server(config)


def _client_connections(concurrency: int) -> int:
    """Return how many connections clients may have beside those to upstreams; raises the limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    files = _MOST_FILES if soft == resource.RLIM_INFINITY else soft
    return max(files // 4, files - concurrency - _SPARE_FILES)
