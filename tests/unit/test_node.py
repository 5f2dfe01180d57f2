"""The role's side of a node: what it does while it ends."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import zmq.asyncio
from helpers.descriptors import none_left
from helpers.waiting import HANG_S, eventually

from zsfl.ids import NodeCard, NodeId, Role
from zsfl.metrics import Counters
from zsfl.node import BeatExtras, Node
from zsfl.reports import AnyReport
from zsfl.settings import NodeSettings, WireLimits
from zsfl.waits import Overdue
from zsfl.wire.messages import Broadcast, Ok, Reply, Request

PEER = NodeCard(id=NodeId("peer"), name="peer", role=Role.SPLIT_SERVER, host="127.0.0.1", control_port=1)


class NoFace:
    """Nobody listens to what the node says."""

    def __init__(self) -> None:
        self.counters = Counters()

    def say(self, report: AnyReport) -> None: ...

    def say_wait(self, wait: Overdue) -> None: ...


class Replacing:
    """A role that begins something whenever a peer is lost, as clients do."""

    hears: frozenset[Role] = frozenset()
    data_port = 0

    def __init__(self, node: Node, play: Callable[[], Awaitable[None]]) -> None:
        self.begun: list[str] = []
        self._node = node
        self._play = play

    async def run(self) -> None:
        await self._play()

    def lost(self, card: NodeCard, reason: str) -> None:
        self._node.start(self._begin(card.name), "replace")

    async def _begin(self, what: str) -> None:
        self.begun.append(what)

    async def drain(self, timeout_s: float) -> None: ...

    async def control(self, request: Request) -> Reply:
        return Ok()

    def joined(self, card: NodeCard) -> None: ...

    def heard(self, broadcast: Broadcast) -> None: ...

    def beat(self) -> BeatExtras:
        return BeatExtras()


async def lose_a_peer_at_the_end(node: Node) -> None:
    """Lose one while this is cancelled, and another once every task of the node is done."""
    try:
        await asyncio.Event().wait()
    finally:
        node.peer_lost(PEER, "killed")
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: node.peer_lost(PEER, "killed"))


async def live(ending: str) -> tuple[Any, list[str]]:
    """Live until the role ends in one of three ways: what came of that, and what was begun at the end."""

    async def play() -> None:
        node.start(lose_a_peer_at_the_end(node), "last")
        await asyncio.sleep(0)
        if ending == "fails":
            raise OSError("no such step")
        if ending == "cancelled":
            running.cancel()
            await asyncio.Event().wait()

    context, limits, settings = zmq.asyncio.Context(), WireLimits(), NodeSettings()
    card = NodeCard(id=NodeId("me"), name="me", role=Role.CLIENT, host="127.0.0.1", control_port=1)
    try:
        node = Node(NoFace(), card, settings=settings, facts={}, context=context, limits=limits)
        role = Replacing(node, play)
        running: asyncio.Task[Any] = asyncio.create_task(node.run(role, lambda: None))
        async with asyncio.timeout(HANG_S):
            [outcome] = await asyncio.gather(running, return_exceptions=True)
    finally:
        context.destroy(linger=0)
    return outcome, role.begun


@pytest.mark.parametrize(
    ("ending", "expected"),
    [("fails", ExceptionGroup), ("returns", type(None)), ("cancelled", asyncio.CancelledError)],
)
async def test_a_peer_that_is_lost_while_the_node_ends_begins_nothing(ending: str, expected: type) -> None:
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: errors.append(what))
    outcome, begun = await live(ending)
    assert (type(outcome), begun) == (expected, [])
    del outcome
    gc.collect()  # that nobody asked for the error of a task or a future is told of when it is collected
    assert errors == []


async def test_a_file_that_cannot_be_opened_for_want_of_descriptors_is_written_later(tmp_path: Path) -> None:
    """Nobody opens it through anything that tells refusals of a disk from other errors."""
    context, settings = zmq.asyncio.Context(), NodeSettings(beat_s=0.01)
    card = NodeCard(id=NodeId("me"), name="me", role=Role.CLIENT, host="127.0.0.1", control_port=1)
    waited: list[str] = []

    def write() -> int:
        waited.extend(what for what, _ in waiting.now())
        return (tmp_path / "ledger").write_bytes(b"x")

    try:
        node = Node(NoFace(), card, settings=settings, facts={}, context=context, limits=WireLimits())
        waiting = node._waits
        with none_left():
            writing = asyncio.ensure_future(node.persistently(write))
            await eventually(lambda: waited or writing.done())
            assert not writing.done()
        async with asyncio.timeout(HANG_S):
            assert await writing == 1
        with pytest.raises(IsADirectoryError):  # that is a fault, and not waited for
            await node.persistently(lambda: tmp_path.write_bytes(b""))
        node.close()
    finally:
        context.destroy(linger=0)
    assert waited[0].startswith("a file descriptor, as this process may open no more files and connections: allow it")


async def test_only_who_is_not_back_is_said_to_be_gone() -> None:
    context = zmq.asyncio.Context()
    card = NodeCard(id=NodeId("me"), name="me", role=Role.CLIENT, host="127.0.0.1", control_port=1)
    try:
        node = Node(NoFace(), card, settings=NodeSettings(), facts={}, context=context, limits=WireLimits())
        node._role = cast(Any, SimpleNamespace(joined=lambda _: None, lost=lambda *_: None))
        one, other = (
            NodeCard(id=NodeId(name), name=name, role=Role.SPLIT_SERVER, host="127.0.0.1", control_port=port)
            for port, name in enumerate(("one", "other"), 2)
        )
        for peer in (one, other):
            node.peer_lost(peer, "silent")
        assert node.hints_of_gone(Role.SPLIT_SERVER)[0].startswith("other ran at 127.0.0.1:3")
        node.peer_joined(other, ())
        assert node.hints_of_gone(Role.SPLIT_SERVER)[0].startswith("one ran at 127.0.0.1:2")
        node.peer_joined(one, ())
        assert node.hints_of_gone(Role.SPLIT_SERVER) == ()
        node.close()
    finally:
        context.destroy(linger=0)
