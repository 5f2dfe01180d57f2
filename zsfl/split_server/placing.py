"""Spills that are put and not in place yet: what was made of them is acknowledged then."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from zsfl.errors import StorageError
from zsfl.ids import Cid
from zsfl.member import NOT_PUT, Member
from zsfl.split_server.body import Done
from zsfl.wire.messages import SpillOffer


class Placing:
    """Those of one turn after another. On a disk of its own, all that a node put is in place."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._put: dict[int, asyncio.Future[None]] = {}

    def offer(self, offer: SpillOffer) -> None:
        """Have the aggregator told of a spill of this turn."""
        if (placing := self._member.offer(offer)) is not None:
            self._put[id(placing)] = placing

    def of_turn(self) -> asyncio.Future[None] | None:
        """What to wait for until all is in place that this turn put, None where it is; the next turn begins."""
        put, self._put = list(self._put.values()), {}
        return asyncio.ensure_future(self._until_placed(put)) if put else None

    async def placed(self, merged: dict[Cid, Done]) -> dict[Cid, Done]:
        """The same, once all of it is in place."""
        offers = [done.offer for done in merged.values() if done.offer is not None]
        put = {id(one): one for offer in offers if (one := self._member.spills.placing(offer)) is not None}
        if put:
            await self._until_placed(list(put.values()))
        return merged

    async def _until_placed(self, put: Sequence[asyncio.Future[None]]) -> None:
        await asyncio.wait(put)
        try:
            for one in put:
                one.result()
        except StorageError as error:
            self._member.in_trouble(NOT_PUT, error)
            raise
