"""One peer that holds spills, and what is wanted of it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Sequence

from zsfl.aggregator.gathering import Key
from zsfl.ids import Cid, NodeCard, PartName
from zsfl.wire.connection import Connection
from zsfl.wire.fields import MAX_OFFERS

FETCH_BYTES = 4 << 20
"""Asked for in one request, unless a single spill is larger: bounds the memory of a reply."""


class Holder:
    """One peer that holds spills."""

    connection: Connection
    """Of one that is there."""
    task: asyncio.Task[None]

    def __init__(self, card: NodeCard) -> None:
        self.card = card
        self.name = card.name
        self.fetch: dict[Key, int] = {}
        self.at: dict[Key, str] = {}
        """Of those that are to be fetched, in which of its objects they are, where it puts them in a store."""
        self.members: dict[Key, tuple[Cid, ...]] = {}
        """Of merged spills that are to be fetched, and of no others: a holder may offer what it likes."""
        self.release: set[Cid] = set()
        """As many as one request tells; what is still held beyond these is offered again by the next heartbeat."""
        self.complained: set[Key] = set()
        """Of the version that is gathered: it was said why they do not come."""
        self.todo = asyncio.Event()

    def let_go(self, cids: Iterable[Cid]) -> None:
        """Have it told that these are settled."""
        self.release.update(itertools.islice(cids, MAX_OFFERS - len(self.release)))


def parts_of(holder: Holder, keys: Sequence[Key]) -> list[tuple[Cid, PartName]]:
    """What these spills are parts of."""
    return [
        (member, "client" if kind == "client" else "body")
        for cid, kind in keys
        for member in holder.members.get((cid, kind), (cid,))
    ]


def batch_of(wanted: dict[Key, int]) -> list[Key]:
    """Take keys out of `wanted` until their bytes fill one request."""
    keys: list[Key] = []
    room = FETCH_BYTES
    for key, size in list(wanted.items()):
        if keys and (size > room or len(keys) == MAX_OFFERS):
            break
        keys.append(key)
        room -= wanted.pop(key)
    return keys
