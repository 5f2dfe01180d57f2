"""Clusters with aggregators that stand by, and what is said in them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers.exact import Case
from helpers.ledger import Record, ledger

import zsfl
from zsfl.aggregator.audit import audit
from zsfl.reports import AnyReport, Note, RoundReport, Waiting

CASE = Case(optimizer="adam", dropout=0.2, sizes=(13, 7, 20, 18))
LEASE_S = 1.0
READY = "another aggregator stands by, and may take over"


class Seen:
    """What a cluster reported, and events for some of it."""

    def __init__(self) -> None:
        self.reports: list[AnyReport] = []
        self._awaited: list[tuple[Callable[[AnyReport], bool], asyncio.Event]] = []

    def __call__(self, report: AnyReport) -> None:
        self.reports.append(report)
        for fits, event in self._awaited:
            if fits(report):
                event.set()

    def notes(self, text: str) -> list[AnyReport]:
        """Those that say so."""
        return [report for report in self.reports if says(text)(report)]

    async def wait_for(self, fits: Callable[[AnyReport], bool]) -> AnyReport:
        """The first report that fits, also of those that came already."""
        event = asyncio.Event()
        self._awaited.append((fits, event))
        if not any(map(fits, self.reports)):
            await event.wait()
        return next(filter(fits, self.reports))


def says(text: str, node: str = "") -> Callable[[AnyReport], bool]:
    """Whether a report says so, of that node where one is named."""

    def fits(report: AnyReport) -> bool:
        said = report.message if isinstance(report, Note) else report.what if isinstance(report, Waiting) else ""
        return text in said and node in ("", report.node)

    return fits


def cluster(runs: Path, seen: Seen, case: Case = CASE, **flags: Any) -> zsfl.LocalCluster:
    """One that stands by, and a job without end."""
    settings = {
        "run": "mine",
        "split_servers": 2,
        "standbys": 1,
        "mdns": False,
        "beat_s": 0.2,
        "lost_after_s": LEASE_S,
    } | flags
    return zsfl.LocalCluster(replace(case, rounds=10_000).job_file(runs), runs=runs, on_report=seen, **settings)


async def trained(nodes: zsfl.LocalCluster, rounds: int) -> int:
    """Train so many rounds; how many were reported."""
    return len([report async for report in nodes.train(rounds)])


def folder_of(nodes: zsfl.LocalCluster) -> Path:
    """Of whoever led last."""
    assert nodes.result is not None
    return Path(nodes.result.folder)


def led_by(*names: str) -> Callable[[RoundReport], bool]:
    """Whether a round was ended by one of these."""
    return lambda report: report.node in names


def assert_one_history(first: list[Record], second: list[Record]) -> None:
    """The second goes on where the first one's records that somebody had end, in a later epoch."""
    shared = [record for record in second if record["epoch"] <= first[-1]["epoch"]]
    assert shared == first[: len(shared)]
    epochs = [record["epoch"] for record in second]
    assert epochs == sorted(epochs)
    assert len(shared) < len(second)


async def assert_undisturbed(folder: Path, runs: Path, case: Case = CASE) -> None:
    """Every version has the weights, bit for bit, of a run in which nothing happens."""
    records, job = ledger(folder), replace(case, rounds=10_000).job()
    async with zsfl.LocalCluster(job, in_process=True, split_servers=1, runs=runs, run="straight") as straight:
        async for report in straight.train():
            if report.version >= len(records):
                break
    straight_records = ledger(runs / "straight")
    for record, other in zip(records, straight_records, strict=False):
        assert record["weights"] == other["weights"], (record, other)
    assert len(records) <= len(straight_records)
    epochs = [record["epoch"] for record in records]
    assert epochs == sorted(epochs)
    assert audit(folder).faults == []
