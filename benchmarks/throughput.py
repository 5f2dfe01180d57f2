"""Steps a second on MicroSFL's workload, beside HTTP with JSON and beside the step alone; time to 90 % accuracy.

    ZSFL_DATA=... python benchmarks/throughput.py

Wants MNIST's four IDX files in the folder that ZSFL_DATA names, or in `mnist` below it, and `pip install '.[bench]'`
for the baseline. Eight minutes. METHODOLOGY.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _cluster import Load, load
from _figures import Figure, add_json_flag, hand_over
from _jobs import JOBS, wrapped
from _peer import HttpPeer, PeerLoad, http_peer, missing, step_alone
from _profile import costs, shares
from _record import circumstances, in_short, table, write

import zsfl

BUDGET_S = 130
IN_THE_LOT = ("--repeat", "1", "--steps", "16", "--profile-seconds", "0")

CLIENTS = 20
BATCH = 64
TARGET = 3150
"""Steps a second: 50 times those of MicroSFL."""
MICROSFL_STEPS_PER_S, MICROSFL_MINUTES = 63, 41
"""As its paper says: minutes to 80 % with 20 clients."""
MOST_BYTES = 66e3
ACCURACY = 0.9
EVALUATE_EVERY = 10
"""Versions between two tests on the way to that accuracy."""
MOST_ROUNDS = 20
PEER = {"windows": 1, "steps": 5}
"""One load of the baseline: 100 steps, and like MicroSFL it synchronises once."""
ROLES = ("client", "split-server", "aggregator")
WAYS = (("process each", CLIENTS), ("one process", 1))


@dataclass(slots=True, kw_only=True)
class Arm:
    """One way to run the workload."""

    name: str
    steps: int
    """Of each client at one version."""
    client_processes: int
    batches: int = 1
    """Mini-batches that a client takes through as one step: the same samples at each version, the same sums."""
    loads: list[Load] = field(default_factory=list[Load])
    profile: Load | None = None

    async def run(self, split_servers: int, seconds: float, profile_s: float = 0.0) -> Load:
        """One cluster of its own, started, warmed up, measured, ended; as steps count mini-batches."""
        taken = await load(
            JOBS / "microsfl_untested.py",
            {"steps": self.steps, "batch_size": self.batches * BATCH},
            seconds=max(seconds, profile_s),
            profile_s=profile_s,
            clients=CLIENTS,
            split_servers=split_servers,
            client_processes=self.client_processes,
        )
        return replace(taken, steps=taken.steps * self.batches)


def arithmetic_us(repeat: int = 300) -> float:
    """CPU time of a step's arithmetic in one plain PyTorch loop, microseconds: what no system can do without."""
    job = zsfl.load_job(JOBS / "microsfl.py")
    model, x, y = job.build(), torch.randn(BATCH, 784), torch.randint(10, (BATCH,))
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert model.tail is not None
    taken: list[float] = []
    for _ in range(5):
        begun_s = time.process_time()
        for _ in range(repeat):
            torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), weights)
        taken.append(1e6 * (time.process_time() - begun_s) / repeat)
    return statistics.median(taken)


async def until_accurate(seed: int, client_processes: int) -> tuple[float | None, float]:
    """Seconds of wall time to the accuracy wanted, from the order to train, None if it is not reached; and to start."""
    reached_s: list[float] = []
    begun_s = time.perf_counter()

    def hear(report: Any) -> None:
        if isinstance(report, zsfl.Tested) and (report.accuracy or 0.0) >= ACCURACY:
            reached_s.append(time.perf_counter() - begun_s)

    with tempfile.TemporaryDirectory(prefix="zsfl-bench-") as runs:
        job = wrapped(JOBS / "microsfl.py", Path(runs), {"seed": seed, "evaluate_every": EVALUATE_EVERY})
        cluster = zsfl.LocalCluster(
            job, clients=CLIENTS, split_servers=2, client_processes=client_processes, runs=runs, on_report=hear
        )
        async with cluster:
            ready_s, begun_s = time.perf_counter() - begun_s, time.perf_counter()
            for _ in range(MOST_ROUNDS):
                async for _ in cluster.train(1):
                    pass
                if reached_s:
                    return reached_s[0], ready_s
    return None, ready_s


