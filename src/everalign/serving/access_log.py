"""One line of JSON for each request: when, who, what, how it ended; nothing of what was asked or answered."""

import json
import logging
import sys
import time
from datetime import datetime, timezone
from logging.handlers import WatchedFileHandler
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from everalign.errors import InputError

_log = logging.getLogger("everalign.access")
_TOLD = {
    "id": "x-everalign-id",
    "request_id": "x-request-id",
    "mode": "x-everalign-mode",
    "correction": "x-everalign-correction",
    "corrector": "x-everalign-corrector",
}
_LONGEST = 200  # characters of a header


class AccessLog:
    """Writes a line when a request has ended. The path is the route's: what stands in it could be anything.

    Args:
        app: what is behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection, as ASGI has it."""
        if scope["type"] != "http" or not _log.isEnabledFor(logging.INFO):
            await self._app(scope, receive, send)
            return
        started, ended, sizes = time.perf_counter(), False, {"received": 0, "sent": 0}
        status, told = 0, Headers()

        async def received() -> Message:
            message = await receive()
            sizes["received"] += len(message.get("body", b""))
            return message

        async def sent(message: Message) -> None:
            nonlocal status, told, ended
            if message["type"] == "http.response.start":
                status, told = message["status"], Headers(raw=message["headers"])
            sizes["sent"] += len(message.get("body", b""))
            await send(message)
            ended = ended or (message["type"] == "http.response.body" and not message.get("more_body", False))

        state = scope.setdefault("state", {})
        try:
            await self._app(scope, received, sent)
        finally:
            client = scope.get("client")
            line = {
                "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
                "method": scope["method"],
                "route": state.get("route"),
                "status": status,
                "whole": ended,
                "seconds": round(time.perf_counter() - started, 4),
                **sizes,
                "key": state.get("key_id") or None,
                "client": client[0] if client else None,
                **{name: told[header][:_LONGEST] for name, header in _TOLD.items() if header in told},
            }
            _log.info("%s", json.dumps(line))


def write_access_log(where: str) -> None:
    """Let the lines be written: to a file, which may be moved away meanwhile, or to standard error for `-`.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        handler = (
            logging.StreamHandler(sys.stderr) if where == "-" else WatchedFileHandler(Path(where), encoding="utf-8")
        )
    except OSError as error:
        raise InputError(f"--access-log {where}: cannot be written: {error.strerror}") from None
    handler.setFormatter(logging.Formatter("%(message)s"))
    _log.handlers = [handler]
    _log.setLevel(logging.INFO)
    _log.propagate = False
