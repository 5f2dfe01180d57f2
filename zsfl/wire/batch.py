"""Small messages to one peer leave together: what is said in one turn of the event loop is one multipart.

Handing a message to ZeroMQ wakes its I/O thread, which costs more than all the rest of a small message's way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from zsfl.settings import WireLimits
from zsfl.wire.framing import Buffer, nbytes

MOST_FRAMES = 128
"""In one multipart."""
MOST_BYTES = 48 << 10
"""Of all messages that leave together, unless it is one: they arrive together, so on a slow link the first would wait
for the last, and the way back would stand still meanwhile."""


def is_small(frames: Sequence[Buffer], below_bytes: int) -> bool:
    """Whether ZeroMQ had better copy these frames than borrow them."""
    return all(nbytes(frame) < below_bytes for frame in frames)


class Batch:
    """Collects the messages of one turn."""

    def __init__(self, limits: WireLimits, send: Callable[[list[Buffer]], None]) -> None:
        """`send` is given the frames of all of them."""
        self._limits = limits
        self._send = send
        self._frames: list[Buffer] = []
        self._size = 0

    def takes(self, parts: Sequence[Buffer]) -> bool:
        """Whether a message with these parts is small enough."""
        size = sum(map(nbytes, parts))
        return size <= min(self._limits.frame_bytes, self._limits.copy_below_bytes)

    def add(self, frames: list[Buffer]) -> None:
        """Send a message at the end of this turn."""
        size = sum(map(nbytes, frames))
        is_full = len(self._frames) + len(frames) > MOST_FRAMES or self._size + size > MOST_BYTES
        if self._frames and is_full:
            self._flush()
        if not self._frames:
            asyncio.get_running_loop().call_soon(self._flush)
        self._frames += frames
        self._size += size

    def _flush(self) -> None:
        if self._frames:
            frames, self._frames, self._size = self._frames, [], 0
            self._send(frames)
