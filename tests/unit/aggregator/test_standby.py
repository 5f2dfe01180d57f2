"""Whoever stands by: what it takes itself to know of the run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from zsfl.aggregator.mirror import Mirror
from zsfl.aggregator.standby import StandbyRole
from zsfl.aggregator.standing import Standing
from zsfl.errors import NoPeer, RunFailed, StorageError, Unavailable
from zsfl.ids import NodeCard, NodeId, Role, RunId, Version
from zsfl.settings import NodeSettings
from zsfl.wire.messages import Beat, CheckNeed, Phase, Request, RunState
from zsfl.wire.refusals import refusal, to_error
from zsfl.wire.succession import FileInfo, Follow, Following

ORIGIN = "b" * 12
LEADER = NodeCard(id=NodeId("leader"), name="leader", role=Role.AGGREGATOR, host="127.0.0.1", control_port=1)
LEDGER = FileInfo(name="ledger.jsonl", size_bytes=100, changed_us=1)


class Source:
    """An aggregator of the second epoch that names these files, and is killed before it hands over any."""

    def __init__(self, *files: FileInfo) -> None:
        self.following = Following(agrees=True, origin=ORIGIN, epoch=2, files=files)

    async def request(self, request: Request, deadline_s: float) -> Any:
        if not isinstance(request, Follow):
            raise Unavailable("killed")
        return SimpleNamespace(expect=lambda _: self.following)


class FakeNode:
    """A node that has no peers but the aggregator."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.card, self.name = NodeSettings(**settings), SimpleNamespace(id=NodeId("me"), key=""), "me"
        self.notes: list[str] = []
        self.there = [LEADER]

    def peer(self, node: NodeId) -> NodeCard | None:
        return next((card for card in self.there if card.id == node), None)

    def note(self, message: str, level: str = "info") -> None:
        self.notes.append(message)

    def waiting(self, what: object) -> AbstractContextManager[None]:
        return nullcontext()

    def listen(self, *_: object) -> Any:
        return SimpleNamespace(run=lambda: None)

    def start(self, *_: object) -> Any:
        return SimpleNamespace(cancel=lambda: None)

    def connect(self, card: NodeCard, port: int) -> Any:
        return SimpleNamespace(close=lambda _: None, request=self._cut)

    async def _cut(self, request: Request, deadline_s: float) -> Any:
        """The aggregator leaves while it is asked."""
        self.there.clear()
        self.lost()
        raise Unavailable("gone")

    lost: Callable[[], None] = staticmethod(lambda: None)

    async def persistently(self, write: Callable[[], Any]) -> Any:
        return write()

    async def until_written(self, write: Callable[[], Any]) -> Any:
        return await write()


def standby(folder: Path, *, shared: bool = True, node: FakeNode | None = None) -> Any:
    standing = Standing(holder="a" * 12, origin=ORIGIN, epoch=1, shared=shared)
    standing.keep(folder)
    mirror = Mirror(folder, 0, syncs=False)
    return StandbyRole(cast(Any, node or FakeNode()), mirror, standing, shards=4, warm_up=lambda: None)


def says(role: Any, phase: Phase, version: int = 7) -> None:
    """The aggregator is there, and tells where the run stands."""
    role.joined(LEADER)
    state = RunState(
        run=RunId("3fa9c1"), phase=phase, version=Version(version), round=1, rounds=2, window=0, windows=1, epoch=1
    )
    role.heard(Beat(card=LEADER, peers=(), counters={}, state=state))


async def test_an_epoch_is_not_known_before_its_history_is_here(tmp_path: Path) -> None:
    """Else a copy that lacks versions would be taken for newer than a whole one of the epoch before."""
    with pytest.raises(Unavailable):
        await standby(tmp_path)._catch_up(Source(LEDGER))
    assert Standing.of(tmp_path).epoch == 1
    await standby(tmp_path)._catch_up(Source())
    assert Standing.of(tmp_path).epoch == 2


async def test_what_the_disk_refuses_to_remember_is_remembered_at_the_next_try(tmp_path: Path) -> None:
    role, source = standby(tmp_path, shared=False), Source()
    (tmp_path / ".succession.json.tmp").mkdir()
    with pytest.raises(StorageError):
        await role._catch_up(source)
    (tmp_path / ".succession.json.tmp").rmdir()
    await role._catch_up(source)
    assert (Standing.of(tmp_path).epoch, Standing.of(tmp_path).shared) == (2, True)


async def test_who_takes_it_for_an_aggregator_may_ask_again(tmp_path: Path) -> None:
    """It may have been one until now, at this very address: that is no fault of whoever asks."""
    with pytest.raises(NoPeer) as raised:
        await standby(tmp_path).control(CheckNeed(parts=()))
    assert isinstance(to_error(refusal(raised.value), "me"), Unavailable)


async def test_a_run_that_is_finished_is_not_stood_for_though_its_last_files_are_not_here(tmp_path: Path) -> None:
    node = FakeNode()
    role = standby(tmp_path, node=node)
    says(role, "finished")
    node.lost = lambda: role.lost(LEADER, "left: it said goodbye")
    await role._until_over()
    assert role.elected is None
    assert not Standing.of(tmp_path).shared, "it would stand for this run when the next one begins"
    assert any("this copy ends at version 0 of 7" in note for note in node.notes)


async def test_a_run_that_failed_is_not_stood_for_either(tmp_path: Path) -> None:
    node = FakeNode()
    role = standby(tmp_path, node=node)
    says(role, "failed")
    node.lost = lambda: role.lost(LEADER, "silent for 2 s")
    with pytest.raises(RunFailed):
        await role._until_over()


@pytest.mark.parametrize(
    ("flags", "shared", "said"),
    [
        ({}, False, r"for 0.02 s there was no aggregator\. .*--resume.*had not stood by for long enough to take over"),
        (
            {"takeover": "never"},
            True,
            r"for 0.02 s .*\(--takeover never\).* go on from its copy .*aggregator JOB --run copy --resume \(and",
        ),
    ],
)
async def test_who_does_not_take_over_says_what_can_be_done_once_the_runs_patience_is_over(
    flags: dict[str, Any], shared: bool, said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    (folder / "checkpoint" / "round-000000").mkdir(parents=True)
    (folder / "checkpoint" / "round-000000" / "place.json").touch()
    node = FakeNode(patience_s=0.02, **flags)
    role = standby(folder, shared=shared, node=node)
    says(role, "training")
    node.lost = lambda: role.lost(LEADER, "silent for 2 s")
    with pytest.raises(NoPeer, match=said):
        await role._until_over()
    assert len([note for note in node.notes if "--takeover never" in note]) == shared


async def test_who_never_saw_an_aggregator_waits_for_one_as_long_as_any_node(tmp_path: Path) -> None:
    node = FakeNode(join_s=0.02, beat_s=0.001, lost_after_s=0.002)
    with pytest.raises(NoPeer, match=r"for 0.02 s there was no aggregator\. Start one with: zsfl node aggregator JOB$"):
        await standby(tmp_path, shared=False, node=node)._until_over()
