"""A run that is taken up again ends as one that was never left, and its ledger says how it came about."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exact import Case, Ran, assert_equal, in_process, in_processes, spills_left
from helpers.nodes import Nodes
from helpers.waiting import HANG_S
from helpers.wires import Wires
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

import zsfl
from zsfl.aggregator import trials
from zsfl.aggregator.audit import audit, replay_versions
from zsfl.aggregator.audit_store import look_in_store
from zsfl.aggregator.commit import Ledger, Record
from zsfl.aggregator.progress import Place, Progress
from zsfl.aggregator.stage import Stage
from zsfl.errors import ConfigError, RemoteProtocolError, RunFailed, ZsflError
from zsfl.ids import Cid, Role, Version
from zsfl.reports import AnyReport, Before, RoundReport
from zsfl.settings import WireLimits
from zsfl.spill.layout import SpillMeta
from zsfl.spill.store import SpillStore
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import Reply, Request

CASE = Case(optimizer="adam", dropout=0.2, norm=True, sizes=(13, 7, 20, 4), rounds=4)
WINDOWS = 4
"""The largest shard has so many batches."""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def assert_sound(ran: Ran, rounds: int) -> None:
    """One commit a version, each naming the one before, and every step that was due counted in exactly one."""
    raw = (ran.folder / "ledger.jsonl").read_bytes().splitlines()
    records = [json.loads(line) for line in raw]
    assert [record["version"] for record in records] == list(range(1, rounds * WINDOWS + 1))
    assert [record["predecessor"] for record in records] == [
        "",
        *(hashlib.sha256(line).hexdigest() for line in raw[:-1]),
    ]
    # Without the run's id, which is another one where versions were lost.
    counted = [cid.partition("-")[2] for record in records for cid in record["counted"]]
    due = [
        f"v{round_ * WINDOWS + window:08d}-s{shard:05d}-k000"
        for round_ in range(rounds)
        for window in range(WINDOWS)
        for shard, size in enumerate(CASE.sizes)
        if window * CASE.batch_size < size
    ]
    assert counted == due
    assert all(record["dropped"] == {} for record in records)
    assert sum(record["samples"] for record in records) == rounds * sum(CASE.sizes)
    metrics = [line for line in lines(ran.folder / "metrics.jsonl") if line["event"] == "round"]
    # A round that was made again is reported again.
    assert sorted({line["round"] for line in metrics}) == list(range(1, rounds + 1))
    assert metrics[-1]["version"] == rounds * WINDOWS
    served = {line["round"]: sum(sum(of.values()) for of in line["serving"].values()) for line in metrics}
    assert sum(served.values()) == len(counted), "who took how many steps adds up to what the ledger counts"


async def test_two_rounds_and_two_more_are_four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "TOLD_AT_ONCE", len(CASE.sizes))
    straight = await in_process(CASE, tmp_path, run="straight", servers=2)
    begun = await in_process(CASE, tmp_path, run="halves", rounds=2)
    assert_sound(begun, 2)
    told: list[AnyReport] = []
    finished = await in_process(CASE, tmp_path, run="halves", resume=True, servers=3, on_report=told.append)
    assert finished.folder == begun.folder
    before = [one for report in told if isinstance(report, Before) for one in report.reports]
    assert [one.round for one in before if isinstance(one, RoundReport)] == [1, 2]
    assert sum(isinstance(report, Before) for report in told) == len(before), "no line is too long"
    assert [report.round for report in finished.reports] == [3, 4]
    assert_equal(finished.weights, straight.weights)
    for ran in (straight, finished):
        assert_sound(ran, 4)
    weights = [[record["weights"] for record in lines(ran.folder / "ledger.jsonl")] for ran in (straight, finished)]
    assert weights[0] == weights[1]
    assert spills_left(tmp_path) == []


async def test_resuming_across_processes(tmp_path: Path) -> None:
    straight = await in_process(CASE, tmp_path, run="straight")
    await in_process(CASE, tmp_path, run="halves", rounds=2)
    finished = await in_processes(CASE, tmp_path, run="halves", resume=True, servers=2, client_processes=2)
    assert_equal(finished.weights, straight.weights)
    assert_sound(finished, 4)
    assert spills_left(tmp_path) == []


async def test_rounds_after_the_last_checkpoint_are_made_again(tmp_path: Path) -> None:
    straight = await in_process(CASE, tmp_path, run="straight")
    await in_process(CASE, tmp_path, run="cut", rounds=2)
    # As a crash in the fourth round leaves it: ledger and metrics are ahead of the checkpoint.
    checkpoint, aside = tmp_path / "cut" / "checkpoint", tmp_path / "aside"
    shutil.copytree(checkpoint, aside)
    await in_process(CASE, tmp_path, run="cut", resume=True, rounds=1)
    shutil.rmtree(checkpoint)
    aside.rename(checkpoint)
    with (tmp_path / "cut" / "metrics.jsonl").open("ab") as metrics:
        metrics.write(b'{"event": "round", "round')
    finished = await in_process(CASE, tmp_path, run="cut", resume=True)
    assert_equal(finished.weights, straight.weights)
    assert_sound(finished, 4)


async def test_more_orders_continue_the_same_run(tmp_path: Path) -> None:
    straight = await in_process(CASE, tmp_path, run="straight")
    async with zsfl.LocalCluster(CASE.job(), in_process=True, runs=tmp_path, run="orders") as cluster:
        rounds = [report.round for order in (1, 2, None) async for report in cluster.train(order)]
    assert rounds == [1, 2, 3, 4]
    assert cluster.result is not None
    ran = Ran(Path(cluster.result.folder), [])
    assert_equal(ran.weights, straight.weights)
    assert_sound(ran, 4)


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({}, "asked"),
        ({"mode": zsfl.Elastic(quorum=1.0, grace=100.0)}, "kept"),
        ({"batches": zsfl.by_speed(5, 5)}, "kept"),
    ],
    ids=["exact", "elastic", "by speed"],
)
async def test_a_round_is_kept_before_steps_of_the_next_one_count_and_after_they_were_asked_for_unless_that_takes_time(
    change: dict[str, Any], first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[tuple[str, int]] = []
    enter, save, commit = Stage.enter, Progress.save, Ledger.commit

    def entered(stage: Stage, **changes: Any) -> None:
        enter(stage, **changes)
        if changes.get("phase") in ("training", "idle"):
            happened.append(("asked", stage.state.version))

    def saved(progress: Progress, place: Place) -> None:
        save(progress, place)
        happened.append(("kept", place.version))

    def committed(ledger: Ledger, record: Record) -> None:
        happened.append(("counted", record.version - 1))
        commit(ledger, record)

    monkeypatch.setattr(Stage, "enter", entered)
    monkeypatch.setattr(Progress, "save", saved)
    monkeypatch.setattr(Ledger, "commit", committed)
    await in_process(replace(CASE, **change), tmp_path)
    begun, *kept = [version for what, version in happened if what == "kept"]
    assert (begun, len(kept)) == (0, CASE.rounds)
    for version in kept[:-1]:
        order = [what for what, of in happened if of == version]
        assert order == [first, "kept" if first == "asked" else "asked", "counted"]
    assert [what for what, of in happened if of == kept[-1]] == ["asked", "kept"]


async def test_other_data_cannot_resume_a_run(tmp_path: Path) -> None:
    await in_process(CASE, tmp_path, run="mine", rounds=1)
    other = Case(optimizer="adam", dropout=0.2, norm=True, sizes=(13, 7, 20, 8), rounds=4)
    with pytest.raises(ZsflError, match="other sizes than when the run began"):
        await in_process(other, tmp_path, run="mine", resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 4}, "batch_size was 5 and is 4"),
        ({"seed": 3, "shuffle": False}, "seed was 11 and is 3; shuffle was True and is False"),
    ],
)
async def test_another_job_cannot_resume_a_run(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    await in_process(CASE, tmp_path, run="mine", rounds=1)
    with pytest.raises(ConfigError, match=message):
        await in_process(replace(CASE, **change), tmp_path, run="mine", resume=True)


async def test_a_ledger_of_another_run_is_refused(tmp_path: Path) -> None:
    for run, seed in (("mine", 11), ("other", 12)):
        await in_process(replace(CASE, seed=seed), tmp_path, run=run, rounds=1)
    shutil.copy(tmp_path / "other" / "ledger.jsonl", tmp_path / "mine" / "ledger.jsonl")
    with pytest.raises(ZsflError, match="no record of the checkpoint"):
        await in_process(CASE, tmp_path, run="mine", resume=True)


async def test_a_new_aggregator_takes_a_run_over_from_its_checkpoint(tmp_path: Path) -> None:
    straight = await in_process(CASE, tmp_path, run="straight")
    nodes = Nodes(CASE.job(), tmp_path)
    try:
        nodes.lost_after_round = 2
        address = await nodes.start("first", Role.AGGREGATOR)
        await nodes.start("server", Role.SPLIT_SERVER, peers=(address,))
        client = await nodes.start("clients", Role.CLIENT, shards="0-3", peers=(address,))
        await asyncio.wait([nodes.tasks["first"]], timeout=HANG_S)
        assert nodes.tasks["first"].cancelled()
        # Clients and server are in the middle of the third round, and stay.
        nodes.lost_after_round = None
        await nodes.start("second", Role.AGGREGATOR, resume=True, peers=(client,))
        async with asyncio.timeout(HANG_S):
            await asyncio.gather(*(nodes.tasks[name] for name in ("second", "server", "clients")))
    finally:
        await nodes.close()
    ran = Ran(tmp_path / "nodes", [])
    assert_equal(ran.weights, straight.weights)
    assert_sound(ran, 4)
    assert spills_left(tmp_path) == []


async def _play(nodes: Nodes, **flags: Any) -> None:
    """One aggregator, one server and one client for all shards, until the run ends."""
    address = await nodes.start("aggregator", Role.AGGREGATOR, **flags)
    await nodes.start("server", Role.SPLIT_SERVER, peers=(address,))
    await nodes.start("clients", Role.CLIENT, shards="0-3", peers=(address,))
    async with asyncio.timeout(HANG_S):
        await asyncio.gather(*nodes.tasks.values())


def _poison(runs: Path, run: str) -> None:
    """Leave spills of the first step after round 1, as a crash does, but with other numbers in them."""
    names = CASE.model().named_parameters()
    grads = {name: torch.full_like(parameter, 7.0) for name, parameter in names}
    cid = Cid(f"{run}-v{WINDOWS:08d}-s00000-k000")
    for part, node in (("body", "server"), ("client", "clients")):
        tensors = {f"grad/{name}": grad for name, grad in grads.items() if name.startswith("body.") == (part == "body")}
        meta = SpillMeta(
            cid=cid,
            part=part,  # pyright: ignore[reportArgumentType]
            version=Version(WINDOWS),
            n=5.0,
            samples=5,
            loss_sum=1.0 if part == "client" else None,
            client="clients",
            node=node,
        )
        SpillStore(runs / "spills" / "nodes" / node).put(meta, tensors)


async def test_spills_of_before_are_not_counted_where_versions_were_lost(tmp_path: Path) -> None:
    straight = await in_process(CASE, tmp_path, run="straight")
    nodes = Nodes(CASE.job(), tmp_path)
    try:
        await _play(nodes, rounds=2)
        # Of the second round there is no more than its records: what was counted is gone from the disk.
        shutil.rmtree(tmp_path / "nodes" / "checkpoint" / "round-000002")
        shutil.rmtree(tmp_path / "nodes" / "journal")
        _poison(tmp_path, lines(tmp_path / "nodes" / "ledger.jsonl")[0]["counted"][0].split("-")[0])
        await _play(nodes, resume=True)
        assert any(re.search(r"going on from version 4, .* is not kept any more", note) for note in nodes.notes)
    finally:
        await nodes.close()
    ran = Ran(tmp_path / "nodes", [])
    assert_equal(ran.weights, straight.weights)
    assert_sound(ran, 4)
    assert spills_left(tmp_path) == []
    assert sum(note.startswith("deleted 1 spill of another run") for note in nodes.notes) == 2


def _no_held_out(shard: int, _: int) -> tuple[TensorDataset, TensorDataset]:
    """Held-out samples that no weights give a finite loss for."""
    x, y = CASE.samples(shard)
    return TensorDataset(x[:5], y[:5]), TensorDataset(x * torch.nan, y)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"optimizer": zsfl.sgd(lr=1e308, weight_decay=1e10)}, r"made \S+ not finite.* \(version 1 is kept"),
        ({"data": _no_held_out}, r"the held-out loss became nan after round 2.* \(version 1 is kept"),
    ],
    ids=["step", "held-out"],
)
async def test_diverging_in_the_last_window_of_a_round_spoils_nothing(
    bad: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """One window a round, so that no later window shows what is wrong with the weights."""
    good = replace(replace(CASE, sizes=(5, 5), norm=False, dropout=0.0).job(), optimizer=zsfl.sgd(lr=0.1))

    async def train(job: zsfl.Job, rounds: int, resume: bool = True) -> None:
        async with zsfl.LocalCluster(job, in_process=True, runs=tmp_path, run="mine", resume=resume) as cluster:
            _ = [report async for report in cluster.train(rounds)]

    await train(good, 1, resume=False)
    kept = load_file(tmp_path / "mine" / "model.safetensors")
    with pytest.raises(RunFailed, match=message):
        await train(replace(good, **bad), 3)  # the next round's steps may come while the last one's weights are tested
    assert_equal(load_file(tmp_path / "mine" / "model.safetensors"), kept)
    assert audit(tmp_path / "mine").faults == []
    await train(replace(good, optimizer=zsfl.sgd(lr=0.05)), 1)
    weights = load_file(tmp_path / "mine" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    metrics = [line["round"] for line in lines(tmp_path / "mine" / "metrics.jsonl") if line["event"] == "round"]
    assert metrics == [1, 2]


@pytest.mark.parametrize(
    ("norm", "lr", "message"),
    [
        (False, 1e308, r"the loss became \S+e\+307 at round 1, window 2 of 4 \(version 1\).* \(version 0 is kept"),
        (True, 1e160, r"is not finite in body\.1.* \(version 0 is kept"),
    ],
    ids=["loss", "statistics"],
)
async def test_a_run_that_diverges_keeps_the_last_good_version(
    norm: bool, lr: float, message: str, tmp_path: Path
) -> None:
    job = replace(replace(CASE, norm=norm).job(), optimizer=zsfl.sgd(lr=lr))
    with pytest.raises(RunFailed, match=message):
        async with zsfl.LocalCluster(job, in_process=True, runs=tmp_path) as cluster:
            _ = [report async for report in cluster.train()]
    kept = load_file(tmp_path / "exact" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


async def test_an_address_that_another_program_took_over_is_no_matter(tmp_path: Path) -> None:
    """As where a node is started with the address of one that has just ended."""

    async def strange(request: Request, _: Sequence[Buffer]) -> tuple[Reply, Sequence[Buffer]]:
        raise RemoteProtocolError(f"an aggregator does not answer {type(request).__name__} here")

    wires, nodes = Wires(WireLimits()), Nodes(CASE.job(), tmp_path)
    try:
        taken = f"127.0.0.1:{wires.serve(strange).port}"
        address = await nodes.start("aggregator", Role.AGGREGATOR, rounds=1, peers=(taken,))
        await nodes.start("server", Role.SPLIT_SERVER, peers=(taken, address))
        await nodes.start("clients", Role.CLIENT, shards="0-3", peers=(taken, address))
        async with asyncio.timeout(HANG_S):
            await asyncio.gather(*nodes.tasks.values())
    finally:
        await nodes.close()
        await wires.close()
    assert sum(f"{taken} refused: " in note and "does not answer Hello here" in note for note in nodes.notes) == 3


async def test_another_learning_rate_loses_no_commit(tmp_path: Path) -> None:
    """What was committed is made again at the rate of then, and the new one counts from there on."""

    def job(lr: float) -> zsfl.Job:
        return replace(CASE.job(), optimizer=zsfl.adam(lr=lr))

    async def train(lr: float, rounds: int | None, **flags: Any) -> None:
        async with zsfl.LocalCluster(job(lr), in_process=True, runs=tmp_path, run="mine", **flags) as cluster:
            _ = [report async for report in cluster.train(rounds)]

    await train(0.02, 2)
    ledger, folder = tmp_path / "mine" / "ledger.jsonl", tmp_path / "mine"
    left = ledger.read_bytes()
    shutil.rmtree(folder / "checkpoint" / "round-000002")  # as a crash in the second round leaves it
    (folder / "checkpoint" / "round-000001.bak").mkdir()  # and what somebody put beside them
    with (folder / "metrics.jsonl").open("ab") as metrics:
        metrics.write(b"\xff no JSON\n")
    await train(0.005, None, resume=True)
    assert ledger.read_bytes().startswith(left)
    assert list(replay_versions(folder, job(0.02), 1, 2 * WINDOWS)) == list(range(1, 2 * WINDOWS + 1))
    assert list(replay_versions(folder, job(0.005), 2 * WINDOWS + 1, 4 * WINDOWS))[-1] == 4 * WINDOWS


@pytest.mark.parametrize("rounds", [0, -1, 2**70])
async def test_no_such_number_of_rounds_is_trained(rounds: int, tmp_path: Path) -> None:
    async with zsfl.LocalCluster(CASE.job(), in_process=True, runs=tmp_path) as cluster:
        with pytest.raises(ConfigError, match="use a number from 1 to"):
            _ = [report async for report in cluster.train(rounds)]


async def test_a_run_that_a_store_has_goes_on_without_its_folder(tmp_path: Path) -> None:
    kept: dict[str, Any] = {"spill": str(tmp_path / "store"), "durability": "store"}
    first, second = tmp_path / "first", tmp_path / "second"
    before = await in_process(CASE, first, rounds=1, **kept)
    with pytest.raises(ZsflError, match=r"a run exact is in .*store already: go on with it by --resume"):
        await in_process(CASE, second, rounds=1, **kept)
    shutil.rmtree(first)
    ran = await in_process(CASE, second, rounds=1, resume=True, **kept)
    assert [report.round for report in (*before.reports, *ran.reports)] == [1, 2]
    assert_equal(ran.weights, (await in_process(CASE, tmp_path / "straight", rounds=2)).weights)
    assert_sound(ran, 2)
    assert audit(ran.folder).faults == []
    there = await asyncio.to_thread(look_in_store, ran.folder)
    assert there is not None
    assert there.said.endswith("spills of 0 steps; the run, up to version 8")
