"""A value that changes, and those who wait for it to."""

from __future__ import annotations

import asyncio

from helpers.waiting import HANG_S

from zsfl.latest import Latest


async def test_a_value_that_fits_already_is_not_waited_for() -> None:
    assert await Latest(3).wait_for(lambda value: value == 3) == 3


async def test_all_who_wait_see_the_newest_value_that_fits() -> None:
    latest = Latest(0)
    waiting = [asyncio.create_task(latest.wait_for(lambda value, at_least=n: value >= at_least)) for n in (1, 2, 5)]
    await asyncio.sleep(0)
    latest.set(1)
    latest.set(2)  # nobody is promised to see the 1
    assert await asyncio.gather(*waiting[:2]) == [2, 2]
    assert not waiting[2].done()
    latest.set(7)
    assert await waiting[2] == 7


async def test_a_value_set_by_whoever_was_woken_is_not_missed() -> None:
    latest = Latest(0)

    async def count_on() -> None:
        while latest.value < 100:
            seen = latest.value
            await latest.wait_for(lambda value, seen=seen: value != seen)
            latest.set(latest.value + 1)

    counting = [asyncio.create_task(count_on()) for _ in range(2)]
    await asyncio.sleep(0)
    latest.set(1)
    async with asyncio.timeout(HANG_S):
        await asyncio.gather(*counting)


async def test_a_touch_wakes_those_who_look_inside() -> None:
    latest: Latest[dict[str, int]] = Latest({})
    waiting = asyncio.create_task(latest.wait_for(lambda value: "a" in value))
    await asyncio.sleep(0)
    latest.value["a"] = 1
    latest.touch()
    assert await waiting == {"a": 1}


async def test_one_that_stops_waiting_leaves_the_others_alone() -> None:
    latest = Latest(0)
    one, other = (asyncio.create_task(latest.wait_for(bool)) for _ in range(2))
    await asyncio.sleep(0)
    one.cancel()
    latest.set(1)
    assert await other == 1


async def test_a_change_ends_the_waiting_for_one_and_so_does_the_time() -> None:
    latest = Latest(0)
    waiting = asyncio.create_task(latest.changed_within(3600.0))
    await asyncio.sleep(0)
    assert not waiting.done()
    latest.touch()
    async with asyncio.timeout(HANG_S):
        await waiting
        await latest.changed_within(0.0)  # the change before does not count
