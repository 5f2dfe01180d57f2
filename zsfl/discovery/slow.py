"""Calls that may take for ever, such as a name server's or a network disk's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

_Result = TypeVar("_Result")


class Slow(Generic[_Result]):
    """One call again and again, each in a thread that nobody waits for at the end, and never two at once."""

    def __init__(self, call: Callable[[], _Result]) -> None:
        self._call = call
        self._running: Future[_Result] | None = None

    async def result(self, within_s: float) -> _Result:
        """What the call returns or raises; TimeoutError where that takes longer: the next one waits on for it."""
        running = self._running
        if running is None:
            running = self._running = Future()
            threading.Thread(target=self._run, args=(running,), name="zsfl-slow", daemon=True).start()
        here = asyncio.wrap_future(running)
        here.add_done_callback(lambda done: done.cancelled() or done.exception())  # it is seen below
        await asyncio.wait({here}, timeout=within_s)
        if not running.done():
            raise TimeoutError(f"no answer within {within_s:g} s")
        self._running = None
        return running.result()

    def _run(self, running: Future[_Result]) -> None:
        try:
            running.set_result(self._call())
        except Exception as error:
            running.set_exception(error)
