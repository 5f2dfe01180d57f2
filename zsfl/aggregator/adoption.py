"""What nodes put in the store: read there when they offer it, taken as if they offered it when they are gone, and then
deleted once it is settled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from zsfl.aggregator.gathering import Gathering, Key
from zsfl.aggregator.holders import Holders
from zsfl.aggregator.refusals import Refusals
from zsfl.aggregator.roster import Roster
from zsfl.aggregator.stage import Stage
from zsfl.errors import BadShape, SpillCorrupt, StorageError
from zsfl.ids import NodeId, Role, parse_cid
from zsfl.keys.nodes import is_of
from zsfl.latest import Latest
from zsfl.node import Node
from zsfl.spill.index import cids_of, offer_of
from zsfl.spill.layout import Buffer, decode_meta
from zsfl.spill.objects import ObjectStore, Place
from zsfl.spill.segments import parted
from zsfl.wire.messages import SpillOffer

LAG_S = 60.0
"""How long it is looked for what a node left: listings of a shared file system may be that old."""
READ_AT_ONCE = 4
MOST_READ, MOST_READ_BYTES = 1024, 1 << 30
"""Objects of nodes that are there that one look reads; what is beyond them is offered anyway, or made again."""
Adopt = Callable[[NodeId, str, SpillOffer, Buffer], bool]
"""Takes a spill of a node, with the name that it says it was written by; whether it was one."""


class Adoption:
    """Looks through what there is of a run when nodes are lost, or somebody misses something, and else does not."""

    def __init__(
        self,
        node: Node,
        store: ObjectStore,
        stage: Stage,
        gathering: Gathering,
        roster: Latest[Roster],
        holders: Holders,
        judge: Refusals | None,
        take: Adopt,
    ) -> None:
        """`judge` says what one object may take."""
        self._node = node
        self._store = store
        self._stage = stage
        self._gathering = gathering
        self._roster = roster
        self._holders = holders
        self._judge = judge
        self._take = take
        self._read: dict[Place, Mapping[Key, tuple[SpillOffer, str]]] = {}
        """Of objects that were read, what is in them, and by whom it says it was written."""
        self._reading = asyncio.Semaphore(READ_AT_ONCE)
        """Whole objects, of whomever: memory is bounded by these, not by how many holders there are."""
        self._looks = Latest(0)
        """How often it was looked."""
        self._is_looking = self._of_all = False
        """Whether it is just now, and whether the next look is at what nodes put that are there, too."""
        self._until_s = self._half_until_s = 0.0
        """How long it is looked in any case, and how long what is half written may still become whole."""
        self._due = asyncio.Event()
        self._due.set()  # nobody knows who came before this process
        self._trouble = False

    def lost(self) -> None:
        """A node is gone that may have left something."""
        self._until_s = self._half_until_s = time.monotonic() + LAG_S
        self._due.set()

    async def looked(self) -> None:
        """Returns once it was looked since this was called; what nodes that are there put lately is taken, too."""
        looks, self._of_all = self._looks.value, True
        self._due.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._node.settings.request_s / 2):
                # The next look that ends may have begun before.
                await self._looks.wait_for(lambda now: now > looks + self._is_looking)

    async def run(self) -> None:
        """Look whenever that is due, and again for as long as something is left."""
        pause_s = self._node.settings.beat_s
        self._half_until_s = max(self._half_until_s, time.monotonic() + LAG_S)
        while True:
            await self._due.wait()
            self._due.clear()
            left = await self._look()
            self._looks.set(self._looks.value + 1)
            if left or time.monotonic() < self._until_s:
                self._due.set()
            await asyncio.sleep(pause_s)

    async def _look(self) -> bool:
        """Whether something is left that nobody else sees to."""
        self._is_looking, of_all, self._of_all = True, self._of_all, False
        try:
            there = await self._store.found(self._stage.run)
            live = {card.id for role in Role for card in self._node.peers(role)}
            known = {at: read for at in there if (read := self._read.get(at)) is not None}
            # One who is there may still be writing what makes no sense so far.
            self._read = {at: read for at, read in known.items() if read or at.node not in live}
            is_late = time.monotonic() >= self._half_until_s
            left = [at for at in there if at.node not in live]
            looked_at = [*left, *(self._newest(there, live) if of_all else ())]
            for first in range(0, len(looked_at), READ_AT_ONCE):
                await asyncio.gather(*map(self._adopt, looked_at[first : first + READ_AT_ONCE]))
            if is_late:  # what is half written by now stays so: it is not read again, nor waited for
                for at in left:
                    self._read.setdefault(at, {})
            settled = [at for at in left if self._is_settled(at)]
            await self._clear(settled)
        except StorageError as error:
            if not self._trouble:
                self._node.note(f"cannot look for what nodes left: {error}", "warning")
            self._trouble = True
            return True
        finally:
            self._is_looking = False
        self._trouble = False
        return any(self._read.get(at) != {} for at in set(left).difference(settled))

    def _newest(self, there: Sequence[Place], live: Collection[NodeId]) -> list[Place]:
        """Of nodes that are there, what they put last and nobody has read, and what was read: a look has its bounds."""
        newest = sorted((at for at in there if at.node in live), key=lambda at: at.name[:8], reverse=True)
        unread, room_bytes = 0, MOST_READ_BYTES
        found: list[Place] = []
        for at in newest:
            if at not in self._read:
                unread, room_bytes = unread + 1, room_bytes - at.size_bytes
                if unread > MOST_READ or (room_bytes < 0 and unread > 1):
                    continue
            found.append(at)
        return found

    async def _adopt(self, at: Place) -> None:
        """Take of an object what may still count and is not here."""
        known = self._read.get(at)
        if known is not None and not self._wanted(at.node, known):
            return
        found = await self._records_of(at)  # of what is half written nothing: nobody was told of it
        if not found:
            return
        self._read[at] = {key: (offer, name) for key, (offer, name, _) in found.items()}
        taken = 0
        for key in self._wanted(at.node, self._read[at]):
            offer, name, record = found[key]
            taken += self._take(at.node, name, offer, record)
        if taken:
            self._node.counters.add("spills_adopted", taken)

    def _wanted(self, node: NodeId, read: Mapping[Key, tuple[SpillOffer, str]]) -> Sequence[Key]:
        offers = [offer for offer, _ in read.values() if self._gathering.lacks(offer) and self._may_have(node, offer)]
        return [(offer.cid, offer.kind) for offer in offers]

    def _may_have(self, node: NodeId, offer: SpillOffer) -> bool:
        """Whether a node of this id may have spilled that, as far as ids tell; who put it there they do not."""
        shards = {parse_cid(cid).shard for cid in cids_of(offer)}
        if any(self._roster.value.node_of(shard) is None for shard in shards):
            return False
        if offer.part == "body":
            return self._node.is_trusted_as(node, Role.SPLIT_SERVER)
        keys = set(map(self._holders.key_of, shards))
        return self._node.is_trusted_as(node, Role.CLIENT) and all(not key or is_of(node, key) for key in keys)

    def _is_settled(self, at: Place) -> bool:
        """Whether a record counts or drops all that is in an object."""
        offers = [offer for offer, _ in self._read.get(at, {}).values()]
        # Those that are too late are dropped with that, as if somebody offered them.
        verdict = self._gathering.offered(at.node, offers, lambda offer: self._may_have(at.node, offer))
        self._gathering.not_delivered(at.node, verdict.fetch)
        released = set(verdict.release)
        return bool(offers) and all(cid in released for offer in offers for cid in cids_of(offer))

    async def fetch(self, node: NodeId, wanted: Mapping[Key, str]) -> list[tuple[Key, Buffer]]:
        """Spills of a node, each from the object that it says; those that are not there are left out."""
        keys_at: dict[str, list[Key]] = {}
        for key, name in wanted.items():
            keys_at.setdefault(name, []).append(key)
        names, found = sorted(keys_at), list[tuple[Key, Buffer]]()
        for first in range(0, len(names), READ_AT_ONCE):
            some = [(Place(self._stage.run, node, at), keys_at[at]) for at in names[first : first + READ_AT_ONCE]]
            for read in await asyncio.gather(*(self._read_of(*one) for one in some)):
                found += read
        return found

    async def _read_of(self, at: Place, keys: Sequence[Key]) -> list[tuple[Key, Buffer]]:
        async with self._reading:
            records = await self._records_of(at)
            # Of the object no more than that is kept.
            return [(key, bytes(records[key][2])) for key in keys if key in records]

    async def _records_of(self, at: Place) -> Mapping[Key, tuple[SpillOffer, str, Buffer]]:
        if self._judge is not None and at.size_bytes > self._judge.most_object_bytes:
            return {}
        with suppress(SpillCorrupt):
            if (data := await self._store.get(at)) is not None:
                return _records(data)
        return {}

    async def clear(self) -> None:
        """Delete all that is left of the run: it is over, and what counts is recorded."""
        try:
            await self._clear(await self._store.found(self._stage.run))
            await self._store.tidy_all(self._stage.run)
        except StorageError as error:
            self._node.note(f"what is left of the finished run in the store stays there: {error}", "warning")

    async def _clear(self, places: Sequence[Place]) -> None:
        await self._store.delete(places)
        for node in {at.node for at in places}:
            await self._store.tidy(places[0].run, node)


def _records(data: bytes) -> dict[Key, tuple[SpillOffer, str, Buffer]]:
    """The spills in an object, with what each says of itself; what makes no sense is passed over."""
    found: dict[Key, tuple[SpillOffer, str, Buffer]] = {}
    with suppress(SpillCorrupt):
        for _, record in parted(data):
            with suppress(SpillCorrupt, BadShape):
                meta = decode_meta(record)
                found[meta.cid, meta.kind] = offer_of(meta, len(record)), meta.node, record
    return found
