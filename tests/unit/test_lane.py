"""The lane: results, errors and cancellations cross between the two loops, and neither loop waits for the other."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

import pytest
from helpers.waiting import until

from zsfl.lane import compute, soon_in_lane, to_lane


async def test_results_and_errors_come_back_from_the_thread() -> None:
    assert await compute(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await compute(divmod, 7, 0)
    nothing: list[int] = []
    with pytest.raises(RuntimeError, match="StopIteration"):
        await until(compute(lambda: next(iter(nothing))))


async def test_in_the_lane_nothing_changes_threads() -> None:
    async def inside() -> tuple[int, int, int]:
        async def here() -> int:
            return threading.get_ident()

        return threading.get_ident(), await compute(threading.get_ident), await to_lane(here())

    threads = await until(to_lane(inside()))
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


async def test_an_error_in_the_lane_is_the_callers() -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        raise LookupError("there")

    with pytest.raises(LookupError, match="there"):
        await until(to_lane(fails()))


async def test_cancelling_ends_the_work_there_before_it_returns() -> None:
    begun, ended = asyncio.Event(), threading.Event()
    here = asyncio.get_running_loop()

    async def work() -> None:
        here.call_soon_threadsafe(begun.set)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # even if its own end takes more than one turn
            ended.set()

    caller = asyncio.create_task(to_lane(work()))
    await until(begun.wait())
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await until(caller)
    assert ended.is_set()


async def test_a_lane_that_is_held_up_holds_up_nobody_else() -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        release.wait(20)

    soon_in_lane(hold)
    waiting = asyncio.create_task(compute(divmod, 9, 2))
    while not held.is_set():  # this loop goes round meanwhile
        await asyncio.sleep(0)
    assert not waiting.done()
    release.set()
    assert await until(waiting) == (4, 1)


async def test_calls_are_made_in_order() -> None:
    made: list[int] = []
    for number in range(100):
        soon_in_lane(lambda number=number: made.append(number))
    await compute(int)
    assert made == list(range(100))


async def test_a_cancelled_wait_for_a_function_leaves_the_lane_alone() -> None:
    release = threading.Event()
    waiting = asyncio.create_task(compute(release.wait, 20))
    await asyncio.sleep(0)
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    release.set()
    assert await until(compute(divmod, 9, 2)) == (4, 1)
