"""Spills are offered together, and the small ones along with their offers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import torch

from zsfl.ids import NodeCard, NodeId, Role, RunId, Version, step_cid
from zsfl.member import OFFERS_BYTES, Member
from zsfl.metrics import Counters
from zsfl.reports import AnyReport, Following, Note
from zsfl.settings import NodeSettings
from zsfl.spill.layout import SpillMeta
from zsfl.spill.store import SpillStore
from zsfl.wire.fields import MAX_CARRIED_BYTES, MAX_OFFERS
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import Announcement, Offers, RunState, SpillOffer


class Said:
    """A node that only listens to itself."""

    def __init__(self) -> None:
        self.name = "me"
        self.card = SimpleNamespace(id=NodeId("me"))
        self.counters = Counters()
        self.reports: list[AnyReport] = []
        self.settings = NodeSettings()
        self.digests: list[tuple[Offers, list[Buffer]]] = []

    def counted(self) -> dict[str, float]:
        return {"steps": 1.0}

    def report(self, report: AnyReport) -> None:
        self.reports.append(report)

    def note(self, message: str, level: str = "info") -> None:
        self.report(Note(node=self.name, message=message, level=level))

    def publish(self, digest: Offers, parts: Sequence[Buffer] = ()) -> None:
        self.digests.append((digest, list(parts)))


def put(member: Member, shard: int, numbers: int) -> SpillOffer:
    cid = step_cid(RunId("3fa9c1"), shard, Version(1))
    meta = SpillMeta(cid=cid, part="body", version=Version(1), n=1.0, samples=1, loss_sum=None, client="c", node="s")
    return member.spills.put(meta, {"grad/a": torch.zeros(numbers)})


async def offered(folder: Path, sizes: Sequence[int]) -> tuple[Member, list[SpillOffer], Said]:
    """What a member says of spills of so many numbers, all put in one turn of its loop."""
    node = Said()
    member = Member(cast(Any, node), [], folder)
    offers = [put(member, shard, size) for shard, size in enumerate(sizes)]
    for offer in offers:
        member.offer(offer)
    assert node.digests == []
    await asyncio.sleep(0)
    return member, offers, node


async def test_spills_of_one_turn_are_offered_together_with_their_bytes(tmp_path: Path) -> None:
    member, offers, node = await offered(tmp_path, [10, 1000, MAX_CARRIED_BYTES // 4, 3])
    [(digest, parts)] = node.digests
    assert list(digest.offers) == offers
    store = member.spills
    assert isinstance(store, SpillStore)
    stored = [store.read((offer.cid, "body")) for offer in offers]
    assert parts == [stored[0], stored[1], b"", stored[3]]
    assert digest.counters == {"steps": 1.0}


async def test_a_digest_is_bounded(tmp_path: Path) -> None:
    _, offers, node = await offered(tmp_path, [10] * (MAX_OFFERS + 10) + [10_000] * 20)
    assert [offer for digest, _ in node.digests for offer in digest.offers] == offers
    assert all(len(digest.offers) <= MAX_OFFERS for digest, _ in node.digests)
    assert all(sum(map(len, parts)) <= OFFERS_BYTES for _, parts in node.digests)
    assert len(node.digests) > 3


async def test_how_far_the_run_is_is_said_once_a_second_at_most_and_that_it_is_finished_once(tmp_path: Path) -> None:
    node = Said()
    member = Member(cast(Any, node), [], tmp_path)
    card = NodeCard(id=NodeId("1"), name="agg", role=Role.AGGREGATOR, host="127.0.0.1", control_port=1)
    member.aggregator.set(card)
    state = RunState(run=RunId("3fa9c1"), phase="training", version=Version(7), round=1, rounds=3, window=3, windows=4)
    for serial in range(1, 4):
        said = msgspec.structs.replace(state, serial=serial)
        member.heard(Announcement(node=card.id, state=said))
    for serial in (9, 9):
        said = msgspec.structs.replace(state, serial=serial, phase="finished")
        member.heard(Announcement(node=card.id, state=said))
    assert node.reports == [
        Following(node="me", round=2, rounds=3, window=3, windows=4, version=7),
        Note(node="me", message="the run is finished, at version 7"),
    ]


async def test_at_the_end_of_a_run_nothing_of_it_is_left(tmp_path: Path) -> None:
    """Where a step was made twice, nobody may have taken the second copy, nor ever told to let go of it."""
    member, offers, _ = await offered(tmp_path, [10, 20])
    card = NodeCard(id=NodeId("1"), name="agg", role=Role.AGGREGATOR, host="127.0.0.1", control_port=1)
    member.aggregator.set(card)
    state = RunState(run=RunId("3fa9c1"), phase="training", version=Version(2), round=0, rounds=1, window=1, windows=1)
    member.heard(Announcement(node=card.id, state=msgspec.structs.replace(state, serial=1)))
    assert member.spills.holds(offers[0].cid)
    member.heard(Announcement(node=card.id, state=msgspec.structs.replace(state, serial=2, phase="finished")))
    assert not any(member.spills.holds(offer.cid) for offer in offers)
    await member.aclose()
    assert not list(tmp_path.rglob("*.spills"))


async def test_the_state_of_a_run_never_goes_back(tmp_path: Path) -> None:
    member = Member(cast(Any, Said()), [], tmp_path)
    card = NodeCard(id=NodeId("1"), name="agg", role=Role.AGGREGATOR, host="127.0.0.1", control_port=1)
    member.aggregator.set(card)
    seen: list[tuple[str, int]] = []
    for run, serial in (("3fa9c1", 3), ("3fa9c1", 2), ("3fa9c1", 3), ("3fa9c1", 4), ("b0b0b0", 1)):
        state = RunState(
            run=RunId(run),
            phase="training",
            version=Version(serial),
            round=0,
            rounds=1,
            window=0,
            windows=1,
            serial=serial,
        )
        member.heard(Announcement(node=card.id, state=state))
        assert member.state.value is not None
        seen.append((member.state.value.run, member.state.value.serial))
    assert seen == [("3fa9c1", 3), ("3fa9c1", 3), ("3fa9c1", 3), ("3fa9c1", 4), ("b0b0b0", 1)]
