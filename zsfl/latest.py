"""A value that changes, and those who wait for it to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Generic, TypeVar

_Value = TypeVar("_Value")


class Latest(Generic[_Value]):
    """Keeps the newest value only; whoever waits sees the newest one that fits, not each."""

    def __init__(self, value: _Value) -> None:
        self._value = value
        self._changed = asyncio.Event()

    @property
    def value(self) -> _Value:
        """The newest value."""
        return self._value

    def set(self, value: _Value) -> None:
        """Replace the value and wake all who wait."""
        self._value = value
        self.touch()

    def touch(self) -> None:
        """Wake all who wait although the value itself is the same object."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed_within(self, seconds: float) -> None:
        """Returns at the next change, or after so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    async def wait_for(self, fits: Callable[[_Value], bool]) -> _Value:
        """The first value from now on that fits, the present one included."""
        while not fits(self._value):
            await self._changed.wait()
        return self._value


async def first_of(*works: Coroutine[Any, Any, None]) -> None:
    """Run all until one ends, well or not; that one's end is the result."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
