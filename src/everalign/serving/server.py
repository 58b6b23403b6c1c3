"""The gateway's process: its socket, its server, and how both end."""

import errno
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from everalign.errors import EveralignError, InputError
from everalign.serving.auth import is_loopback
from everalign.serving.settings import UpstreamSettings

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from everalign.serving.gateway import Gateway

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
        ("mode", gateway.desk.mode),
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

    from everalign.serving.client_connections import ConnectionLimits, client_protocol, spare_files

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
