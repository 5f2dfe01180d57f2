"""Proof that nothing is left over of what ran in this process: no task, no thread, no descriptor."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import zmq
from helpers.waiting import HANG_S, POLL_S

from zsfl.lane import compute


def _descriptors() -> set[tuple[str, str]]:
    """Number and target of each open file and socket."""
    found: set[tuple[str, str]] = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that this folder is read by
            found.add((path.name, os.readlink(path)))
    return {(number, target) for number, target in found if not target.endswith("/fd")}


async def _everything() -> set[object]:
    """Tasks of this loop and of the lane, threads and descriptors."""
    lane = await compute(asyncio.all_tasks)
    return {*asyncio.all_tasks(), *lane, *threading.enumerate(), *_descriptors()}


@asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """What is begun inside has ended, or does so soon.

    What lives as long as the process is there before: the lane, its loop and its thread, and the thread in which pyzmq
    collects lent buffers.
    """
    zmq.Frame(bytes(1 << 17), copy=False)
    before = await _everything()
    yield
    left = set[object]()
    try:
        async with asyncio.timeout(HANG_S):
            while left := await _everything() - before:
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise AssertionError(f"left over: {left}") from None
