"""Authentication: hashed API keys with allowances, and signed, revocable browser sessions."""

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

SESSION_SECONDS = 12 * 3600

LOCAL = "local"
"""The key id of clients of a gateway without keys."""

_log = logging.getLogger(__name__)
_ID_DIGITS = 12
_KEY_FILE_CHECK_SECONDS = 1.0
# Headers of a proxy. A proxy that adds no header and connects to 127.0.0.1 cannot be told from a client; the oldest
# ones, which speak HTTP/1.0, can.
_PROXY_HEADERS = re.compile(
    r"forwarded|(client|real|user|remote|source|socket|connecting|originating)-?(ip|addr)|original-(url|host)|^via$"
    r"|^cdn-loop$|^(cf|fly|x-envoy|x-goog-iap|x-amzn|x-amz-cf|x-ms-client-principal|x-azure|x-arr|x-appgw|x-vercel|x-nf"
    r"|x-cloud-trace|x-appengine|x-akamai|fastly|x-tailscale|tailscale|x-auth-request|remote)-"
)


@dataclass(frozen=True)
class Session:
    """A browser session; the `key_id` is empty before signing in, `expires` is in seconds of the server's clock."""

    key_id: str
    nonce: str
    expires: int


class Sessions:
    """Creates, verifies and revokes sessions. Cookies are signed; only revoked sessions are stored.

    They end with the process, so that its own clock will do: one that nobody sets cannot go back, which would prolong
    sessions and forget that they were revoked.
    """

    def __init__(self, seconds: int = SESSION_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._clock = seconds, clock
        self._secret = secrets.token_bytes(32)
        self._revoked: dict[str, int] = {}

    def begin(self, key_id: str) -> Session:
        """Return a new session of a key; an empty id for a browser that has not signed in."""
        return Session(key_id, secrets.token_hex(16), int(self._clock()) + self.seconds)

    def end(self, session: Session) -> None:
        """Revoke a session: its cookie is refused from now on."""
        now = self._clock()
        self._revoked = {nonce: expires for nonce, expires in self._revoked.items() if expires > now}
        self._revoked[session.nonce] = session.expires

    def cookie(self, session: Session) -> str:
        text = f"{session.key_id}.{session.nonce}.{session.expires}"
        return f"{text}.{self._signature('session', text)}"

    def read(self, cookie: str) -> Session | None:
        """Return the session of a cookie; None if it is forged, revoked or expired."""
        text, _, signature = cookie.rpartition(".")
        # As bytes, because `compare_digest` refuses text that is not ASCII.
        if not hmac.compare_digest(self._signature("session", text).encode(), signature.encode(errors="replace")):
            return None
        key_id, nonce, expires = text.split(".")
        session = Session(key_id, nonce, int(expires))
        return None if session.expires <= self._clock() or nonce in self._revoked else session

    def token(self, session: Session) -> str:
        """Return the CSRF token for the forms of a session."""
        return self._signature("form", session.nonce)

    def is_token(self, session: Session, token: str) -> bool:
        return hmac.compare_digest(self.token(session).encode(), token.encode(errors="replace"))

    def _signature(self, use: str, text: str) -> str:
        return hmac.new(self._secret, f"{use}:{text}".encode(errors="replace"), hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Allowance:
    """What one key may use; None for no limit.

    Args:
        requests_per_minute: requests started in a minute.
        tokens_per_day: tokens of prompts and answers since midnight UTC; the request that exceeds it is the last one.
    """

    requests_per_minute: int | None = None
    tokens_per_day: int | None = None


UNLIMITED = Allowance()


class Keys:
    """The clients' API keys, stored as hashes.

    Args:
        keys: the keys; with none at all, only this machine is served.
        file: has further ones and is read again when it changes; see `read_key_file`.
        no_auth: if there are no keys, serve everybody.
        origins: web pages that may use a gateway without keys, besides those of this machine.
        clock: monotonic seconds.

    Raises:
        InputError: a key is empty or cannot be a header, the file cannot be read, or there are keys besides `no_auth`.
    """

    def __init__(
        self,
        keys: Iterable[str] = (),
        file: Path | None = None,
        no_auth: bool = False,
        origins: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._given: dict[str, Allowance | None] = dict.fromkeys(_digest(key, "EVERALIGN_API_KEYS") for key in keys)
        self._file, self._no_auth, self._origins, self._clock = file, no_auth, frozenset(origins), clock
        self._checked_at, self._file_state = clock(), _file_state(file)
        self._set({} if file is None else read_key_file(file))
        if no_auth and self._known:
            raise InputError("--no-auth: there are keys; leave it out, or unset EVERALIGN_API_KEYS and --keys-file")

    def _set(self, of_file: Mapping[str, Allowance | None]) -> None:
        self._known = {**self._given, **of_file}
        self._by_id = {digest[:_ID_DIGITS]: allowance for digest, allowance in self._known.items()}

    @property
    def needed(self) -> bool:
        return bool(self._known)

    @property
    def count(self) -> int:
        return len(self._known)

    def allowance(self, key_id: str) -> Allowance | None:
        """Return a key's allowance in the key file; None if it has none there."""
        return self._by_id.get(key_id)

    def knows(self, key_id: str) -> bool:
        self._reload()
        return key_id in self._by_id

    def id_of(self, key: str) -> str | None:
        """Return the id of a key; None if it is unknown."""
        digest = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()
        # Compares with all keys, so that the time does not show which one matched.
        matches = [hmac.compare_digest(digest, known) for known in self._known]
        return digest[:_ID_DIGITS] if any(matches) else None

    def identify(self, headers: Mapping[str, str], peer: str | None, http_version: str = "1.1") -> str:
        """Return the id of a request's key.

        Raises:
            GatewayError: 401 without a valid key; 403 if there are no keys and the request is not of this machine.
        """
        self._reload()
        if self._known:
            scheme, _, bearer = headers.get("authorization", "").partition(" ")
            bearer = bearer if scheme.lower() == "bearer" else ""
            for key in (bearer, headers.get("api-key", ""), headers.get("x-api-key", "")):
                if key.strip() and (key_id := self.id_of(key.strip())) is not None:
                    return key_id
            message = "no valid API key: send one that the gateway knows as Authorization: Bearer KEY, or as x-api-key"
            advice = {"www-authenticate": "Bearer", "x-should-retry": "false"}
            raise GatewayError(401, message, INVALID, "invalid_api_key", headers=advice)
        if not self._no_auth and not self._is_local(headers, peer, http_version):
            message = (
                "no keys are set, so that only this machine itself is served, as 127.0.0.1 and by no proxy; the "
                "operator can set EVERALIGN_API_KEYS, or open the gateway to everybody with --no-auth"
            )
            raise GatewayError(403, message, INVALID, "not_local", headers={"x-should-retry": "false"})
        return LOCAL

    def _is_local(self, headers: Mapping[str, str], peer: str | None, http_version: str) -> bool:
        """Whether a request was sent from this machine, neither by a proxy nor by a page of another site."""
        if http_version == "1.0" or any(_PROXY_HEADERS.search(name) for name in headers):
            return False
        # Any web page can make this machine's browser send forms here; the browser names the page's site.
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins:
            try:
                site = urlsplit(origin).hostname or ""
            except ValueError:
                return False
            if not is_loopback(site):
                return False
        host = headers.get("host", "")
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        return is_loopback(peer or "") and is_loopback(name)

    def _reload(self) -> None:
        """Read the key file again if it has changed; if it cannot be read, the keys stay as they were."""
        now = self._clock()
        if self._file is None or now < self._checked_at + _KEY_FILE_CHECK_SECONDS:
            return
        self._checked_at = now
        if (state := _file_state(self._file)) == self._file_state:
            return
        self._file_state = state
        try:
            self._set(read_key_file(self._file))
            _log.warning("%s: has changed; %d keys are known now", self._file, len(self._known))
        except InputError as error:
            _log.error("%s; the previous keys stay in use", error)


def read_key_file(path: Path) -> dict[str, Allowance | None]:
    """Return the hashes of a file's keys, with their allowances.

    A line is a key, then its limits: `requests_per_minute=60 tokens_per_day=100000`. `#` begins a comment.

    Raises:
        InputError: the file cannot be read or has no keys, or a line is wrong; names its number, never the key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(f"--keys-file {path}: cannot be read: {reason}") from None
    found: dict[str, Allowance | None] = {}
    for number, line in enumerate(lines, start=1):
        where = f"--keys-file {path}, line {number}"
        key, *limits = line.partition("#")[0].split() or [""]
        if not key:
            continue
        digest = _digest(key, where)
        if digest in found:
            raise InputError(f"{where}: is the key of an earlier line; leave one of them out")
        values: dict[str, int] = {}
        for limit in limits:
            name, _, value = limit.partition("=")
            if name not in Allowance.__dataclass_fields__ or name in values:
                raise InputError(
                    f"{where}: a key may be followed by requests_per_minute=N and tokens_per_day=N, each once"
                )
            if not (value.isascii() and value.isdigit() and int(value) > 0):
                raise InputError(f"{where}: {name} must be a whole number of at least 1")
            values[name] = int(value)
        found[digest] = Allowance(**values) if values else None
    if not found:
        raise InputError(f"--keys-file {path}: has no keys; write one a line")
    return found


def _digest(key: str, where: str) -> str:
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"{where}: a key is empty or has characters other than letters, digits and punctuation")
    return hashlib.sha256(key.encode()).hexdigest()


def _file_state(file: Path | None) -> tuple[int, int, int] | None:
    """Return a value that changes when the file is written; None if there is no file."""
    try:
        found = None if file is None else os.stat(file)
    except OSError:
        return None
    return None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own loopback."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return bool((getattr(address, "ipv4_mapped", None) or address).is_loopback)
