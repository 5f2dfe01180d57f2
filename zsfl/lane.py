"""The lane: the one thread of a process that torch runs in, with an event loop of its own.

Everything that moves tensors lives there: a role, its data sockets, its spills. Between the arrival of a tensor and
the answer no thread has to wake another, which costs more than a small network's whole step. What must never wait
(heartbeats, discovery, control) stays in the main loop. One thread, because torch uses the cores inside an operation,
because seeding its generator must not race, and because nodes that share a process must not fight for the cores.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")

LEAVE_S = 5.0
"""How long somebody who leaves, or the process at its end, waits for what the lane still computes."""


class _Lane:
    """The thread, begun with the first use, so that a process may still fork before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_here(self) -> bool:
        return self._thread is threading.current_thread()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._run, args=(self._loop,), name="zsfl-lane", daemon=True)
                self._thread.start()
                atexit.register(self._leave)
        return self._loop

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        loop.run_forever()

    def _leave(self) -> None:
        """A daemon thread that still ran torch while the interpreter is taken down would end in a crash."""
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(LEAVE_S)


_lane = _Lane()


def _forget() -> None:
    """A forked child has none of its parent's threads."""
    global _lane
    _lane = _Lane()


os.register_at_fork(after_in_child=_forget)


async def compute(function: Callable[_Args, _Result], *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
    """Run `function` in the lane: at once where this is it; its result or its error.

    Cancelling the caller does not stop a function that has begun.
    """
    if _lane.is_here:
        return function(*args, **kwargs)
    done: Future[_Result] = Future()

    def call() -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            done.set_result(function(*args, **kwargs))
        except StopIteration as error:  # which no future can carry: the caller would wait for ever
            where = getattr(function, "__qualname__", function)
            done.set_exception(RuntimeError(f"StopIteration {error} came out of {where}"))
        except BaseException as error:
            done.set_exception(error)

    _lane.loop.call_soon_threadsafe(call)
    return await asyncio.wrap_future(done)


async def to_lane(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Await `work` in the lane's loop. Cancelling the caller cancels it there, and waits until it has ended.

    Not for longer than `LEAVE_S`, and not at all when cancelled again: what computes for long is then left to itself.
    """
    if _lane.is_here:
        return await work
    here, there = asyncio.get_running_loop(), _lane.loop
    ended: asyncio.Future[asyncio.Task[_Result]] = here.create_future()
    begun: list[asyncio.Task[_Result]] = []

    def tell(task: asyncio.Task[_Result]) -> None:
        with suppress(RuntimeError):  # the loop that waited is closed
            here.call_soon_threadsafe(lambda: ended.done() or ended.set_result(task))

    def begin() -> None:
        begun.append(there.create_task(work))
        begun[0].add_done_callback(tell)

    there.call_soon_threadsafe(begin)
    try:
        await asyncio.wait({ended})
    except asyncio.CancelledError:
        there.call_soon_threadsafe(lambda: begun[0].cancel())
        await asyncio.wait({ended}, timeout=LEAVE_S)
        if ended.done() and not ended.result().cancelled():
            ended.result().exception()  # seen
        raise
    return ended.result().result()


def soon_in_lane(call: Callable[[], None]) -> None:
    """Have the lane make this call, after those that it was given before."""
    _lane.loop.call_soon_threadsafe(call)


def use_threads(count: int) -> None:
    """Let torch use so many threads inside one operation.

    Set in the lane itself: OpenMP keeps the number per thread, and spinning workers starve the loop.
    """
    import torch

    done: Future[None] = Future()

    def call() -> None:
        try:
            done.set_result(torch.set_num_threads(count))
        except Exception as error:
            done.set_exception(error)

    _lane.loop.call_soon_threadsafe(call)
    done.result()
