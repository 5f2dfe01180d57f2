"""Spills that go to a store: in place before they are acknowledged, together where that can be."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers.waiting import eventually, until

from zsfl.errors import SpillCorrupt, SpillFull, SpillTooLarge, StorageError, StoreAway
from zsfl.ids import NodeId, RunId, Version, step_cid
from zsfl.metrics import Counters
from zsfl.spill import stored
from zsfl.spill.index import Key
from zsfl.spill.layout import SpillMeta, decode
from zsfl.spill.objects import Place, name_of
from zsfl.spill.stored import NOT_DELETED, NOT_PLACED, StoredSpills
from zsfl.wire.messages import SpillOffer

RUN = RunId("3fa9c1")
SMALL, LARGE = {"grad/a": torch.arange(6.0)}, {"grad/a": torch.arange(100_000.0)}


class Objects:
    """A store in this process, which can be away."""

    url = "test://store"

    def __init__(self) -> None:
        self.there: dict[Place, bytes] = {}
        self.error: StoreAway | None = None
        self.open = asyncio.Event()
        self.open.set()

    async def named(self, serial: int, data: bytes) -> str:
        return name_of(serial, data)

    async def put(self, at: Place, data: bytes) -> None:
        await self.open.wait()
        if self.error is not None:
            raise self.error
        assert at not in self.there
        self.there[at] = data

    async def get(self, at: Place) -> bytes | None:
        data = self.there.get(at)
        if data is not None and name_of(int(at.name[:8]), data) != at.name:
            raise SpillCorrupt("altered")
        return data

    async def delete(self, places: set[Place]) -> None:
        if self.error is not None:
            raise self.error
        for at in places:
            self.there.pop(at, None)


class Fixture:
    """Spills of one node, and what it says of them."""

    def __init__(self, limit_bytes: int = 0, request_s: float = 30.0) -> None:
        self.objects = Objects()
        self.troubles: list[tuple[str, StorageError | None]] = []
        self.tasks: list[asyncio.Task[None]] = []
        node = SimpleNamespace(
            card=SimpleNamespace(id=NodeId("00112233aabb")),
            settings=SimpleNamespace(request_s=request_s, beat_s=0.01, lost_after_s=0.02),
            counters=Counters(),
            start=self._start,
            waiting=lambda *_: nullcontext(),
        )
        self.spills = StoredSpills(
            cast(Any, self.objects),
            cast(Any, node),
            None,
            limit_bytes,
            trouble=lambda *one: self.troubles.append(one),
        )

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        self.tasks.append(asyncio.create_task(work, name=name))
        return self.tasks[-1]

    def put(self, version: int, shard: int = 0, tensors: dict[str, torch.Tensor] = SMALL) -> SpillOffer:
        cid = step_cid(RUN, shard, Version(version))
        meta = SpillMeta(
            cid=cid, part="body", version=Version(version), n=1.0, samples=1, loss_sum=None, client="c", node="s"
        )
        return self.spills.put(meta, tensors)

    async def placed(self, offer: SpillOffer) -> SpillOffer:
        if (placing := self.spills.placing(offer)) is not None:
            await until(asyncio.shield(placing))
        return self.spills.as_held(offer)


async def test_small_ones_of_a_turn_share_an_object_which_goes_when_all_are_released() -> None:
    that = Fixture()
    offers = [that.put(1, shard) for shard in range(3)]
    assert that.spills.offers(RUN) == []  # nothing is in place yet
    held = [await that.placed(offer) for offer in offers]
    [at] = that.objects.there
    assert {offer.at for offer in held} == {at.name}
    assert that.spills.offers(RUN) == held
    assert that.spills.placing(offers[0]) is None
    keys: list[Key] = [(offer.cid, offer.kind) for offer in held]
    read = await that.spills.read_all(keys)
    assert [decode(data)[0].cid for _, data in read] == [offer.cid for offer in held]
    assert [that.spills.fresh(key) for key in keys] == [data for _, data in read]
    that.spills.release([held[0].cid, held[2].cid])
    assert not that.spills.holds(held[0].cid)
    await asyncio.gather(*that.tasks)
    assert list(that.objects.there) == [at]
    that.spills.release([held[1].cid])
    await eventually(lambda: not that.objects.there)


async def test_a_large_one_has_an_object_of_its_own_and_replaces_one_of_its_step() -> None:
    that = Fixture()
    small = await that.placed(that.put(1))
    large = await that.placed(that.put(1, tensors=LARGE))
    await eventually(lambda: len(that.objects.there) == 1)
    assert small.at != large.at == next(iter(that.objects.there)).name
    assert that.spills.fresh((large.cid, "body")) is None
    assert that.spills.offers(RUN) == [large]


async def test_what_cannot_be_put_is_not_in_place_and_what_may_be_there_of_it_is_deleted() -> None:
    that = Fixture(request_s=0.01)
    that.objects.error = StoreAway("away")
    offer = that.put(1)
    with pytest.raises(StoreAway, match="away"):
        await that.placed(offer)
    assert not that.spills.holds(offer.cid)
    assert that.troubles[0][0] == NOT_PLACED
    await eventually(lambda: NOT_DELETED in [what for what, error in that.troubles if error])
    that.objects.error = None
    await eventually(lambda: that.troubles[-1] == (NOT_DELETED, None))


async def test_what_cannot_be_deleted_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MOST_LEFT", 2)
    that = Fixture()
    held = [await that.placed(that.put(version)) for version in range(1, 6)]
    that.objects.error = StoreAway("yours, but not to delete")
    that.spills.release([offer.cid for offer in held])
    that.objects.error = None
    await eventually(lambda: len(that.objects.there) == 3)
    assert {at.name for at in that.objects.there} == {offer.at for offer in held[:3]}


async def test_a_store_that_is_away_for_a_moment_is_waited_for() -> None:
    that = Fixture()
    that.objects.error = StoreAway("away")
    offer = that.put(1)
    await eventually(lambda: len(that.troubles) >= 2)
    that.objects.error = None
    placed = await that.placed(offer)
    assert placed.at[:8] > "00000001"  # where a call that was given up may write once more
    assert (NOT_PLACED, None) in that.troubles
    await eventually(lambda: that.troubles[-1] == (NOT_DELETED, None))
    assert [at.name for at in that.objects.there] == [placed.at]


async def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "WAITING_BYTES", 100)
    that = Fixture()
    that.objects.open.clear()
    assert that.spills.is_behind() is None
    offer = that.put(1)
    behind = that.spills.is_behind()
    assert behind is not None
    that.objects.open.set()
    await until(asyncio.shield(behind))
    await that.placed(offer)
    await eventually(lambda: that.spills.is_behind() is None)
    tight = Fixture(limit_bytes=500)
    await tight.placed(tight.put(1))
    with pytest.raises(SpillFull, match="allow more with --spill-mib"):
        tight.put(2)
    with pytest.raises(SpillTooLarge):
        tight.put(3, tensors=LARGE)


async def test_what_is_gone_or_altered_is_set_aside() -> None:
    that = Fixture()
    offers: list[SpillOffer] = []
    for version in (1, 2, 3):
        offers.append(await that.placed(that.put(version)))
    first, second, _ = list(that.objects.there)
    del that.objects.there[first]
    that.objects.there[second] = b"x" + that.objects.there[second][1:]
    keys: list[Key] = [(offer.cid, offer.kind) for offer in offers]
    assert await that.spills.set_aside_all(keys) == keys[:2]
    assert that.spills.offers(RUN) == offers[2:]


async def test_what_is_put_again_while_it_is_looked_for_is_not_set_aside() -> None:
    that = Fixture()
    offer = await that.placed(that.put(1))
    that.objects.there.clear()
    get = that.objects.get

    async def put_meanwhile(at: Place) -> bytes | None:
        await that.placed(that.put(1))
        return await get(at)

    that.objects.get = put_meanwhile
    assert await that.spills.set_aside_all([(offer.cid, "body")]) == []
    that.objects.get = get
    [(_, data)] = await that.spills.read_all([(offer.cid, "body")])
    assert decode(data)[0].cid == offer.cid


async def test_those_of_other_runs_are_deleted_when_one_begins() -> None:
    that = Fixture()
    await that.placed(that.put(1))
    assert that.spills.keep_only(RunId("000000")) == 1
    await eventually(lambda: not that.objects.there)
