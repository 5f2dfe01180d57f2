"""The spills of one node whose spills go to a store, not to its own disk.

What is put waits in memory until its object is in place, small ones together, and is acknowledged then. Objects are
deleted once all in them is released. All calls are for the node's lane.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

import msgspec
import torch

from zsfl.errors import SpillCorrupt, SpillFull, SpillTooLarge, StorageError
from zsfl.ids import Cid, RunId, parse_cid
from zsfl.node import Node
from zsfl.spill.coded import SpillCoder
from zsfl.spill.index import Index, Key, offer_of
from zsfl.spill.layout import SpillMeta, decode_contribution, pieces
from zsfl.spill.objects import ObjectStore, Place
from zsfl.spill.segments import MAX_SEGMENT_BYTES, joined
from zsfl.spill.shared import DELETED_AT_ONCE
from zsfl.spill.store import LARGE_BYTES, SpillStore
from zsfl.wire.messages import SpillOffer

PUTS_AT_ONCE = 4
"""Objects; what is put meanwhile shares the next one."""
WAITING_BYTES = 256 << 20
"""Put and not in place: beyond that nothing more is taken in hand."""
NOT_PLACED = "spills wait until the store takes them"
NOT_DELETED = "spills that are settled cannot be deleted yet"
NOT_LOST = "it is tried again; what is not in place is not acknowledged, so that its step is made again if need be"
MOST_LEFT = 1 << 16
"""Objects that are to be deleted, and cannot be."""
LEAVE_S = 5.0
"""What deleting may take when the node ends; the aggregator sees to what is left."""


@dataclass(slots=True, eq=False)
class _Object:
    """One object, in place or on its way."""

    run: RunId
    is_large: bool
    offers: list[SpillOffer] = field(default_factory=list[SpillOffer])
    records: list[bytes] = field(default_factory=list[bytes])
    """Until it is in place."""
    placing: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    size_bytes: int = 0
    held: int = 0
    at: Place | None = None
    tried: list[Place] = field(default_factory=list[Place])
    """Where it could not be put; a call that was given up may still write there."""


class StoredSpills:
    """As a `SpillStore`, but that what is put is in place only when the future that `placing` gives is done."""

    def __init__(
        self,
        store: ObjectStore,
        node: Node,
        coder: SpillCoder | None = None,
        limit_bytes: int = 0,
        *,
        trouble: Callable[[str, StorageError | None], None] = lambda *_: None,
    ) -> None:
        """`coder` and `limit_bytes` as in a `SpillStore`; `trouble` is told of what cannot be done, why, and when it
        can again.
        """
        self.store = store
        self._node = node
        self._coder = coder
        self._limit_bytes = limit_bytes
        self._trouble = trouble
        self._index: Index[_Object] = Index()
        self._waiting: deque[_Object] = deque()
        self._under_way: set[_Object] = set()
        self._placing: dict[Key, _Object] = {}
        """What was put last under each key and is not in place."""
        self._waiting_bytes = 0
        self._serial = 0
        self._runs: set[RunId] = set()
        """Something was put of these."""
        self._is_due = False
        self._left: dict[Place, None] = {}
        """With nothing that is held, and still there; those that were left first, first."""
        self._sweeping: asyncio.Task[None] | None = None

    # --- putting ----------------------------------------------------------------------------------------

    def put(self, meta: SpillMeta, tensors: Mapping[str, torch.Tensor]) -> SpillOffer:
        """Have one spill written. A spill of the same cid and kind is replaced once this one is in place."""
        if self._coder is not None:
            tensors = self._coder.coded(meta, tensors)
        data = b"".join(pieces(meta, tensors))
        self._check_room(len(data))
        offer = offer_of(meta, len(data))
        one = self._object_for(parse_cid(meta.cid).run, len(data))
        one.offers.append(offer)
        one.records.append(data)
        one.size_bytes += len(data)
        self._waiting_bytes += len(data)
        self._placing[offer.cid, offer.kind] = one
        if not self._is_due:  # what is put in the same turn of the loop goes along
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._begin)
        return offer

    def _check_room(self, more_bytes: int) -> None:
        if self._limit_bytes and more_bytes > self._limit_bytes:
            raise SpillTooLarge(
                f"a spill of {more_bytes} bytes never has room in {self.store.url}, of which this node may take "
                f"{self._limit_bytes >> 20} MiB: allow more with --spill-mib"
            )
        used = sum(home.size_bytes for home in self._index.homes()) if self._limit_bytes else 0
        if self._limit_bytes and used + self._waiting_bytes + more_bytes > self._limit_bytes:
            raise SpillFull(
                f"no room for another spill in {self.store.url}: the {self._limit_bytes >> 20} MiB that this node may "
                "take are used up until the aggregator has counted some; allow more with --spill-mib"
            )

    def _object_for(self, run: RunId, size_bytes: int) -> _Object:
        """The object that a spill of so many bytes goes to."""
        is_large = size_bytes > LARGE_BYTES
        last = self._waiting[-1] if self._waiting else None
        if last is None or last.run != run or last.is_large or is_large or last.size_bytes >= MAX_SEGMENT_BYTES:
            last = _Object(run, is_large)
            last.placing.add_done_callback(lambda placing: placing.cancelled() or placing.exception())  # seen
            self._waiting.append(last)
        return last

    def placing(self, offer: SpillOffer) -> asyncio.Future[None] | None:
        """What to wait for, not to cancel, until a spill that was put is in place, StorageError where it could not
        be written; None where it is.
        """
        one = self._placing.get((offer.cid, offer.kind))
        return None if one is None else one.placing

    def is_behind(self) -> asyncio.Future[None] | None:
        """What to wait for before more is put, where too much waits already."""
        if self._waiting_bytes < WAITING_BYTES:
            return None
        return next(iter(self._under_way or self._waiting)).placing

    def _begin(self) -> None:
        self._is_due = False
        while self._waiting and len(self._under_way) < PUTS_AT_ONCE:
            one = self._waiting.popleft()
            self._under_way.add(one)
            self._node.start(self._place(one), "put spills in the store")

    async def _place(self, one: _Object) -> None:
        data, places = joined(one.records)
        self._serial += 1
        self._runs.add(one.run)
        one.at = Place(one.run, self._node.card.id, await self.store.named(self._serial, data))
        try:
            await self._put(one, one.at, data)
        except StorageError as error:
            one.placing.set_exception(error)
        else:
            for offer, record, place in zip(one.offers, one.records, places, strict=True):
                self._drop(self._index.hold(msgspec.structs.replace(offer, at=one.at.name), one, place))
                if not one.is_large:
                    self._index.keep_fresh((offer.cid, offer.kind), record)
            one.placing.set_result(None)
        finally:
            self._delete(one.tried)  # it may be there all the same
            for offer in one.offers:
                if self._placing.get((offer.cid, offer.kind)) is one:
                    del self._placing[offer.cid, offer.kind]
            self._waiting_bytes -= one.size_bytes
            one.records.clear()
            self._under_way.discard(one)
            self._begin()

    async def _put(self, one: _Object, at: Place, data: bytes) -> None:
        """Again and again, for as long as somebody may wait for it: a store may be away for a moment.

        Each time under another number: what is in place, no call that was given up writes to.
        """
        settings, refusal = self._node.settings, await self._refusal(at, data)
        if refusal is None:
            return
        ends_s = time.monotonic() + settings.request_s / 2
        with self._node.waiting(lambda: f"the store: {refusal}", lambda: (NOT_LOST,)):
            while time.monotonic() < ends_s:
                await asyncio.sleep(settings.beat_s)
                one.tried.append(at)
                self._serial += 1
                one.at = at = at._replace(name=f"{self._serial:08d}{at.name[8:]}")
                if (refusal := await self._refusal(at, data)) is None:
                    return
        one.tried.append(at)
        raise refusal

    async def _refusal(self, at: Place, data: bytes) -> StorageError | None:
        """Why it could not be put; None: it was."""
        try:
            await self.store.put(at, data)
        except StorageError as error:
            self._trouble(NOT_PLACED, error)
            self._node.counters.add("store_refusals")
            return error
        self._trouble(NOT_PLACED, None)
        return None

    # --- what is held -----------------------------------------------------------------------------------

    def fresh(self, key: Key) -> bytes | None:
        """The bytes of a small spill that was just put, the first time that they are asked for."""
        return self._index.fresh(key)

    def holds(self, cid: Cid) -> bool:
        """Whether anything of this step is held."""
        return self._index.holds(cid)

    def as_held(self, offer: SpillOffer) -> SpillOffer:
        """What a spill that was put is to be offered as, once it is in place."""
        held = self._index.get((offer.cid, offer.kind))
        return offer if held is None else held.offer

    def offers(self, run: RunId) -> list[SpillOffer]:
        """What is held of one run, oldest version first; may be asked from any thread."""
        return self._index.offers(run)

    async def read_all(self, keys: Sequence[Key]) -> list[tuple[Key, bytes]]:
        """The stored bytes of those that are held, and whose objects are what they were."""
        homes: dict[int, tuple[_Object, list[Key]]] = {}
        for key in keys:
            if held := self._index.get(key):
                homes.setdefault(id(held.home), (held.home, []))[1].append(key)
        found: list[tuple[Key, bytes]] = []
        for home, inside in homes.values():  # one after the other: of each no more is kept than was asked for
            with suppress(SpillCorrupt):
                if home.at is not None and (data := await self.store.get(home.at)) is not None:
                    for key in inside:
                        if (held := self._index.get(key)) and held.home is home:
                            found.append((key, data[held.place : held.place + held.offer.size_bytes]))
        return found

    async def set_aside_all(self, keys: Sequence[Key]) -> list[Key]:
        """Hold those no more that are not there, or not as they were written; which these are."""
        whole: set[Key] = set()
        before = {key: self._index.get(key) for key in keys}
        for key, data in await self.read_all(keys):
            with suppress(SpillCorrupt):
                decode_contribution(data)
                whole.add(key)
        # What was put meanwhile, in place by now or not, is another.
        same = [key for key in keys if key not in self._placing and self._index.get(key) is before[key]]
        lost = [key for key in same if key not in whole]
        for key in lost:
            self._drop(self._index.forget(key))
        return lost

    # --- letting go -------------------------------------------------------------------------------------

    def release(self, cids: Iterable[Cid]) -> None:
        """Have the spills of cids deleted that a committed version names; others are not touched."""
        self._drop(self._index.release(cids))

    def keep_only(self, run: RunId) -> int:
        """Have this node's spills of every other run deleted; how many there were."""
        count, cids = self._index.of_others(run)
        self.release(cids)
        return count

    def _drop(self, objects: Iterable[_Object]) -> None:
        self._delete(one.at for one in objects if one.at is not None)

    def _delete(self, places: Iterable[Place]) -> None:
        self._left |= dict.fromkeys(places)
        while len(self._left) > MOST_LEFT:  # it is refused for long: the aggregator deletes them when this node is gone
            del self._left[next(iter(self._left))]
        if self._left and (self._sweeping is None or self._sweeping.done()):
            self._sweeping = self._node.start(self._sweep(), "delete from the store")

    async def _sweep(self) -> None:
        while self._left:
            going = list(islice(self._left, DELETED_AT_ONCE))
            try:
                await self.store.delete(going)
            except StorageError as error:
                self._trouble(NOT_DELETED, error)
                await asyncio.sleep(self._node.settings.lost_after_s)
            else:
                for at in going:
                    self._left.pop(at, None)
                self._trouble(NOT_DELETED, None)

    async def aclose(self) -> None:
        """What is held stays there; what is not is deleted, as far as that takes no time."""
        if self._sweeping is not None:
            await asyncio.wait([self._sweeping], timeout=LEAVE_S)
        with suppress(StorageError, TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                for run in self._runs:
                    await self.store.tidy(run, self._node.card.id)
        self.store.close()


Spills = SpillStore | StoredSpills
