"""Which addresses the gateway sends requests to.

They come from the operator alone, on the command line, never from a request: so loopback and private networks are
allowed, where operators do run their models. What no operator means are the addresses at which clouds hand out
credentials. An address is taken apart by httpx, which also fetches it: two readers of one address are how such rules
are got around (CVE-2026-24779). Redirects are never followed.
"""

import ipaddress
import socket
from collections.abc import Callable, Iterable

import httpx

from everalign.chat_arguments import checked_url
from everalign.errors import InputError

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