@dataclass(slots=True, kw_only=True)
class Found:
    """Everything that one run of this benchmark found."""

    arms: list[Arm]
    peer: list[PeerLoad] = field(default_factory=list[PeerLoad])
    alone: dict[int, list[PeerLoad]] = field(default_factory=dict[int, list[PeerLoad]])
    """By the number of client processes."""
    accurate: list[tuple[float | None, float]] = field(default_factory=list[tuple[float | None, float]])
    arithmetic_us: float = 0.0

    def baselines(self) -> Iterator[tuple[str, list[PeerLoad]]]:
        """Names and loads of what was measured beside zsfl."""
        if self.peer:
            yield "HTTP and JSON", self.peer
        for label, processes in WAYS:
            if processes in self.alone:
                yield f"the step alone, {label}", self.alone[processes]


def _arms(steps: Sequence[int], at_once: int) -> list[Arm]:
    arms = [
        Arm(name=f"{label}, {count} a version", steps=count, client_processes=processes)
        for count in steps
        for label, processes in WAYS
    ]
    if at_once > 1:
        arms += [
            Arm(name=f"{label}, {at_once} at once", steps=1, client_processes=processes, batches=at_once)
            for label, processes in WAYS
        ]
    return arms


async def measure(args: argparse.Namespace) -> Found:
    """All arms in turn, so many times; then a look at where time goes."""
    found = Found(arms=_arms(args.steps, args.at_once), arithmetic_us=arithmetic_us())
    if args.peer and (lacking := missing()):
        raise zsfl.ConfigError(f"the baseline needs {', '.join(lacking)}: pip install '.[bench]', or use --no-peer")
    if args.peer:
        async with http_peer(clients=CLIENTS, processes=CLIENTS) as peer:
            await peer.load(windows=1, steps=1)
            await _turns(found, args, peer)
    else:
        await _turns(found, args, None)
    if args.profile_seconds:
        for arm in found.arms[-2:]:
            print(f"profile: {arm.name}", flush=True)
            arm.profile = await arm.run(args.split_servers, args.seconds, args.profile_seconds)
    return found


async def _turns(found: Found, args: argparse.Namespace, peer: HttpPeer | None) -> None:
    for turn in range(args.repeat):
        for arm in found.arms[:: 1 if turn % 2 else -1]:  # who begins changes
            arm.loads.append(await arm.run(args.split_servers, args.seconds))
            print(f"{turn + 1}/{args.repeat} {arm.name}: {arm.loads[-1].steps_per_s:,.0f} steps/s", flush=True)
        if peer is not None:
            found.peer.append(await peer.load(**PEER))
            print(f"{turn + 1}/{args.repeat} HTTP and JSON: {found.peer[-1].steps_per_s:,.0f} steps/s", flush=True)
            for label, processes in WAYS:
                load = await step_alone(
                    clients=CLIENTS, processes=processes, split_servers=args.split_servers, seconds=args.seconds
                )
                found.alone.setdefault(processes, []).append(load)
                said = f"the step alone, {label}: {load.steps_per_s:,.0f} steps/s"
                print(f"{turn + 1}/{args.repeat} {said}", flush=True)
        if args.accuracy:
            found.accurate.append(await until_accurate(turn, CLIENTS))


# --- the page -------------------------------------------------------------------------------------------------


def page(found: Found, args: argparse.Namespace) -> str:
    """All tables."""
    parts = [
        f"{CLIENTS} clients, {args.split_servers} split servers, 1 aggregator, exact mode, raw codec, spills written "
        f"and every guarantee on; {args.repeat} repetitions in turn: median (lowest to highest). Target: {TARGET:,} "
        f"steps/s, 50 times MicroSFL's {MICROSFL_STEPS_PER_S}.",
        _speeds(found),
        "CPU time of all processes of a role, microseconds a step (ZeroMQ's I/O threads included), and memory of one "
        "process, MB (PSS). The arithmetic of a step alone, in one plain PyTorch loop, takes "
        f"{found.arithmetic_us:,.0f} us.",
        _processes(found),
    ]
    for arm in found.arms:
        if arm.profile is not None and arm.profile.stacks:
            parts += [f"Where that time goes, {arm.name}: microseconds a step.", _rooms(arm)]
    if found.accurate:
        parts.append(_accurate(found))
    return "\n\n".join(parts)


