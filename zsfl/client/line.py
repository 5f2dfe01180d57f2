"""Those who wait for a turn, first come first served."""

from __future__ import annotations

import asyncio
from collections import deque


class Line:
    """Waking one is enough where one turn came free; waking all each time would cost a crowd dearly."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Returns when called; one that was called and cancelled at once passes its turn on."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.call(1)
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    def call(self, count: int | None = None) -> None:
        """Wake so many that wait longest, or all."""
        left = len(self._waiting) if count is None else count
        while left and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                left -= 1
