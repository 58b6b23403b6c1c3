"""Deadlines for blocking work, and threads that never keep the process alive."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from threading import Thread
from typing import TypeVar

from everalign.errors import EveralignError

_Result = TypeVar("_Result")

_current: ContextVar["Deadline | None"] = ContextVar("everalign_deadline", default=None)


class DeadlineOver(EveralignError):  # noqa: N818 (what is wrong is in the name)
    """The time for the work is over, or it was cancelled."""


class Deadline:
    """A time limit that can also be cancelled; threads may share it.

    Args:
        seconds: from now on.
        retries: how often a failed request may be repeated, since a client is waiting.
    """

    def __init__(self, seconds: float, retries: int = 1) -> None:
        self.retries = retries
        self._until = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._cancelled = False
        self._callbacks: list[Callable[[], object]] = []

    @property
    def left(self) -> float:
        """Seconds left; 0 when it is over or cancelled."""
        return 0.0 if self._cancelled else max(0.0, self._until - time.monotonic())

    def check(self) -> None:
        """Raise DeadlineOver if it is over."""
        if not self.left:
            raise DeadlineOver("the time for this work is over")

    def cancel(self) -> None:
        """End it now."""
        with self._lock:
            self._cancelled = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    @contextmanager
    def calling(self, callback: Callable[[], object]) -> Iterator[None]:
        """Call `callback` if the deadline is cancelled during the block; at once if it is already."""
        with self._lock:
            cancelled = self._cancelled
            if not cancelled:
                self._callbacks.append(callback)
        if cancelled:
            callback()
        try:
            yield
        finally:
            with self._lock:
                self._callbacks = [one for one in self._callbacks if one is not callback]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make it the current deadline of this thread during the block."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


def current() -> Deadline | None:
    """Return this thread's current deadline, if any."""
    return _current.get()


def call_in_thread(call: Callable[[], _Result], name: str) -> "asyncio.Future[_Result]":
    """Start a call in a daemon thread of its own; return a future of its result. Cancelling it does not end the call.

    Unlike `asyncio.to_thread`, a call that hangs does not keep the process from ending.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Result] = loop.create_future()

    def run() -> None:
        finish: Callable[[], object]
        try:
            finish = partial(future.set_result, call())
        except BaseException as error:  # noqa: BLE001 (raised by the future)
            finish = partial(future.set_exception, error)
        with suppress(RuntimeError):  # the loop is closed
            # Nothing is set any more where the future was cancelled meanwhile.
            loop.call_soon_threadsafe(lambda: future.done() or finish())

    Thread(target=run, name=name, daemon=True).start()
    return future
