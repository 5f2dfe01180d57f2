"""Elastic and async mode: like exact mode where nobody is late, and not held up where somebody is."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.exact import Case, assert_close, assert_equal, in_process, spills_left
from helpers.gated import VERSIONS, gated_job
from helpers.ledger import Record, counted, ledger, shards, versions
from helpers.nodes import Nodes
from helpers.rounds import Rounds
from helpers.waiting import HANG_S, eventually, until

import zsfl
from zsfl.ids import Role, parse_cid
from zsfl.learning.modes import Mode

EVEN = Case(sizes=(15, 15, 15), rounds=3, dropout=0.2)


def assert_rest_is_pending(records: list[Record], runs: Path) -> None:
    """No spill is left of a step that was settled: the others came too late for the last version."""
    settled = {cid for record in records for cid in (*record["counted"], *record["dropped"])}
    assert settled.isdisjoint(path.name.partition(".")[0] for path in spills_left(runs))


@pytest.mark.parametrize("steps", [1, 3])
async def test_elastic_is_exact_where_nobody_is_late(steps: int, tmp_path: Path) -> None:
    case = Case(optimizer="adam", dropout=0.2, batches="proportional", steps=steps)
    exact = await in_process(case, tmp_path, run="exact", servers=2)
    patient = replace(case, mode=zsfl.Elastic(quorum=1.0, grace=100.0))
    elastic = await in_process(patient, tmp_path, run="elastic", servers=2)
    assert_equal(elastic.weights, exact.weights)
    assert [(report.late, report.dropped) for report in elastic.reports] == [(0, 0)] * case.rounds


@pytest.mark.parametrize(("optimizer", "tail"), [("momentum", True), ("adam", False)])
@pytest.mark.parametrize(
    ("sizes", "batches"),
    [((15, 15, 15), "equal"), ((14, 15, 16), "proportional"), ((13, 7, 20, 10), "equal"), ((40, 1, 7), "proportional")],
)
async def test_async_without_staleness_is_exact(
    optimizer: str, tail: bool, sizes: tuple[int, ...], batches: str, tmp_path: Path
) -> None:
    case = replace(EVEN, optimizer=optimizer, tail=tail, sizes=sizes, batches=batches)
    exact = await in_process(case, tmp_path, run="exact")
    patient = replace(case, mode=zsfl.Async(samples=10**6, quota=1))  # a version is over when all have made their step
    ran = await in_process(patient, tmp_path, run="async")
    assert_close(ran.weights, exact.weights)
    assert [(report.late, report.samples) for report in ran.reports] == [(0, sum(sizes))] * case.rounds


@pytest.mark.parametrize("quota", [2, 8])
async def test_a_version_of_two_steps_of_each_has_both_made_without_a_pause(
    quota: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zsfl.client.role.PAUSE", 1e6)
    case = replace(EVEN, mode=zsfl.Async(samples=2 * EVEN.batch_size * EVEN.clients, quota=quota))
    ran = await in_process(case, tmp_path, servers=2)
    records = ledger(ran.folder)
    assert {staleness for _, staleness, *_ in counted(records)} == {0}
    for record in records:
        assert Counter(parse_cid(cid).shard for cid in record["counted"]) == {0: 2, 1: 2, 2: 2}


@pytest.mark.parametrize("mode", [zsfl.Async(), zsfl.Async(quota=1), zsfl.Elastic()])
@pytest.mark.parametrize(
    ("sizes", "batches"), [((40, 5, 5, 5, 5), "equal"), ((200, 1, 1), "proportional"), ((9,), "equal")]
)
async def test_shards_that_have_nothing_to_do_for_a_while_hold_up_nobody(
    mode: Mode, sizes: tuple[int, ...], batches: str, tmp_path: Path
) -> None:
    case = replace(EVEN, mode=mode, sizes=sizes, batches=batches)
    ran = await in_process(case, tmp_path, patience_s=HANG_S)
    assert len(ran.reports) == case.rounds
    assert shards(ledger(ran.folder)[0]) <= set(range(len(sizes)))


@pytest.mark.parametrize(
    "mode", [zsfl.Elastic(quorum=0.5, grace=0.0), zsfl.Async(samples=5), zsfl.Async(seconds=0.001)]
)
async def test_late_steps_count_by_their_staleness_and_the_ledger_says_so(mode: Mode, tmp_path: Path) -> None:
    ran = await in_process(replace(EVEN, mode=mode, rounds=6, optimizer="sgd"), tmp_path, servers=2)
    records = ledger(ran.folder)
    steps = list(counted(records))
    late = [staleness for _, staleness, _, _ in steps if staleness]
    assert late
    assert sum(report.late for report in ran.reports) == len(late)
    assert [damping for *_, damping in steps] == pytest.approx([1 / math.sqrt(1 + late) for _, late, _, _ in steps])
    corrected = {scale for _, _, scale, _ in steps} - {1.0}
    assert all(1 / 4 <= scale <= 4 for scale in corrected)
    assert not (corrected and isinstance(mode, zsfl.Elastic))
    assert_rest_is_pending(records, tmp_path)


async def test_late_steps_that_do_not_count_are_dropped_with_the_reason(tmp_path: Path) -> None:
    mode = zsfl.Elastic(quorum=0.5, grace=0.0, late="drop")
    ran = await in_process(replace(EVEN, mode=mode, rounds=12), tmp_path, servers=2)
    records = ledger(ran.folder)
    assert not any(staleness for _, staleness, _, _ in counted(records))
    dropped = {cid: reason for record in records for cid, reason in record["dropped"].items()}
    assert dropped
    assert sum(report.dropped for report in ran.reports) == len(dropped)
    said = {f"its {part} part never came" for part in ("body", "client")}
    assert all(reason in said or "late; at most 0 count" in reason for reason in dropped.values())
    assert_rest_is_pending(records, tmp_path)


@pytest.mark.parametrize("mode", ["elastic", "async"])
async def test_a_run_goes_on_after_a_resume(mode: str, tmp_path: Path) -> None:
    case = replace(EVEN, mode=mode, rounds=4)
    await in_process(case, tmp_path, run="mine", rounds=2)
    resumed = await in_process(case, tmp_path, run="mine", resume=True)
    assert [report.round for report in resumed.reports] == [3, 4]
    ledger(resumed.folder)


async def test_the_mode_can_be_chosen_beside_the_job(tmp_path: Path) -> None:
    ran = await in_process(EVEN, tmp_path, mode="async")
    assert "Async(" in (ran.folder / "settings.json").read_text()


@pytest.mark.parametrize(
    ("mode", "counts"),
    [
        ("zsfl.Elastic(quorum=0.5, max_staleness=10_000)", True),
        ("zsfl.Elastic(quorum=1.0, deadline_s=0.05, max_staleness=1)", False),
        ("zsfl.Async(max_staleness=10_000)", True),
        ("zsfl.Async(max_staleness=1)", False),
    ],
)
async def test_a_client_that_is_slow_holds_up_nobody(mode: str, counts: bool, tmp_path: Path) -> None:
    path, gate = gated_job(tmp_path, mode)
    folder, very_late = tmp_path / "gated", 5 * VERSIONS
    async with zsfl.LocalCluster(path, split_servers=1, runs=tmp_path, mdns=False) as cluster:
        rounds = Rounds(cluster)
        await rounds.until_with("client-0")
        gate.close()
        await gate.is_reached()
        begun = versions(folder)
        without = await rounds.until(lambda report: report.version > begun + very_late)
        # A round that had begun may still have its step from before.
        assert all("client-0" not in report.serving for report in without if report.version >= begun + 2 * VERSIONS)
        opened = versions(folder)
        gate.open()
        await rounds.until_with("client-0")
        await rounds.until_with("client-0")
    since = [(late, damping) for step, late, _, damping in counted(ledger(folder)) if step.version + late >= opened]
    stuck = [(late, damping) for late, damping in since if late >= very_late]
    assert len(stuck) == counts
    assert all(damping == pytest.approx((1 + late) ** -0.5) for late, damping in stuck)


@pytest.mark.parametrize("mode", ["exact", "elastic", "async"])
async def test_a_run_begins_with_those_who_are_enough_and_others_join(mode: str, tmp_path: Path) -> None:
    nodes = Nodes(replace(EVEN, mode=mode, rounds=10_000).job(), tmp_path)
    try:
        address = await nodes.start("aggregator", Role.AGGREGATOR, start_with=2)
        await nodes.start("server", Role.SPLIT_SERVER, peers=(address,))
        await nodes.start("one", Role.CLIENT, shards="0-1", peers=(address,))
        await eventually(lambda: len(nodes.rounds) >= 2)
        assert all(set(report.serving) == {"one"} for report in nodes.rounds)
        if mode != "elastic":  # in which a step that is late counts in the next round
            assert all(30 <= report.samples < 45 for report in nodes.rounds)
        await nodes.start("other", Role.CLIENT, shards="2", peers=(address,))
        await eventually(lambda: nodes.rounds[-1].samples >= 45 and "other" in nodes.rounds[-1].serving)
    finally:
        await nodes.close()
    records = ledger(tmp_path / "nodes")
    assert shards(records[0]) == {0, 1}
    first = next(parse_cid(cid) for record in records for cid in record["counted"] if parse_cid(cid).shard == 2)
    assert first.version >= 6  # of two rounds without it


@pytest.mark.parametrize("mode", ["exact", "elastic", "async"])
async def test_nothing_is_skipped_while_everybody_is_gone(mode: str, tmp_path: Path) -> None:
    job = replace(EVEN, mode=mode, rounds=10_000, sizes=(60, 60)).job()
    nodes = Nodes(job, tmp_path)
    try:
        address = await nodes.start("aggregator", Role.AGGREGATOR, patience_s=HANG_S)
        await nodes.start("server", Role.SPLIT_SERVER, peers=(address,))
        when_alone = list[int]()
        for attempt in range(3):
            names = [f"client-{shard}-{attempt}" for shard in range(2)]
            for shard, name in enumerate(names):
                await nodes.start(name, Role.CLIENT, shards=str(shard), peers=(address,))
            seen = len(nodes.rounds)
            assert seen <= sum(when_alone[-1:]) + (attempt > 0)  # the round that was under way, at most
            await eventually(lambda seen=seen: len(nodes.rounds) >= seen + 2)
            for name in names:
                nodes.tasks[name].cancel()
            await asyncio.gather(*(nodes.tasks[name] for name in names), return_exceptions=True)
            await eventually(lambda names=names: all(any(name in note for note in nodes.notes) for name in names))
            when_alone.append(len(nodes.rounds))
        assert not nodes.tasks["aggregator"].done()
        if mode == "exact":  # who says goodbye is not waited for, so a round in which somebody left has fewer
            assert sum(report.samples < 120 for report in nodes.rounds) <= len(when_alone)
    finally:
        await nodes.close()
    ledger(tmp_path / "nodes")


@pytest.mark.parametrize("mode", ["exact", "elastic", "async"])
async def test_the_one_with_most_of_the_data_may_leave_and_come_back(mode: str, tmp_path: Path) -> None:
    """Of a round's six windows only it has steps in five."""
    nodes = Nodes(replace(EVEN, mode=mode, rounds=10_000, sizes=(30, 5), batches="equal").job(), tmp_path)
    try:
        address = await nodes.start("aggregator", Role.AGGREGATOR, patience_s=HANG_S)
        await nodes.start("server", Role.SPLIT_SERVER, peers=(address,))
        await nodes.start("small", Role.CLIENT, shards="1", peers=(address,))
        for name in ("large", "large-again"):
            await nodes.start(name, Role.CLIENT, shards="0", peers=(address,))
            await eventually(lambda name=name: name in nodes.rounds[-1].serving if nodes.rounds else False)
            nodes.tasks[name].cancel()
            await eventually(lambda: set(nodes.rounds[-1].serving) == {"small"})
        assert not nodes.tasks["aggregator"].done()
    finally:
        await nodes.close()
    ledger(tmp_path / "nodes")


