"""What the collector says of spills that do not come."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from helpers.waiting import eventually

from zsfl.aggregator.collector import Collector
from zsfl.aggregator.gathering import Gathering
from zsfl.aggregator.spool import Spool
from zsfl.errors import NoPeer, Unavailable, ZsflError
from zsfl.ids import Cid, NodeCard, NodeId, Role, RunId, Version, step_cid
from zsfl.wire.messages import FetchSpills, SpillOffer

CARD = NodeCard(id=NodeId("1"), name="server", role=Role.SPLIT_SERVER, host="127.0.0.1", control_port=1, data_port=2)


def cid(version: int, shard: int = 0) -> Cid:
    return step_cid(RunId("3fa9c1"), shard, Version(version))


class Refusing:
    """A node whose one peer refuses every request with the same error."""

    def __init__(self, error: ZsflError) -> None:
        self.error = error
        self.asked: list[FetchSpills] = []
        self.notes: list[str] = []
        self.settings = SimpleNamespace(request_s=1.0)
        self.tasks: list[asyncio.Task[None]] = []

    def connect(self, *_: object) -> Refusing:
        return self

    async def request(self, body: FetchSpills, deadline_s: float) -> None:
        self.asked.append(body)
        raise self.error

    def start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        self.tasks.append(asyncio.create_task(work, name=name))
        return self.tasks[-1]

    def note(self, message: str, level: str = "info") -> None:
        assert level == "warning"
        self.notes.append(message)

    def close(self, reason: str) -> None:
        assert reason == "is gone"


async def said_of(error: ZsflError) -> list[str]:
    """What is noted when two spills are offered three times each, and then one of the next version."""
    node = Refusing(error)
    gathering = Gathering(RunId("3fa9c1"), max_staleness=0, steps_per_version=1, shards=2)
    collector = Collector(cast(Any, node), gathering, Spool(Path()), lambda _: None)
    collector.joined(CARD)
    for version, shard in [(4, 0), (4, 1), (4, 0), (4, 1), (4, 0), (4, 1), (5, 0)]:
        gathering.begin(Version(version), {cid(version, shard) for shard in (0, 1)})
        asked = len(node.asked)
        offer = SpillOffer(cid=cid(version, shard), part="body", version=Version(version), size_bytes=9)
        collector.offered(CARD.id, [offer])
        await eventually(lambda asked=asked: len(node.asked) > asked, 5)
    collector.lost(CARD)
    await asyncio.gather(*node.tasks, return_exceptions=True)
    return node.notes


async def test_why_a_spill_does_not_come_is_said_once() -> None:
    notes = await said_of(Unavailable("server: LocalProtocolError: 9 bytes are over the limit of 8"))
    assert [note.split(":")[0] for note in notes] == [
        f"server does not hand over body of {cid(4, 0)}",
        f"server does not hand over body of {cid(4, 1)}",
        f"server does not hand over body of {cid(5, 0)}",
    ]
    assert all("over the limit of 8" in note for note in notes)


async def test_a_holder_that_is_gone_is_left_to_presence() -> None:
    assert await said_of(NoPeer("server is gone")) == []
