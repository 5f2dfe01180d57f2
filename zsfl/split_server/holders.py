"""Whose steps are whose: those of a shard come from the machine that holds it, and from no other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from zsfl.errors import Unauthorised, Unavailable
from zsfl.ids import parse_cid
from zsfl.wire.messages import Backward, Forward, Request, Step


class Holders:
    """By whose key the steps of each shard come, as the aggregator says. Asked again where another key shows up."""

    def __init__(self, ask: Callable[[int], Awaitable[str]]) -> None:
        """`ask` says of a shard by which key its client joined, empty where it has none; raises Unavailable."""
        self._ask = ask
        self._keys: dict[int, str] = {}

    def permit(self, request: Request, key: str) -> Callable[[], Awaitable[None]] | None:
        """What raises Unauthorised if a step is not this key's to make; None: it is. Without keys it is anybody's."""
        if not key or not isinstance(request, Forward | Backward | Step):
            return None
        shard = parse_cid(request.cid).shard
        return None if self._keys.get(shard) == key else partial(self._check, shard, key)

    async def _check(self, shard: int, key: str) -> None:
        found = await self._ask(shard)
        if not found:
            raise Unavailable(f"no client has joined with shard {shard} yet; join, and ask again")
        self._keys[shard] = found
        if found != key:
            raise Unauthorised(f"the steps of shard {shard} are another machine's to make")
