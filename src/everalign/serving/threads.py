"""Blocking calls in threads that never keep the process from ending, even where the call never returns."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import TypeVar

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
