"""Those who wait for a turn."""

from __future__ import annotations

import asyncio

from zsfl.client.line import Line


async def test_who_waits_longest_is_called_first_and_a_turn_is_never_lost() -> None:
    line = Line()
    served: list[int] = []

    async def wait(number: int) -> None:
        await line.wait()
        served.append(number)

    tasks = [asyncio.create_task(wait(number)) for number in range(5)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.sleep(0)
    line.call(1)
    tasks[1].cancel()  # it was called already: its turn is the next one's
    await asyncio.gather(*tasks[:3], return_exceptions=True)
    assert served == [2]
    line.call()
    await asyncio.gather(*tasks[3:])
    assert served == [2, 3, 4]
    line.call(1)  # nobody is there
