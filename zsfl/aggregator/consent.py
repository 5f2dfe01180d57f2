"""Asks clients whom they promise to follow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from zsfl.aggregator.holders import Holders
from zsfl.errors import ZsflError
from zsfl.ids import NodeCard, Role
from zsfl.node import Node
from zsfl.wire.succession import Grant, Granted

WAITED = 0.25
"""How long answers are waited for, in leases: who answers later, or never, must not hold up what the others promise."""


class Consent:
    """Believes a client as far as the shards that it speaks for are its own, so that one without any has no say."""

    def __init__(self, node: Node, holders: Holders) -> None:
        self._node = node
        self._holders = holders
        self._late: set[asyncio.Task[Granted | None]] = set()

    async def ask(self, grant: Grant, took: Callable[[Sequence[Granted]], None], *, all_: bool = False) -> bool:
        """Ask all clients that are there; `took` is told what they answer, of late ones also after this returned.

        Returns whether all have answered by then, or will not; with `all_` not before.
        """
        lease_s = self._node.settings.lost_after_s
        asked = [asyncio.ensure_future(self._ask(card, grant, lease_s)) for card in self._node.peers(Role.CLIENT)]
        if not asked:
            return True
        done, late = await asyncio.wait(asked, timeout=None if all_ else WAITED * lease_s)
        took([answer for one in done if (answer := one.result()) is not None])

        def came(one: asyncio.Task[Granted | None]) -> None:
            self._late.discard(one)
            if not one.cancelled() and (answer := one.result()) is not None:
                took([answer])

        for one in late:
            self._late.add(one)
            one.add_done_callback(came)
        return not late

    async def _ask(self, card: NodeCard, grant: Grant, deadline_s: float) -> Granted | None:
        with suppress(ZsflError):
            granted = (await self._node.link(card).request(grant, deadline_s=deadline_s)).expect(Granted)
            if believed := self._holders.believed(card, granted.shards):
                return msgspec.structs.replace(granted, shards=believed)
        return None
