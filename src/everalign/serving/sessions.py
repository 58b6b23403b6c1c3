"""Browsers that have signed in: a cookie that says whose key it was, signed so that nobody can write one.

    sessions = Sessions()
    session = sessions.begin(key_id)
    sessions.read(sessions.cookie(session)), sessions.token(session)

The secret is this process's own: after a restart, and at another replica, one signs in again.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

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
