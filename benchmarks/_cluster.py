"""A cluster of processes under load: steps a second, and what each role's processes use meanwhile."""

from __future__ import annotations

import asyncio
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from _jobs import wrapped
from _profile import Stacks, sample

import zsfl

READY_S, ROUND_S = 60.0, 120.0
"""No cluster takes longer to start, and no benchmark trains longer in one go: every load ends by itself."""


@dataclass(slots=True)
class Usage:
    """What the processes of one role used."""

    processes: int = 0
    cpu_s: float = 0.0
    zmq_s: float = 0.0
    """Of `cpu_s`, that of ZeroMQ's own I/O threads."""
    pss_bytes: int = 0
    """Memory at the end, pages that several processes share divided among them."""

    def since(self, before: Usage) -> Usage:
        """What was added; processes and memory as they are now."""
        return Usage(self.processes, self.cpu_s - before.cpu_s, self.zmq_s - before.zmq_s, self.pss_bytes)


@dataclass(slots=True, kw_only=True)
class Load:
    """Some rounds under load."""

    steps: int
    """Counted by committed versions."""
    seconds: float
    """Wall time, from the order to train to the report of the last round."""
    bytes_sent: dict[str, float]
    """By role; each byte counted once, by its sender."""
    usage: dict[str, Usage]
    """By role."""
    ready_s: float
    """From nothing to all nodes ready."""
    stacks: dict[str, Stacks] = field(default_factory=dict[str, Stacks])
    """By role, where its threads were whenever they were looked at."""

    @property
    def steps_per_s(self) -> float:
        return self.steps / self.seconds

    def cpu_us(self, role: str) -> float:
        """CPU time of a role's processes, microseconds a step."""
        return 1e6 * self.usage[role].cpu_s / self.steps


def usage(cluster: zsfl.LocalCluster, *, memory: bool = False) -> dict[str, Usage]:
    """What each role's processes have used so far; `memory` takes some milliseconds for each."""
    roles: defaultdict[str, Usage] = defaultdict(Usage)
    for node in cluster.nodes.values():
        if node.pid is None or node.exit_code is not None:
            continue
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(node.pid)
            role = roles[str(node.role)]
            role.processes += 1
            role.cpu_s += sum(process.cpu_times()[:2])
            role.zmq_s += _zmq_s(process)
            role.pss_bytes += process.memory_full_info().pss if memory else 0
    return dict(roles)


def _zmq_s(process: psutil.Process) -> float:
    """CPU seconds of the threads that ZeroMQ has named as its own; 0 where the system does not tell names."""
    seconds = 0.0
    for thread in process.threads():
        with suppress(OSError):
            name = Path(f"/proc/{process.pid}/task/{thread.id}/comm").read_text()
            if name.startswith("ZMQbg"):
                seconds += thread.user_time + thread.system_time
    return seconds


def sent_by_role(cluster: zsfl.LocalCluster, reports: list[zsfl.RoundReport]) -> dict[str, float]:
    """Bytes that nodes handed to their sockets in these rounds."""
    sums: defaultdict[str, float] = defaultdict(float)
    for report in reports:
        for name, counters in report.peers.items():
            node = cluster.nodes.get(name)
            sums[str(node.role) if node else "other"] += counters.get("bytes_sent", 0.0)
    return dict(sums)


async def load(
    job: Path,
    changes: Mapping[str, Any],
    *,
    seconds: float,
    profile_s: float = 0.0,
    **options: Any,
) -> Load:
    """Train for about so long after a round of warming up; `options` are those of `zsfl.LocalCluster`.

    With `profile_s` every process is looked at for so long, which slows it down.
    """
    with tempfile.TemporaryDirectory(prefix="zsfl-bench-") as runs:
        begun_s = time.perf_counter()
        async with zsfl.LocalCluster(wrapped(job, Path(runs), changes), runs=runs, **options) as cluster:
            ready_s = time.perf_counter() - begun_s
            (warm,) = [report async for report in cluster.train(1)]
            rounds = max(1, math.ceil(seconds * warm.steps_per_s / warm.steps))
            looking = sample(_pids(cluster), profile_s) if profile_s else None
            before, begun_s = usage(cluster), time.perf_counter()
            reports, after, ended_s = list[zsfl.RoundReport](), before, begun_s
            async for report in cluster.train(rounds):
                reports.append(report)
                if len(reports) == rounds:  # what ends a run, such as its plot, is no part of the load
                    ended_s, after = time.perf_counter(), usage(cluster)
            stacks = await looking.stacks() if looking else {}
            memory = usage(cluster, memory=True)
            for role, one in after.items():
                one.pss_bytes = memory[role].pss_bytes
            return Load(
                steps=sum(report.steps for report in reports),
                seconds=ended_s - begun_s,
                bytes_sent=sent_by_role(cluster, reports),
                usage={role: one.since(before[role]) for role, one in after.items()},
                ready_s=ready_s,
                stacks=stacks,
            )


def _pids(cluster: zsfl.LocalCluster) -> dict[str, list[int]]:
    roles: defaultdict[str, list[int]] = defaultdict(list)
    for node in cluster.nodes.values():
        if node.pid is not None and node.exit_code is None:
            roles[str(node.role)].append(node.pid)
    return dict(roles)


async def train_on(cluster: zsfl.LocalCluster, heard: Callable[[zsfl.RoundReport], None] | None = None) -> None:
    """Train until cancelled."""
    async for report in cluster.train(100_000):
        if heard is not None:
            heard(report)


async def end(training: asyncio.Task[None]) -> None:
    """Cancel it; what it failed with before is raised."""
    training.cancel()
    with suppress(asyncio.CancelledError):
        await training
