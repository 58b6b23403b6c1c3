"""Who may use the gateway.

With keys, whoever sends one as `Authorization: Bearer KEY`. Without any, whoever sits at the same machine: the
connection must come from a loopback address and not through a proxy, and the request must be for a loopback name,
since a web page can make a browser's own name lead here (DNS rebinding).
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Mapping

from everalign.errors import InputError
from everalign.serving.errors import INVALID, GatewayError

LOCAL = "local"
"""What the key is called where none is needed."""

_ID_DIGITS = 12
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")


class Keys:
    """The clients' keys, of which only hashes are held.

    Args:
        keys: the keys; none for loopback alone.

    Raises:
        InputError: a key is empty, or no header could hold it.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        given = list(keys)
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in given):
            raise InputError("EVERALIGN_API_KEYS: a key is empty or has other than letters, digits and signs")
        self._digests = [hashlib.sha256(key.encode()).hexdigest() for key in given]

    @property
    def needed(self) -> bool:
        """Whether there are any."""
        return bool(self._digests)

    def identify(self, headers: Mapping[str, str], peer: str | None) -> str:
        """Return the id of the key that a request came with.

        Args:
            headers: of the request, names in small letters.
            peer: the address that the connection comes from.

        Raises:
            GatewayError: 401 or 403.
        """
        if not self._digests:
            _check_local(headers, peer)
            return LOCAL
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key_id = self.id_of(key.strip())
        if scheme.lower() != "bearer" or key_id is None:
            message = "no valid API key: send one that the gateway knows as Authorization: Bearer KEY"
            advice = {"www-authenticate": "Bearer", "x-should-retry": "false"}
            raise GatewayError(401, message, INVALID, "invalid_api_key", headers=advice)
        return key_id

    def id_of(self, key: str) -> str | None:
        """Return the id of a key; None for one that is not known."""
        digest = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()
        # All are compared, so that the time tells nothing about which one it was.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest[:_ID_DIGITS] if any(matches) else None


def _check_local(headers: Mapping[str, str], peer: str | None) -> None:
    """Refuse whoever does not sit at this machine; raises GatewayError 403."""
    proxied = any(name in headers for name in _FORWARDED)
    if proxied or not is_loopback(peer or "") or not is_loopback(_host(headers.get("host", ""))):
        message = "no keys are set (EVERALIGN_API_KEYS), so that only this machine itself is served, as 127.0.0.1"
        raise GatewayError(403, message, INVALID, "not_local", headers={"x-should-retry": "false"})


def is_loopback(host: str) -> bool:
    """Whether a name or address can be reached from the same machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _host(text: str) -> str:
    """A Host header without its port."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]
