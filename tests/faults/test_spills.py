"""Spills that come to harm between being acknowledged and being fetched, and disks without room for any."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import fsspec
import pytest
import torch
from helpers.exact import Case, Ran, assert_equal, in_process, spills_left
from helpers.ledger import ledger
from helpers.nodes import Nodes
from helpers.waiting import eventually, until

import zsfl
from zsfl import member
from zsfl.aggregator.audit import audit
from zsfl.ids import Role, parse_cid
from zsfl.member import Member
from zsfl.reports import AnyReport, Note, Waiting
from zsfl.spill import store
from zsfl.spill.layout import SpillMeta
from zsfl.spill.store import SpillStore
from zsfl.spill.stored import StoredSpills
from zsfl.wire.messages import SpillOffer

CASE = Case(optimizer="adam", dropout=0.2, rounds=2)
PutAll = Callable[[SpillStore, Sequence[tuple[SpillMeta, Mapping[str, torch.Tensor]]]], list[SpillOffer]]


def _alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


@pytest.mark.parametrize("part", ["body", "client"])
@pytest.mark.parametrize(
    ("harm", "shared"),
    [(_alter, True), (_cut, True), (_alter, False), (_cut, False), (Path.unlink, False)],
    ids=["altered in a segment", "segment cut", "altered", "cut", "deleted"],
)
async def test_what_is_lost_on_a_disk_is_made_again(
    harm: Callable[[Path], None], shared: bool, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = await in_process(CASE, tmp_path, run="straight")
    put_all: PutAll = SpillStore.put_all
    harmed: list[str] = []

    def put_and_harm(
        self: SpillStore, spills: Sequence[tuple[SpillMeta, Mapping[str, torch.Tensor]]]
    ) -> list[SpillOffer]:
        offers = put_all(self, spills)
        step = parse_cid(offers[0].cid)
        if (step.version, step.shard, offers[0].part) == (3, 2, part) and not harmed:
            harmed.append(offers[0].cid)
            harm(max(self.folder.iterdir(), key=lambda path: (path.stat().st_mtime_ns, path.name)))
        return offers

    monkeypatch.setattr(SpillStore, "put_all", put_and_harm)
    monkeypatch.setattr(member, "MAX_CARRIED_BYTES", 0)  # nothing travels with its offer
    if not shared:
        monkeypatch.setattr(store, "LARGE_BYTES", 0)
    notes: list[str] = []

    def on(report: AnyReport) -> None:
        if isinstance(report, Note):
            notes.append(report.message)

    ran = await in_process(CASE, tmp_path, run="harmed", on_report=on, beat_s=0.1)
    assert len(harmed) == 1
    assert any(f"lost its spill of {harmed[0]}: made again" in note for note in notes), notes
    assert_equal(ran.weights, straight.weights)
    assert len(ledger(ran.folder)) == len(ledger(straight.folder))
    assert audit(ran.folder).faults == []
    left = [path.name for path in spills_left(tmp_path) if path.name != ".lock"]
    if harm is Path.unlink:
        assert left == []
    else:
        assert left == [f"{harmed[0]}.{part}.damaged"]


@pytest.mark.parametrize("part", ["body", "client"])
async def test_a_full_disk_is_waited_for(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = await in_process(CASE, tmp_path, run="straight")
    pwritev, refused = os.pwritev, list[str]()

    def full(file: int, buffers: Sequence[bytes], offset: int) -> int:
        """The disk is full when this part of the fourth version is written, three times."""
        path = os.readlink(f"/proc/self/fd/{file}")
        data = b"".join(bytes(one) for one in buffers)
        if "/spills/" in path and b"-v00000003-" in data and f'"part":"{part}"'.encode() in data and len(refused) < 3:
            refused.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwritev(file, buffers, offset)

    monkeypatch.setattr(os, "pwritev", full)
    waited: list[str] = []

    def on(report: AnyReport) -> None:
        if isinstance(report, Waiting):
            waited.append(report.what)

    ran = await in_process(CASE, tmp_path, run="full", on_report=on, beat_s=0.1)
    assert len(refused) == 3
    assert_equal(ran.weights, straight.weights)
    assert audit(ran.folder).faults == []
    assert spills_left(tmp_path) == []


async def test_a_disk_that_stays_full_ends_the_run_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, *_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(zsfl.RunFailed, match=r"no room for another spill .*free some space"):
        await in_process(CASE, tmp_path, run="full", patience_s=3.0, beat_s=0.1)


async def test_what_a_lost_server_acknowledged_and_told_nobody_of_is_taken_from_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = await in_process(CASE, tmp_path, run="straight")
    nodes = Nodes(CASE.job(), tmp_path)
    withheld: list[SpillOffer] = []
    say, offers = Member._say_new, StoredSpills.offers

    def withhold(self: Member) -> None:
        """From the fourth version on, nobody hears of what the first server has."""
        if self._node.name == "server-0" and any(offer.version >= 3 for offer in self._new):
            withheld.extend(self._new)
            self._new.clear()
        else:
            say(self)

    monkeypatch.setattr(Member, "_say_new", withhold)
    monkeypatch.setattr(StoredSpills, "offers", lambda self, run: [o for o in offers(self, run) if o not in withheld])
    store = {"spill": "memory://lab/spills", "patience_s": 30.0}
    try:
        address = await nodes.start("aggregator", Role.AGGREGATOR, **store)
        await nodes.start("server-0", Role.SPLIT_SERVER, peers=(address,), **store)
        await nodes.start("server-1", Role.SPLIT_SERVER, peers=(address,), **store)
        for shard in range(CASE.clients):
            await nodes.start(f"client-{shard}", Role.CLIENT, shards=str(shard), peers=(address,), **store)
        await eventually(lambda: withheld)
        nodes.tasks["server-0"].cancel()
        await until(asyncio.wait([nodes.tasks["aggregator"]]))
    finally:
        await nodes.close()
    assert sum(peers["aggregator"].get("spills_adopted", 0) for peers in (one.peers for one in nodes.rounds)) > 0
    assert [note for note in nodes.notes if note.startswith("driving")] == []
    ran = Ran(tmp_path / "nodes", nodes.rounds)
    assert_equal(ran.weights, straight.weights)
    assert len(ledger(ran.folder)) == len(ledger(straight.folder))
    found = audit(ran.folder)
    assert (found.faults, found.pending, found.dropped, found.counted) == ([], 0, 0, 20)
    assert fsspec.filesystem("memory").find("/lab") == []
    assert spills_left(tmp_path) == []
