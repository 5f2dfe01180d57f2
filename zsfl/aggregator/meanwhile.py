"""What the aggregator does once others are at work, so that they need not wait for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable


class Meanwhile:
    """Work that is left until steps were asked for: what a round leaves on the disk takes as long as some steps do."""

    def __init__(self) -> None:
        self._left: Callable[[], Awaitable[None]] | None = None

    async def leave(self, work: Callable[[], Awaitable[None]]) -> None:
        """Have this done soon; before the next version is made, and before anybody who is away is waited for."""
        await self.done()
        self._left = work

    async def done(self) -> None:
        """Returns when nothing is left; raises what the work does."""
        work, self._left = self._left, None
        if work is not None:
            await work()
