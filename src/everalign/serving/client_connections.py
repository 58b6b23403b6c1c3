"""Connections of clients, which have to be of use: those that say nothing make room for those that do.

uvicorn bounds how long a connection is idle between two requests, and nothing else. Here it has a time for the head of
each request and a time for reading what it was sent. Where an address has as many connections as it may, or all have,
the oldest that has no request under way makes room; if all have one, the new connection is turned away.
"""

import asyncio
import ipaddress
import resource
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from everalign.serving.errors import overloaded
from everalign.serving.sse import json_bytes

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
