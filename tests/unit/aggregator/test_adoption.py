"""What is read of a store, how often, and how much of it at once."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers.waiting import HANG_S

from zsfl.aggregator import adoption
from zsfl.aggregator.adoption import READ_AT_ONCE, Adoption
from zsfl.aggregator.gathering import Gathering
from zsfl.errors import SpillCorrupt
from zsfl.ids import NodeId, Role, RunId, Version, step_cid
from zsfl.metrics import Counters
from zsfl.spill.layout import SpillMeta, encode
from zsfl.spill.objects import Place, name_of
from zsfl.spill.segments import joined

RUN, NODES = RunId("3fa9c1"), [NodeId(f"{number:012x}") for number in range(3)]


class Objects:
    """A store in this process, of which some objects are half written."""

    def __init__(self) -> None:
        self.there: dict[Place, bytes | None] = {}
        self.reads: list[Place] = []
        self.under_way = self.most = 0

    async def found(self, run: RunId) -> list[Place]:
        return sorted(self.there)

    async def get(self, at: Place) -> bytes:
        self.reads.append(at)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0)
        self.under_way -= 1
        if (data := self.there[at]) is None:
            raise SpillCorrupt("half written")
        return data

    async def delete(self, places: list[Place]) -> None:
        for at in places:
            del self.there[at]


def adopting(objects: Objects, live: list[NodeId]) -> Adoption:
    node = SimpleNamespace(
        settings=SimpleNamespace(beat_s=0.001, request_s=2 * HANG_S),
        peers=lambda role: [SimpleNamespace(id=one) for one in live if role is Role.SPLIT_SERVER],
        counters=Counters(),
    )
    gathering = Gathering(RUN, max_staleness=0, steps_per_version=1, shards=2)
    made: Any = Adoption(
        *cast(Any, (node, objects, SimpleNamespace(run=RUN), gathering, None, None, None, lambda *_: True))
    )
    return made


async def test_what_stays_half_written_is_not_read_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adoption, "LAG_S", 0.0)
    objects, (gone, there, _) = Objects(), NODES
    half = [Place(RUN, node, name_of(1, b"x")) for node in (gone, there)]
    objects.there = dict.fromkeys(half)
    adopted = adopting(objects, [there])
    looking = asyncio.ensure_future(adopted.run())
    for _ in range(3):
        await adopted.looked()
    assert objects.reads.count(half[0]) == 1
    assert objects.reads.count(half[1]) == 3  # who is there may be writing it
    assert sorted(objects.there) == half  # and nobody deletes what may become whole
    looking.cancel()


async def test_no_more_is_read_at_once_however_many_hold_something() -> None:
    objects, wanted = Objects(), dict[NodeId, dict[Any, str]]()
    for shard, node in enumerate(NODES):
        for version in range(READ_AT_ONCE):
            cid = step_cid(RUN, shard, Version(version), 0)
            meta = SpillMeta(
                cid=cid, part="body", version=Version(version), n=1.0, samples=1, loss_sum=None, client="c", node="s"
            )
            data, _ = joined([encode(meta, {"grad/a": torch.zeros(1)})])
            at = Place(RUN, node, name_of(version, data))
            objects.there[at] = data
            wanted.setdefault(node, {})[cid, "body"] = at.name
    adopted = adopting(objects, NODES)
    found = await asyncio.gather(*(adopted.fetch(node, of) for node, of in wanted.items()))
    assert [{key for key, _ in some} for some in found] == [of.keys() for of in wanted.values()]
    assert objects.most == READ_AT_ONCE


async def test_a_look_for_what_somebody_misses_has_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adoption, "MOST_READ", 2)
    objects, (gone, there, _) = Objects(), NODES
    for serial in range(6):
        for node in (gone, there):
            objects.there[Place(RUN, node, name_of(serial, b"x"))] = None
    adopted = adopting(objects, [there])
    looking = asyncio.ensure_future(adopted.run())
    await adopted.looked()
    read = {at.name[:8] for at in objects.reads if at.node == there}
    assert read == {"00000004", "00000005"}  # what it put last
    assert len({at for at in objects.reads if at.node == gone}) == 6
    looking.cancel()