async def test_a_run_that_everybody_left_fails_when_its_patience_ends(tmp_path: Path) -> None:
    nodes = Nodes(replace(EVEN, mode="async", rounds=10_000).job(), tmp_path)
    try:
        address = await nodes.start("aggregator", Role.AGGREGATOR, patience_s=3.0)
        await nodes.start("server", Role.SPLIT_SERVER, peers=(address,))
        await nodes.start("client", Role.CLIENT, shards="0-2", peers=(address,))
        await eventually(lambda: len(nodes.rounds) >= 1)
        nodes.tasks["client"].cancel()
        with pytest.raises(zsfl.RunFailed, match=r"stood still|there was no client"):
            await until(nodes.tasks["aggregator"])
    finally:
        await nodes.close()


async def test_who_leaves_with_a_goodbye_is_not_waited_for(tmp_path: Path) -> None:
    case = replace(EVEN, mode=zsfl.Exact(return_s=1000.0), batches="proportional")
    async with zsfl.LocalCluster(case.job(), in_process=True, runs=tmp_path, patience_s=HANG_S) as cluster:
        assert [report.samples async for report in cluster.train(1)] == [45]
        await cluster.stop("client-1")
        assert [report.samples async for report in cluster.train(2)] == [30, 30]
        await cluster.start_client("1")
        reports = [report async for report in cluster.train(1)]
        while reports[-1].samples < 45:
            reports = [report async for report in cluster.train(1)]
        assert set(reports[0].serving) == {"client-0", "client-1", "client-2"}
