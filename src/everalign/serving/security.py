"""Authentication: API keys per client, and signed, revocable browser sessions."""

import hashlib
import hmac
import ipaddress
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from everalign.errors import InputError
from everalign.serving.errors import INVALID, GatewayError

SECONDS = 12 * 3600
"""How long a session lasts."""


@dataclass(frozen=True)
class Session:
    """One browser.

    Args:
        key_id: of the key that it signed in with; empty before it did.
        nonce: tells sessions apart.
        expires: when it ends, in seconds since 1970.
    """

    key_id: str
    nonce: str
    expires: int


class Sessions:
    """Makes and checks sessions; those that were ended are all that it remembers.

    Args:
        seconds: how long one lasts.
        clock: seconds since 1970.
    """

    def __init__(self, seconds: int = SECONDS, clock: Callable[[], float] = time.time) -> None:
        self.seconds, self._clock = seconds, clock
        self._secret = secrets.token_bytes(32)
        self._ended: dict[str, int] = {}

    def begin(self, key_id: str) -> Session:
        """Return a new session of a key; of none where that is empty."""
        return Session(key_id, secrets.token_hex(16), int(self._clock()) + self.seconds)

    def end(self, session: Session) -> None:
        """Let a session's cookie count for nothing from now on."""
        now = self._clock()
        self._ended = {nonce: expires for nonce, expires in self._ended.items() if expires > now}
        self._ended[session.nonce] = session.expires

    def cookie(self, session: Session) -> str:
        """Return a session as a cookie's value."""
        text = f"{session.key_id}.{session.nonce}.{session.expires}"
        return f"{text}.{self._signed('session', text)}"

    def read(self, cookie: str) -> Session | None:
        """Return the session of a cookie; None for one that is not from here, that has ended or that is too old."""
        text, _, signature = cookie.rpartition(".")
        # Compared as bytes: as text, letters that are not ASCII would be an error.
        if not hmac.compare_digest(self._signed("session", text).encode(), signature.encode(errors="replace")):
            return None
        key_id, nonce, expires = text.split(".")
        found = Session(key_id, nonce, int(expires))
        return None if found.expires <= self._clock() or nonce in self._ended else found

    def token(self, session: Session) -> str:
        """Return what a form of this session must hold, so that no other site can send it."""
        return self._signed("form", session.nonce)

    def is_token(self, session: Session, token: str) -> bool:
        """Whether a form's token is the session's."""
        return hmac.compare_digest(self.token(session).encode(), token.encode(errors="replace"))

    def _signed(self, use: str, text: str) -> str:
        content = f"{use}:{text}".encode(errors="replace")
        return hmac.new(self._secret, content, hashlib.sha256).hexdigest()


LOCAL = "local"
"""What the key is called where none is needed."""

_log = logging.getLogger(__name__)
_ID_DIGITS = 12
_LOOK_SECONDS = 1.0
# Anything that says that a request came by way of somebody else. A proxy that says nothing at all and calls by the
# name 127.0.0.1 cannot be told from a client; the oldest of them, which speak HTTP/1.0, can.
_RELAYED = re.compile(
    r"forwarded|(client|real|user|remote|source|socket|connecting|originating)-?(ip|addr)|original-(url|host)|^via$"
    r"|^cdn-loop$|^(cf|fly|x-envoy|x-goog-iap|x-amzn|x-amz-cf|x-ms-client-principal|x-azure|x-arr|x-appgw|x-vercel|x-nf"
    r"|x-cloud-trace|x-appengine|x-akamai|fastly|x-tailscale|tailscale|x-auth-request|remote)-"
)


@dataclass(frozen=True)
class Allowance:
    """What one key may use; None for as much as there is.

    Args:
        requests_per_minute: begun in a minute.
        tokens_per_day: of prompts and answers, from midnight UTC on; a request that passes the limit is the last one.
    """

    requests_per_minute: int | None = None
    tokens_per_day: int | None = None


UNLIMITED = Allowance()