def _speeds(found: Found) -> str:
    best = statistics.median([one.steps_per_s for one in found.peer]) if found.peer else None
    head = ["", "steps/s", "of the target", "times HTTP and JSON", "times the step alone", "kB a step", "s to start"]
    rows = [
        [
            arm.name,
            in_short([one.steps_per_s for one in arm.loads]),
            f"{statistics.median([one.steps_per_s for one in arm.loads]) / TARGET:.0%}",
            f"{statistics.median([one.steps_per_s for one in arm.loads]) / best:.1f}" if best else "",
            in_short(times, "{:.2f}") if (times := _times_alone(found, arm)) else "",
            in_short([sum(one.bytes_sent.values()) / one.steps / 1e3 for one in arm.loads], "{:.1f}"),
            in_short([one.ready_s for one in arm.loads], "{:.1f}"),
        ]
        for arm in found.arms
    ]
    for name, loads in found.baselines():
        speeds, sent = [one.steps_per_s for one in loads], [one.bytes / one.steps / 1e3 for one in loads]
        aim, over = (
            f"{statistics.median(speeds) / TARGET:.0%}",
            f"{statistics.median(speeds) / best:.1f}" if best else "",
        )
        rows.append([name, in_short(speeds), aim, over, "", in_short(sent, "{:.1f}"), ""])
    return table(head, rows)


def _times_alone(found: Found, arm: Arm) -> list[float]:
    alone = found.alone.get(arm.client_processes, [])
    return [ours.steps_per_s / plain.steps_per_s for ours, plain in zip(arm.loads, alone, strict=False)]


def _processes(found: Found) -> str:
    def middle(arm: Arm, of: Callable[[Load], float]) -> str:
        return f"{statistics.median([of(one) for one in arm.loads]):,.0f}"

    head = ["", *(f"{role} us" for role in ROLES), "together", "of it I/O threads", *(f"{role} MB" for role in ROLES)]
    rows = [
        [
            arm.name,
            *(middle(arm, lambda one, role=role: one.cpu_us(role)) for role in ROLES),
            middle(arm, lambda one: sum(one.cpu_us(role) for role in ROLES)),
            middle(arm, lambda one: 1e6 * sum(one.usage[role].zmq_s for role in ROLES) / one.steps),
            *(middle(arm, lambda one, role=role: _memory_mb(one, role)) for role in ROLES),
        ]
        for arm in found.arms
    ]
    for name, loads in found.baselines():
        cpu = [
            statistics.median([1e6 * of / one.steps for one, of in zip(loads, values, strict=True)])
            for values in ([one.client_cpu_s for one in loads], [one.server_cpu_s for one in loads])
        ]
        rows.append([name, *(f"{one:,.0f}" for one in cpu), "", f"{sum(cpu):,.0f}", "", "", "", ""])
    return table(head, rows)


def _memory_mb(one: Load, role: str) -> float:
    return one.usage[role].pss_bytes / one.usage[role].processes / 1e6


def _rooms(arm: Arm) -> str:
    """A role's measured CPU time, divided as its stacks were seen in a run of its own."""
    assert arm.profile is not None
    rooms = {role: shares(arm.profile.stacks[role]) for role in ROLES if role in arm.profile.stacks}
    python_us = {role: _python_us(arm, role) for role in rooms}
    names = list(dict.fromkeys(name for by_room in rooms.values() for name in by_room))
    rows = [
        [name, *(f"{by_room.get(name, 0) * python_us[role]:,.0f}" for role, by_room in rooms.items())] for name in names
    ]
    threads = [statistics.median([1e6 * one.usage[role].zmq_s / one.steps for one in arm.loads]) for role in rooms]
    rows.append(["ZeroMQ's I/O threads", *(f"{one:,.0f}" for one in threads)])
    return table(["", *rooms], rows)


def _python_us(arm: Arm, role: str) -> float:
    return statistics.median([one.cpu_us(role) - 1e6 * one.usage[role].zmq_s / one.steps for one in arm.loads])


def _accurate(found: Found) -> str:
    taken = [seconds for seconds, _ in found.accurate if seconds is not None]
    if len(taken) < len(found.accurate):
        return f"{len(found.accurate) - len(taken)} of {len(found.accurate)} runs did not reach {ACCURACY:.0%}."
    ready = statistics.median([ready_s for _, ready_s in found.accurate])
    return (
        f"{ACCURACY:.0%} of MNIST's test images, {CLIENTS} client processes, one step each a version, a seed each run: "
        f"{in_short(taken, '{:.1f}')} s of training, after {ready:.1f} s to start. "
        f"MicroSFL states {MICROSFL_MINUTES} minutes for 80 %."
    )


