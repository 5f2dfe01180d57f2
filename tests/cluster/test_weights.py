"""Weights that travel compressed, and as the difference to the version before, are the same weights in fewer bytes."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from helpers.exact import Case, Ran, assert_close, assert_equal, in_process, ordinary
from helpers.ledger import ledger
from helpers.takeover import CASE as LONG
from helpers.takeover import READY, Seen, assert_undisturbed, cluster, folder_of, says, trained
from helpers.waiting import HANG_S

import zsfl
from zsfl import demo
from zsfl.ids import Portion
from zsfl.wire.framing import Buffer, nbytes
from zsfl.wire.messages import Broadcast, Weights
from zsfl.wire.pubsub import Publisher

PACKED, DELTA = "raw, weights=raw+shuffle+lz4", "raw, weights=raw+shuffle+lz4+delta"
CASES = {
    "adam": Case(optimizer="adam", rounds=3),
    "batch norm": Case(optimizer="adam", norm=True, batch_norm="merged", rounds=3),
    "batch norm per client": Case(optimizer="momentum", norm=True, tail=False, rounds=3),
    "a head that does not move": Case(frozen_head=True, rounds=3),
}


@dataclass(slots=True)
class Published:
    """What an aggregator of this process told all who listen."""

    weights: list[Weights] = field(default_factory=list[Weights])
    size_bytes: int = 0

    def steps(self, portion: str) -> list[tuple[int, int | None]]:
        """Version and base of each."""
        return [(one.version, one.base) for one in self.weights if one.portion == Portion(portion)]


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Published:
    """What is published from now on."""
    seen, publish = Published(), Publisher.publish

    def watched(self: Publisher, topic: bytes, body: Broadcast, parts: Sequence[Buffer] = ()) -> None:
        if isinstance(body, Weights):
            seen.weights.append(body)
            seen.size_bytes += sum(map(nbytes, parts))
        publish(self, topic, body, parts)

    monkeypatch.setattr(Publisher, "publish", watched)
    return seen


def digests(ran: Ran) -> list[str]:
    """Of every version's weights."""
    return [record["weights"] for record in ledger(ran.folder)]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_not_a_bit_is_another_and_fewer_bytes_are_published(
    case: Case, published: Published, tmp_path: Path
) -> None:
    ran: dict[str, Ran] = {}
    sizes: dict[str, int] = {}
    for codec in ("raw", PACKED, DELTA):
        before = published.size_bytes
        published.weights.clear()
        ran[codec] = await in_process(case, tmp_path, run=f"run-{len(ran)}", servers=2, codec=codec)
        sizes[codec] = published.size_bytes - before
        for portion in ("body", "client"):
            versions = range(len(digests(ran[codec])) + 1)
            assert published.steps(portion) == [
                (version, version - 1 if version and codec == DELTA else None) for version in versions
            ]
    if not case.norm or case.batch_norm == "merged":
        assert_close(ran[DELTA].weights, ordinary(case))
    for codec in (PACKED, DELTA):
        assert digests(ran[codec]) == digests(ran["raw"])
        assert_equal(ran[codec].weights, ran["raw"].weights)
    assert sizes[DELTA] < sizes["raw"]  # though few of these tensors are long enough for lz4


async def test_a_job_may_ask_for_it_and_small_steps_cost_few_bytes(published: Published, tmp_path: Path) -> None:
    sizes: list[int] = []
    digits: list[list[str]] = []
    for codec in ("raw", "raw, weights=raw+shuffle+lz4+delta"):
        job = dataclasses.replace(demo.job, codec=codec, optimizer=zsfl.adam(lr=1e-4))
        before = published.size_bytes
        async with zsfl.LocalCluster(
            job, clients=3, split_servers=2, in_process=True, runs=tmp_path, run=f"run-{len(sizes)}"
        ) as nodes:
            await trained(nodes, 3)
        sizes.append(published.size_bytes - before)
        digits.append(digests(Ran(folder_of(nodes), [])))
    assert digits[0] == digits[1]
    assert sizes[1] < 0.8 * sizes[0]


async def test_what_a_resumed_run_publishes_first_is_whole(published: Published, tmp_path: Path) -> None:
    case = replace(CASES["adam"], rounds=2)
    straight = await in_process(case, tmp_path, run="straight")
    begun = await in_process(case, tmp_path, run="halves", rounds=1, codec=DELTA)
    published.weights.clear()
    finished = await in_process(case, tmp_path, run="halves", resume=True, servers=2, codec=DELTA)
    first, last = len(digests(straight)) // 2, len(digests(straight))
    for portion in ("body", "client"):
        assert published.steps(portion) == [
            (first, None), *((version, version - 1) for version in range(first + 1, last + 1))
        ]  # fmt: skip
    assert finished.folder == begun.folder
    assert digests(finished) == digests(straight)


async def test_a_server_that_comes_late_and_an_aggregator_that_takes_over(tmp_path: Path) -> None:
    seen = Seen()
    async with asyncio.timeout(2 * HANG_S), cluster(tmp_path, seen, split_servers=1, codec=DELTA) as nodes:
        await seen.wait_for(says(READY))
        await trained(nodes, 1)
        await nodes.start_split_server("late")
        await nodes.kill("split-server-0")  # so that who came late serves all from here on
        await trained(nodes, 1)
        await nodes.kill("aggregator")
        await seen.wait_for(says("taking over"))
        await trained(nodes, 2)
        last = folder_of(nodes)
    assert last.name == "mine.standby-0"
    await assert_undisturbed(last, tmp_path, LONG)
