"""Time limits on blocking work, and threads that never keep the process from ending."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from threading import Thread
from typing import TypeVar

from everalign.errors import EveralignError

_current: ContextVar["Deadline | None"] = ContextVar("everalign_deadline", default=None)


class DeadlineOver(EveralignError):  # noqa: N818 (what is wrong is in the name)
    """Work that came to its time limit, or that nobody waits for any more."""


class Deadline:
    """When work has to be done.

    Args:
        seconds: from now on.
        retries: how often a request that failed may be repeated meanwhile: somebody waits.
    """

    def __init__(self, seconds: float, retries: int = 1) -> None:
        self.retries = retries
        self._until = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._cancelled = False
        self._calls: list[Callable[[], object]] = []

    @property
    def left(self) -> float:
        """Seconds that are left; 0 when it is over."""
        return 0.0 if self._cancelled else max(0.0, self._until - time.monotonic())

    def check(self) -> None:
        """Raise DeadlineOver when it is over."""
        if not self.left:
            raise DeadlineOver("the time for this work is over")

    def cancel(self) -> None:
        """Let it be over now."""
        with self._lock:
            self._cancelled = True
            calls, self._calls = self._calls, []
        for call in calls:
            call()

    @contextmanager
    def calling(self, call: Callable[[], object]) -> Iterator[None]:
        """Have something called when it is cancelled meanwhile; at once where it is already."""
        with self._lock:
            cancelled = self._cancelled
            if not cancelled:
                self._calls.append(call)
        if cancelled:
            call()
        try:
            yield
        finally:
            with self._lock:
                self._calls = [one for one in self._calls if one is not call]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Bound what this thread does inside."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


def current() -> Deadline | None:
    """Return the deadline of what this thread does; None where there is none."""
    return _current.get()


def check_deadline() -> None:
    """Raise DeadlineOver where this thread's work has a deadline, and it is over."""
    deadline = _current.get()
    if deadline is not None:
        deadline.check()


_Result = TypeVar("_Result")


def call_in_thread(call: Callable[[], _Result], name: str) -> "asyncio.Future[_Result]":
    """Begin a call in a thread of its own, and return what will have its result. To cancel that does not end the call.

    Executors of the standard library wait for their threads at the end of the process.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Result] = loop.create_future()

    def finish(result: _Result | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # there is a result where there is no error

    def run() -> None:
        result, failed = None, None
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 (it is given to who waits)
            failed = error
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(finish, result, failed)

    Thread(target=run, name=name, daemon=True).start()
    return future
