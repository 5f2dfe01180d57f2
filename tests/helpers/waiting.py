"""Waiting for something to become true, never for a time to pass."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

POLL_S = 0.01
HANG_S = 120.0
"""What nothing takes, however busy the machine: a deadline in a test ends a hang, and measures nothing."""


async def eventually(condition: Callable[[], object], deadline_s: float = HANG_S) -> None:
    """Returns once `condition()` is true; TimeoutError after `deadline_s`."""
    async with asyncio.timeout(deadline_s):
        while not condition():
            await asyncio.sleep(POLL_S)


_Value = TypeVar("_Value")


async def until(coming: Awaitable[_Value], deadline_s: float = HANG_S) -> _Value:
    """What `coming` brings; TimeoutError after `deadline_s`."""
    async with asyncio.timeout(deadline_s):
        return await coming
