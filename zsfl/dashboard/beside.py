"""What is served beside a node or a run, in a thread with an event loop of its own: neither waits for the other."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

LEAVE_S = 5.0
"""What it may take to end."""


class Beside:
    """Runs `serve` from `open` to `close`; should it fail meanwhile, that is a line of text, and no more."""

    def __init__(self, what: str, serve: Callable[[Callable[[str], None]], Coroutine[Any, Any, None]]) -> None:
        """`what` it is, for people; `serve` is given what to call with the address, once it serves."""
        self._what = what
        self._serve = serve
        self._opened = Future[str]()
        self._loop: asyncio.AbstractEventLoop
        self._ended: asyncio.Event
        self._thread = threading.Thread(target=self._run, name="zsfl-beside", daemon=True)

    def open(self) -> str:
        """The address, once it is served; raises what is in the way of that."""
        self._thread.start()
        return self._opened.result()

    def soon(self, call: Callable[[], object]) -> None:
        """Have the thread make this call, if it still serves."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call)

    def close(self) -> None:
        """End it, unless it has ended."""
        if self._thread.is_alive():
            self.soon(self._ended.set)
            self._thread.join(LEAVE_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._until_ended())
        except Exception as error:
            if self._opened.done():
                warn(f"{self._what} has ended: {error}")
            else:
                self._opened.set_exception(error)

    async def _until_ended(self) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        serving = asyncio.ensure_future(self._serve(self._opened.set_result))
        ended = asyncio.ensure_future(self._ended.wait())
        await asyncio.wait({serving, ended}, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving


def warn(message: str) -> None:
    """One line for people."""
    print(f"zsfl: {message}", file=sys.stderr, flush=True)
