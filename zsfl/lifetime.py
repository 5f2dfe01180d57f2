"""How long a node lives: tasks that do as long as it does, and who may ask it to leave."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

Listen = Callable[[Callable[[], None]], None]
"""Is given, in a node's event loop, what to call there whenever the node is to leave."""


def on_signals(asked: Callable[[], None]) -> None:
    """SIGTERM and Ctrl-C ask it to."""
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, asked)


@contextmanager
def staying() -> Iterator[None]:
    """What is loaded inside is never looked through for garbage, which would take a tenth of the time: it stays."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class Lifetime:
    """The tasks of one side of a node: the failure of one ends them all, and so does the end of the main one.

    Peers are lost and heard of at any moment, also in the last one; a `TaskGroup` that ends refuses whatever is begun
    for them then, which is no fault of the node.
    """

    def __init__(self) -> None:
        self._group: asyncio.TaskGroup | None = None
        self._started: set[asyncio.Task[None]] = set()
        self._ending = False

    async def run(self, main: Coroutine[Any, Any, None]) -> None:
        """Live until `main` returns; raises what ended it, in an `ExceptionGroup`."""
        async with asyncio.TaskGroup() as self._group:
            try:
                await main
            finally:
                self._ending = True
                for task in list(self._started):
                    task.cancel()

    def start(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[None]:
        """Run something for as long as the node lives, in one that ends not at all; its failure ends the node."""
        if self._group is None:
            raise RuntimeError(f"{name} is started before its node runs")
        if self._ending:
            task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work, name=name)
            task.cancel()
            return task
        task = self._group.create_task(work, name=name)
        self._started.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._started.discard(task)
        self._ending |= not task.cancelled() and task.exception() is not None