def figures(found: Found) -> list[Figure]:
    """What other programs are told."""
    handed: list[Figure] = []
    for arm in found.arms:
        speeds = [one.steps_per_s for one in arm.loads]
        handed.append(Figure(name=arm.name, unit="steps/s", values=tuple(speeds), target=TARGET))
        if found.peer:
            times = [ours / theirs.steps_per_s for ours, theirs in zip(speeds, found.peer, strict=True)]
            handed.append(Figure(name=f"{arm.name}, over HTTP and JSON", unit="times", values=tuple(times)))
        if over := _times_alone(found, arm):
            handed.append(
                Figure(name=f"{arm.name}, over the step alone", unit="times", values=tuple(over), headline=False)
            )
        sent = [sum(one.bytes_sent.values()) / one.steps / 1e3 for one in arm.loads]
        cpu_us = [sum(one.cpu_us(role) for role in ROLES) for one in arm.loads]
        for what, unit, values, target in (
            ("sent", "kB/step", sent, MOST_BYTES / 1e3),
            ("CPU time", "us/step", cpu_us, None),
        ):
            name = f"{arm.name}, {what}"
            handed.append(
                Figure(
                    name=name, unit=unit, values=tuple(values), better="lower", target=target, headline=what == "sent"
                )
            )
    if taken := [seconds for seconds, _ in found.accurate if seconds is not None]:
        handed.append(Figure(name=f"{ACCURACY:.0%} of MNIST", unit="s", values=tuple(taken), better="lower"))
    return handed


def details(found: Found) -> dict[str, Any]:
    """All values, and the dearest functions of each role."""
    return {
        "target_steps_per_s": TARGET,
        "arithmetic_us": found.arithmetic_us,
        "arms": {arm.name: _arm_details(arm) for arm in found.arms},
        "baselines": {
            name: [
                {
                    "steps_per_s": one.steps_per_s,
                    "bytes": one.bytes / one.steps,
                    "client_cpu_us": 1e6 * one.client_cpu_s / one.steps,
                    "server_cpu_us": 1e6 * one.server_cpu_s / one.steps,
                }
                for one in loads
            ]
            for name, loads in found.baselines()
        },
        "accurate_s": [seconds for seconds, _ in found.accurate],
    }


def _arm_details(arm: Arm) -> dict[str, Any]:
    profile = arm.profile.stacks if arm.profile else {}
    return {
        "steps_per_s": [one.steps_per_s for one in arm.loads],
        "bytes_per_step": [{role: sent / one.steps for role, sent in one.bytes_sent.items()} for one in arm.loads],
        "cpu_us": {role: [one.cpu_us(role) for one in arm.loads] for role in ROLES},
        "memory_mb": {role: [_memory_mb(one, role) for one in arm.loads] for role in ROLES},
        "ready_s": [one.ready_s for one in arm.loads],
        "rooms": {role: shares(stacks) for role, stacks in profile.items()},
        "costs": {
            role: [{"function": name, "own": own, "whole": whole} for name, own, whole in costs(stacks)]
            for role, stacks in profile.items()
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--steps", type=int, nargs="+", default=[1, 16], metavar="N", help="of each client a version (default: 1 16)")
    add("--at-once", type=int, default=16, metavar="N", help="mini-batches as one step (default: 16; 1: not)")
    add("--repeat", type=int, default=5, metavar="N", help="repetitions (default: 5)")
    add("--seconds", type=float, default=1.5, metavar="S", help="about how long to measure each time (default: 1.5)")
    add("--split-servers", type=int, default=2, metavar="N", help="default: 2")
    add("--profile-seconds", type=float, default=3.0, metavar="S", help="look so long at where time goes (0: not)")
    add("--peer", action=argparse.BooleanOptionalAction, default=True, help="run the baselines too")
    add("--accuracy", action=argparse.BooleanOptionalAction, default=True, help="measure time to 90 %% accuracy too")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    about = circumstances()
    try:
        found = asyncio.run(measure(args))
    except zsfl.ZsflError as error:
        print(f"benchmarks/throughput.py: {error}", file=sys.stderr)
        return 2
    text = page(found, args)
    print(f"\n{text}\n\nkept in {write('throughput', about, details(found), text)}")
    hand_over(args.json, "throughput", about, figures(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