class Keys:
    """The clients' keys, of which only hashes are held.

    Args:
        keys: the keys; none for this machine alone.
        file: has further ones; see `read_key_file`.
        no_auth: serve whoever comes, where there are no keys.
        origins: of web pages that may use a gateway without keys, besides those of this machine.
        clock: seconds that only grow.

    Raises:
        InputError: a key is empty, or no header could hold it; the file cannot be read; or `no_auth` has no sense
            beside keys.
    """

    def __init__(
        self,
        keys: Iterable[str] = (),
        file: Path | None = None,
        no_auth: bool = False,
        origins: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._given = dict.fromkeys(_digest(_checked(key, "EVERALIGN_API_KEYS")) for key in keys)
        self._file, self._open, self._origins, self._clock = file, no_auth, frozenset(origins), clock
        self._looked, self._changed = clock(), _state_of(file)
        self._hold({} if file is None else read_key_file(file))
        if no_auth and self._known:
            raise InputError("--no-auth: there are keys; leave it out, or unset EVERALIGN_API_KEYS and --keys-file")

    @property
    def needed(self) -> bool:
        """Whether there are any."""
        return bool(self._known)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._known)

    def allowance(self, key_id: str) -> Allowance | None:
        """Return what the file of keys says that a key may use; None where it says nothing."""
        return self._by_id.get(key_id)

    def identify(self, headers: Mapping[str, str], peer: str | None, http_version: str = "1.1") -> str:
        """Return the id of the key that a request came with.

        Args:
            headers: of the request, names in small letters.
            peer: the address that the connection comes from.
            http_version: of the request.

        Raises:
            GatewayError: 401 or 403.
        """
        self._read_again()
        if not self._known:
            if not self._open:
                self._check_local(headers, peer, http_version)
            return LOCAL
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        bearer = bearer if scheme.lower() == "bearer" else ""
        for key in (bearer, headers.get("api-key", ""), headers.get("x-api-key", "")):
            if key.strip() and (key_id := self.id_of(key.strip())) is not None:
                return key_id
        message = "no valid API key: send one that the gateway knows as Authorization: Bearer KEY, or as x-api-key"
        advice = {"www-authenticate": "Bearer", "x-should-retry": "false"}
        raise GatewayError(401, message, INVALID, "invalid_api_key", headers=advice)

    def knows(self, key_id: str) -> bool:
        """Whether there still is a key of an id."""
        self._read_again()
        return key_id in self._by_id

    def id_of(self, key: str) -> str | None:
        """Return the id of a key; None for one that is not known."""
        digest = _digest(key)
        # All are compared, so that the time tells nothing about which one it was.
        matches = [hmac.compare_digest(digest, known) for known in self._known]
        return digest[:_ID_DIGITS] if any(matches) else None

    def _hold(self, of_file: Mapping[str, Allowance | None]) -> None:
        self._known: dict[str, Allowance | None] = {**self._given, **of_file}
        self._by_id = {digest[:_ID_DIGITS]: own for digest, own in self._known.items()}

    def _read_again(self) -> None:
        """Read the file anew if it has changed; one that cannot be read leaves the keys that were."""
        now = self._clock()
        if self._file is None or now < self._looked + _LOOK_SECONDS:
            return
        self._looked = now
        if (state := _state_of(self._file)) == self._changed:
            return
        self._changed = state
        try:
            self._hold(read_key_file(self._file))
            _log.warning("%s: has changed; %d keys are known now", self._file, len(self._known))
        except InputError as error:
            _log.error("%s; the keys are those of before", error)

    def _check_local(self, headers: Mapping[str, str], peer: str | None, http_version: str) -> None:
        """Refuse whoever does not sit at this machine, and what came by a proxy; raises GatewayError 403."""
        relayed = any(_RELAYED.search(name) for name in headers)
        origin = headers.get("origin")
        # A page of another site can send forms here without asking; its browser says where it is from.
        foreign = origin is not None and origin not in self._origins and not is_loopback(_host_of_origin(origin))
        here = is_loopback(peer or "") and is_loopback(_host(headers.get("host", "")))
        if relayed or foreign or not here or http_version == "1.0":
            message = (
                "no keys are set, so that only this machine itself is served, as 127.0.0.1 and by no proxy; the "
                "operator can set EVERALIGN_API_KEYS, or open the gateway to everybody with --no-auth"
            )
            raise GatewayError(403, message, INVALID, "not_local", headers={"x-should-retry": "false"})


def read_key_file(path: Path) -> dict[str, Allowance | None]:
    """Return the hashes of a file's keys, and what each may use.

    A line is a key, and behind it what it may use: `requests_per_minute=60 tokens_per_day=100000`. Behind `#` is a
    comment.

    Raises:
        InputError: it cannot be read, a line is wrong (its number is named, never the key), or it has no key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8"
        raise InputError(f"--keys-file {path}: cannot be read: {reason}") from None
    found: dict[str, Allowance | None] = {}
    for number, line in enumerate(lines, start=1):
        key, *limits = line.partition("#")[0].split() or [""]
        if not key:
            continue
        digest = _digest(_checked(key, f"--keys-file {path}, line {number}"))
        if digest in found:
            raise InputError(f"--keys-file {path}, line {number}: is the key of an earlier line; leave one of them out")
        found[digest] = _read_allowance(limits, f"--keys-file {path}, line {number}") if limits else None
    if not found:
        raise InputError(f"--keys-file {path}: has no keys; write one a line")
    return found


def _read_allowance(limits: list[str], where: str) -> Allowance:
    values: dict[str, int] = {}
    for text in limits:
        name, _, number = text.partition("=")
        if name not in Allowance.__dataclass_fields__ or name in values:
            raise InputError(f"{where}: behind a key stand requests_per_minute=N and tokens_per_day=N, each once")
        if not (number.isascii() and number.isdigit() and int(number) > 0):
            raise InputError(f"{where}: {name} must be a whole number of at least 1")
        values[name] = int(number)
    return Allowance(**values)


def _checked(key: str, where: str) -> str:
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"{where}: a key is empty or has other than letters, digits and signs")
    return key


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def _state_of(file: Path | None) -> tuple[int, int, int] | None:
    """What tells a file that was written again from what it was."""
    try:
        found = None if file is None else os.stat(file)
    except OSError:
        return None
    return None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)


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


def _host_of_origin(origin: str) -> str:
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""
