"""Whose steps are whose: those of a shard come from the machine that holds it, and from no other."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

from zsfl.errors import Busy, RemoteProtocolError, Unauthorised, Unavailable
from zsfl.ids import parse_cid
from zsfl.wire.messages import Backward, Forward, Request, Step

AGAIN_S = 0.1
"""So long no other question is asked about a shard: who sends what is not theirs must not keep an aggregator busy."""
MOST_CHECKED = 128
"""Claims that are looked into at once: the places of a server are for the steps of those who are known to hold their
shards. Of those that others leave a machine takes half at most, and one in any case: so many together leave some."""


@dataclass(slots=True)
class _Told:
    """What is known of one shard."""

    key: str = ""
    error: Exception | None = None
    """Why the last question was not answered."""
    asked_s: float = -AGAIN_S
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)


class Holders:
    """By whose key the steps of each shard come, as the aggregator says. Asked again where another key shows up."""

    def __init__(self, ask: Callable[[int], Awaitable[str]], shards: int) -> None:
        """`ask` says of a shard by which key its client joined, empty where it has none; raises Unavailable."""
        self._ask = ask
        self._shards = shards
        self._told: dict[int, _Told] = {}
        self._checked: Counter[str] = Counter()
        """Claims that are looked into now, by key."""

    def forget(self) -> None:
        """Another aggregator says from now on whose is what."""
        self._told = {}

    def permit(self, request: Request, key: str) -> Callable[[], Awaitable[None]] | None:
        """What raises Unauthorised if a step is not this key's to make; None: it is. Without keys it is anybody's.

        Busy where too many wait for that already.
        """
        if not key or not isinstance(request, Forward | Backward | Step):
            return None
        shard = parse_cid(request.cid).shard
        told = self._told.get(shard)
        if told is not None and told.key == key:
            return None
        left = MOST_CHECKED - self._checked.total() + self._checked[key]
        if self._checked[key] >= max(1, left // 2):
            raise Busy(f"who holds shard {shard} is being looked into, and too many others are; ask again", AGAIN_S)
        self._checked[key] += 1
        checking = asyncio.ensure_future(self._check(shard, key))
        checking.add_done_callback(partial(self._looked_into, key))
        return partial(asyncio.shield, checking)  # whoever asks may give up, the others still want to know

    def _looked_into(self, key: str, checking: asyncio.Future[None]) -> None:
        self._checked[key] -= 1
        if not self._checked[key]:
            del self._checked[key]
        if not checking.cancelled():
            checking.exception()  # whoever asks gets it

    async def _check(self, shard: int, key: str) -> None:
        if shard >= self._shards:
            raise RemoteProtocolError(f"there is no shard {shard}: the job has {self._shards}")
        came_s, told = time.monotonic(), self._told.setdefault(shard, _Told())
        async with told.asking:  # an answer to what was asked since then is good for all who wait
            if told.asked_s < came_s:
                await asyncio.sleep(max(0.0, told.asked_s + AGAIN_S - came_s))
                asked_s = time.monotonic()
                try:
                    told.key, told.error = await self._ask(shard), None
                except Exception as error:
                    told.error = error
                told.asked_s = asked_s
        if told.error is not None:
            raise told.error
        if not told.key:
            raise Unavailable(f"no client has joined with shard {shard} yet; join, and ask again")
        if told.key != key:
            raise Unauthorised(f"the steps of shard {shard} are another machine's to make")
