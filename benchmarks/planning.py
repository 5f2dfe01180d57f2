"""What `zsfl plan` predicts beside what is measured, and how long it takes for many.

    python benchmarks/planning.py

Three minutes. METHODOLOGY.md says what is measured and how; `--only large` measures how long planning takes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _cluster import end, train_on
from _figures import Figure, add_json_flag, hand_over
from _jobs import JOBS, wrapped
from _record import circumstances, in_short, table, write

import zsfl
from zsfl.learning.modes import Mode, mode_named
from zsfl.planning.comparing import compare
from zsfl.planning.figures import Figures
from zsfl.planning.measuring import job_figures
from zsfl.planning.simulation import simulate
from zsfl.settings import NodeSettings

JOB = JOBS / "simulated_accelerator.py"
ACCELERATOR_S = 0.02
"""Of a step; the job's own default."""
SERVERS, CLIENTS = (1, 2, 4), (4, 16, 64)
MODES: dict[str, Mode] = {"exact": zsfl.Exact(), "async": zsfl.Async(samples=8 * 64, quota=8, max_correction=1.0)}
ROUND_S, SECONDS, MOST_S = 0.8, 2.2, 60.0
HOPS = 6
"""One after the other in a step of a client alone: two requests, their answers, its spill, the next version."""
LONGER = """
from torch.utils.data import ConcatDataset
short = job.data
data = lambda shard, shards: (ConcatDataset([short(shard, shards)[0]] * {batches}), None)
job = dataclasses.replace(job, mode=zsfl.{mode!r}, data=data)
"""
TRIAL_S = 1.5
MOST_OFF = 0.15
LARGE_MODES = ("exact", "elastic", "async")
LARGE = ((1_000, 100), (10_000, 1_000))
MOST_LARGE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One combination."""

    mode: str
    servers: int
    clients: int
    predicted: float
    """Steps a second."""
    measured: float
    hop_s: float
    load: float
    """Of the machine, before it was measured."""

    @property
    def off(self) -> float:
        return self.predicted / self.measured - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Large:
    """A plan of many."""

    mode: str
    clients: int
    servers: int
    seconds: float
    """Of processor time, for the asked number of servers and for the others that are tried."""
    wall_s: float
    events: int
    steps_per_s: float
    bottleneck: str


def figures_here() -> Figures:
    """What a step of the job costs on this machine; the accelerator's part of it is known, and uses no processor.

    All but the body's time is from a trial without accelerator: else the little that it is would be lost in the noise.
    """
    slow = job_figures(zsfl.load_job(JOB), NodeSettings(), TRIAL_S)
    os.environ["SIMULATED_STEP_S"] = "0"
    try:
        given = job_figures(zsfl.load_job(JOB), NodeSettings(), TRIAL_S)
    finally:
        del os.environ["SIMULATED_STEP_S"]
    # What the body takes beside is the processor's: divided among what a server is asked and what it spills.
    given["server_message_s"] += max(0.0, slow["forward_s"] + slow["backward_s"] - ACCELERATOR_S) / 3
    given |= {"forward_s": ACCELERATOR_S / 3, "backward_s": ACCELERATOR_S * 2 / 3, "on_device": True}
    return Figures(clients=1, batch=64, samples=64, cores=float(os.cpu_count() or 1), jitter=0.1, **given)


def predicted(figures: Figures, mode: str, servers: int, clients: int) -> float:
    """All clients in one process, all nodes on this machine."""
    asked = replace(figures, mode=MODES[mode], split_servers=servers, clients=clients, client_nodes=1)
    return simulate(asked).steps_per_s


async def measured(mode: str, servers: int, clients: int, guess: float) -> float:
    """Processes for split servers and aggregator, one for all clients; once they have trained for a while.

    Rounds take about `ROUND_S` if the guess is right: what happens between two of them is not what is asked about.
    """
    ends: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory(prefix="zsfl-bench-") as runs:
        job = wrapped(JOB, Path(runs), {"batches": "equal"})
        job.write_text(
            job.read_text() + LONGER.format(mode=MODES[mode], batches=max(1, round(ROUND_S * guess / clients)))
        )
        async with zsfl.LocalCluster(
            job, clients=clients, split_servers=servers, client_processes=1, runs=runs
        ) as cluster:
            enough = asyncio.Event()

            def heard(report: zsfl.RoundReport) -> None:
                ends.append((time.perf_counter(), report.steps))
                if ends[-1][0] >= ends[0][0] + SECONDS:
                    enough.set()

            training = asyncio.create_task(train_on(cluster, heard))
            async with asyncio.timeout(MOST_S):
                await enough.wait()
            await end(training)
    return sum(steps for _, steps in ends[1:]) / (ends[-1][0] - ends[0][0])  # the first one is to warm up


async def with_hops(figures: Figures) -> Figures:
    """With what a message takes between two processes here: as much as explains one client with one split server.

    Processes that wait are woken up late where others keep the cores busy; a trial in one process knows nothing of it.
    """
    alone = replace(figures, client_nodes=1, latency_s=0.0)
    at_once_s = 1 / simulate(alone).steps_per_s
    return replace(figures, latency_s=max(0.0, 1 / await measured("exact", 1, 1, 1 / at_once_s) - at_once_s) / HOPS)


def pair(figures: Figures, mode: str, servers: int, clients: int) -> Pair:
    """Predict, then measure."""
    guess, load = predicted(figures, mode, servers, clients), os.getloadavg()[0]
    seen = asyncio.run(measured(mode, servers, clients, guess))
    return Pair(
        mode=mode,
        servers=servers,
        clients=clients,
        predicted=guess,
        measured=seen,
        hop_s=figures.latency_s,
        load=load,
    )


def pairs(turns: int) -> list[Pair]:
    """All combinations, so many times; those of one mode and number of servers with figures of their own."""
    found = list[Pair]()
    for turn in range(turns):
        print(f"turn {turn + 1} of {turns}", flush=True)
        for mode, servers in itertools.product(MODES, SERVERS):
            figures = asyncio.run(with_hops(figures_here()))
            print(
                f"client {1e3 * figures.client_s:.2f} ms, split server {1e3 * figures.server_s:.2f}, aggregator "
                f"{2e3 * figures.part_s:.2f} and {1e3 * figures.version_s:.2f} a version, a hop "
                f"{1e3 * figures.latency_s:.2f}",
                flush=True,
            )
            for clients in CLIENTS:
                found.append(pair(figures, mode, servers, clients))
                said = f"{found[-1].predicted:.1f} predicted, {found[-1].measured:.1f} measured ({found[-1].off:+.0%})"
                print(f"{mode}, {servers} servers, {clients} clients: {said}, load {found[-1].load:.1f}", flush=True)
    return found


def large(mode: str, clients: int, servers: int) -> Large:
    """A plan for many, as `zsfl plan` makes it."""
    figures = Figures(
        clients=clients, split_servers=servers, mode=mode_named(mode),
        head_s=0.001, tail_s=0.002, back_s=0.002, forward_s=0.007, backward_s=0.013, part_s=1e-5, version_s=0.003,
        activation_bytes=16384, output_bytes=16384, input_grad_bytes=16384, link_bytes_per_s=6.25e6, latency_s=0.005,
        server_link_bytes_per_s=1.25e9, jitter=0.1,
    )  # fmt: skip
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    comparison = compare(figures)
    return Large(
        mode=mode,
        clients=clients,
        servers=servers,
        seconds=time.process_time() - begun_cpu_s,
        wall_s=time.perf_counter() - begun_s,
        events=sum(one.events for one in comparison.tried),
        steps_per_s=comparison.asked.steps_per_s,
        bottleneck=comparison.asked.bottleneck,
    )


# --- what is said of it ---------------------------------------------------------------------------------------


def page(found: Sequence[Pair], many: Sequence[Large]) -> str:
    """All tables."""
    parts: list[str] = []
    if found:
        parts += ["## Predicted and measured", _pairs_words(found), _pairs_table(found)]
    if many:
        parts += ["## How long planning takes", _large_words(), _large_table(many)]
    return "\n\n".join(parts)


def _combinations(found: Sequence[Pair]) -> list[list[Pair]]:
    by_key: dict[tuple[str, int, int], list[Pair]] = {}
    for one in found:
        by_key.setdefault((one.mode, one.servers, one.clients), []).append(one)
    return list(by_key.values())


def _pairs_words(found: Sequence[Pair]) -> str:
    combinations = _combinations(found)
    close = sum(abs(statistics.median(one.off for one in own)) <= MOST_OFF for own in combinations)
    return (
        f"A step holds a SIMULATED accelerator for {1e3 * ACCELERATOR_S:g} ms; all clients in one process, all nodes "
        "on this machine. Predicted from a trial of the job with one split server and four clients in one "
        f"process, before anything was measured. Aim: within {MOST_OFF:.0%} of what was measured; {close} of "
        f"{len(combinations)} combinations are."
    )


def _pairs_table(found: Sequence[Pair]) -> str:
    rows = [
        [
            own[0].mode,
            str(own[0].servers),
            str(own[0].clients),
            in_short([one.predicted for one in own], "{:.1f}"),
            in_short([one.measured for one in own], "{:.1f}"),
            in_short([100 * one.off for one in own], "{:+.0f}"),
            in_short([one.load for one in own], "{:.1f}"),
        ]
        for own in _combinations(found)
    ]
    return table(["mode", "accelerators", "clients", "predicted steps/s", "measured steps/s", "off by %", "load"], rows)


def _large_words() -> str:
    return (
        "`compare` of `zsfl plan`, from given figures: client 5 ms, split server 20 ms, 16 KiB over 50 Mbit/s and "
        f"5 ms. Processor time of one core; aim: at most {MOST_LARGE_S:g} s."
    )


def _large_table(many: Sequence[Large]) -> str:
    rows = [
        [
            one.mode,
            f"{one.clients:,}",
            f"{one.servers:,}",
            f"{one.seconds:.1f}",
            f"{one.wall_s:.1f}",
            f"{one.events:,}",
            f"{one.steps_per_s:,.0f}",
            one.bottleneck,
        ]
        for one in many
    ]
    head = ["mode", "clients", "split servers", "s of a core", "s", "events", "predicted steps/s", "bound by"]
    return table(head, rows)


def figures_of(found: Sequence[Pair], many: Sequence[Large]) -> list[Figure]:
    """What other programs are told."""
    handed: list[Figure] = []
    for own in _combinations(found):
        off = tuple(100 * abs(one.off) for one in own)
        name = f"{own[0].mode}, {own[0].servers} accelerators, {own[0].clients} clients: off by"
        handed.append(Figure(name=name, unit="%", values=off, better="lower", target=100 * MOST_OFF, headline=False))
    if found:
        worst = max(statistics.median(100 * abs(one.off) for one in own) for own in _combinations(found))
        name = "worst combination off by"
        handed.append(Figure(name=name, unit="%", values=(worst,), better="lower", target=100 * MOST_OFF))
    for one in many:
        name = f"planning {one.clients:,} clients, {one.servers:,} split servers, {one.mode}"
        handed.append(Figure(name=name, unit="s of a core", values=(one.seconds,), better="lower", target=MOST_LARGE_S))
    return handed


def main(argv: Sequence[str] | None = None) -> int:
    """Predict, measure, print the tables, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["pairs", "large"]
    add: Callable[..., Any] = parser.add_argument
    add("--only", nargs="+", choices=parts, default=parts, metavar="PART", help=f"some of {', '.join(parts)}")
    add("--repeat", type=int, default=1, metavar="N", help="repetitions of the measurements (default: 1)")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    about = circumstances()
    name = "planning" if len(args.only) == len(parts) else f"planning-{'-'.join(args.only)}"
    many = [large(mode, *size) for mode in LARGE_MODES for size in LARGE] if "large" in args.only else []
    try:
        found = pairs(args.repeat) if "pairs" in args.only else []
    except zsfl.ZsflError as error:
        print(f"benchmarks/planning.py: {error}", file=sys.stderr)
        return 2
    kept = {"pairs": [{**asdict(one), "off": one.off} for one in found], "large": [asdict(one) for one in many]}
    text = page(found, many)
    print(f"\n{text}\n\nkept in {write(name, about, kept, text)}")
    hand_over(args.json, name, about, figures_of(found, many))
    return 0


if __name__ == "__main__":
    sys.exit(main())
