"""What the aggregator does while others are at work, so that nobody waits for it; and how it waits where nobody is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from zsfl.aggregator.roster import Roster
from zsfl.errors import RunFailed
from zsfl.ids import Role
from zsfl.latest import Latest
from zsfl.node import Node


class Meanwhile:
    """Work that is left until steps were asked for: what a round leaves on the disk takes as long as some steps do."""

    def __init__(self, node: Node, roster: Latest[Roster]) -> None:
        self._node = node
        self._roster = roster
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

    async def until(self, role: Role, fits: Callable[[Roster], bool]) -> None:
        """Wait for a peer that the run cannot go on without."""
        if not fits(self._roster.value):
            await self.done()
        patience_s, what = self._node.settings.patience_s, role.replace("-", " ")
        try:
            with self._node.waiting(f"a {what}", lambda: self._node.hints_of_gone(role)):
                async with asyncio.timeout(patience_s):
                    await self._roster.wait_for(fits)
        except TimeoutError:
            raise RunFailed(f"for {patience_s:g} s there was no {what}; start some, then go on with --resume") from None
