"""Latency under load, more split servers, more clients.

    ZSFL_DATA=... python benchmarks/scale.py

Wants MNIST's four IDX files in the folder that ZSFL_DATA names, or in `mnist` below it. Two and a half minutes.
METHODOLOGY.md says what is measured and how; `--only latency`, `servers` or `clients` measures a part of it.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from _cluster import end, train_on, usage
from _figures import Figure, add_json_flag, hand_over
from _jobs import JOBS, wrapped
from _latency import Percentiles, between, job_lines, set_pause
from _record import circumstances, in_short, path_of, table, write
from _servers import Servers, draw, servers, servers_figures, servers_table, servers_words

import zsfl

BUDGET_S = 100
IN_THE_LOT = ("--repeat", "1")

LATENCY_CLIENTS, MOST_PROCESSES = (1, 16, 64), 16
WARM_S, FULL_S, PACED_S = 0.7, 1.0, 1.5
LOAD = 0.5
"""Of the most that so many clients get through: what they ask for when there is to be no saturation."""
MOST_RATIO = 5.0

MANY_CLIENTS, MANY_SERVERS = (32, 128, 256), 4
MOST_CLIENT_MB = 5.0


# --- latency --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Of so many clients: as fast as they can, and at a share of that."""

    clients: int
    full: Percentiles
    full_steps_per_s: float
    paced: Percentiles
    paced_steps_per_s: float


async def latency(clients: int) -> Latency:
    """One cluster, at saturation and below it."""
    with tempfile.TemporaryDirectory(prefix="zsfl-bench-") as runs:
        folder = Path(runs)
        job = wrapped(JOBS / "microsfl_untested.py", folder, {"steps": 16})
        job.write_text(job_lines(folder) + job.read_text())
        processes = min(clients, MOST_PROCESSES)
        cluster = zsfl.LocalCluster(job, clients=clients, split_servers=2, client_processes=processes, runs=runs)
        async with cluster:
            training = asyncio.create_task(train_on(cluster))
            await asyncio.sleep(WARM_S)
            full = await _watched(folder, FULL_S)
            full_steps_per_s = full.steps / FULL_S
            if full.steps:
                set_pause(folder, full.p50_s / LOAD)  # whatever number of steps each has in hand
            await asyncio.sleep(WARM_S)
            paced = await _watched(folder, PACED_S)
            await end(training)
            return Latency(
                clients=clients,
                full=full,
                full_steps_per_s=full_steps_per_s,
                paced=paced,
                paced_steps_per_s=paced.steps / PACED_S,
            )


async def _watched(folder: Path, seconds: float) -> Percentiles:
    begun_s = time.monotonic()
    await asyncio.sleep(seconds)
    return between(folder, begun_s, time.monotonic())


# --- clients --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Many:
    """An epoch of so many clients in one process."""

    clients: int
    seconds: float
    steps: int
    accuracy: float | None
    client_mb: float
    """Memory of the process that holds them (PSS), after the epoch."""
    together_mb: float


async def many(clients: int) -> Many:
    """One epoch of MNIST."""
    with tempfile.TemporaryDirectory(prefix="zsfl-bench-") as runs:
        async with zsfl.LocalCluster(
            JOBS / "microsfl.py", clients=clients, split_servers=MANY_SERVERS, client_processes=1, runs=runs
        ) as cluster:
            begun_s = time.perf_counter()
            (report,) = [report async for report in cluster.train(1)]
            seconds = time.perf_counter() - begun_s
            used = usage(cluster, memory=True)
            return Many(
                clients=clients,
                seconds=seconds,
                steps=report.steps,
                accuracy=report.accuracy,
                client_mb=used["client"].pss_bytes / 1e6,
                together_mb=sum(role.pss_bytes for role in used.values()) / 1e6,
            )


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line that is nearest to them."""
    return statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope


# --- all together ---------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Found:
    """Everything that one run of this benchmark found; the runs of clients by turn."""

    latencies: list[Latency] = field(default_factory=list[Latency])
    servers: list[Servers] = field(default_factory=list[Servers])
    many: list[list[Many]] = field(default_factory=list[list[Many]])


async def measure(args: argparse.Namespace) -> Found:
    """All parts in turn, so many times."""
    found = Found()
    for turn in range(args.repeat):
        print(f"turn {turn + 1} of {args.repeat}", flush=True)
        if "latency" in args.only:
            found.latencies += [await latency(clients) for clients in LATENCY_CLIENTS]
        if "servers" in args.only:
            found.servers.append(await servers())
        if "clients" in args.only:
            found.many.append([await many(clients) for clients in MANY_CLIENTS])
    return found


def page(found: Found, picture: str) -> str:
    """All tables."""
    parts: list[str] = []
    if found.latencies:
        parts += ["## Latency of a step", _latency_words(), _latency_table(found.latencies)]
    if found.servers:
        parts += ["## More split servers", servers_words(found.servers), servers_table(found.servers)]
        parts.append(f"![throughput while servers are added]({picture})")
    if found.many:
        parts += ["## More clients", _many_words(found.many), _many_table(found.many)]
    return "\n\n".join(parts)


def _latency_words() -> str:
    return (
        "From the beginning of the head's forward to the acknowledged spill, milliseconds; MicroSFL's network, 2 split "
        "servers, 16 steps of each client a version. At saturation every client always has steps in hand; below it, "
        f"clients pause at random so that they ask for {LOAD:.0%} of that at most. Aim: 99th percentile at most "
        f"{MOST_RATIO:g} times the median below saturation."
    )


def _latency_table(latencies: Sequence[Latency]) -> str:
    rows: list[list[str]] = []
    for clients in LATENCY_CLIENTS:
        own = [one for one in latencies if one.clients == clients]
        for label, of, rates in (
            ("at saturation", [one.full for one in own], [one.full_steps_per_s for one in own]),
            ("below", [one.paced for one in own], [one.paced_steps_per_s for one in own]),
        ):
            rows.append(
                [
                    f"{clients} clients, {label}",
                    in_short(rates),
                    in_short([1e3 * one.p50_s for one in of], "{:.1f}"),
                    in_short([1e3 * one.p99_s for one in of], "{:.1f}"),
                    in_short([one.ratio for one in of], "{:.1f}"),
                ]
            )
    return table(["", "steps/s", "median ms", "99th percentile ms", "ratio"], rows)


def _many_words(turns: Sequence[Sequence[Many]]) -> str:
    slopes = in_short([slope([(one.clients, one.client_mb) for one in turn]) for turn in turns], "{:.2f}")
    return (
        f"An epoch of MNIST with its held-out test, all clients in one process, {MANY_SERVERS} split servers. Each "
        f"client more takes {slopes} MB (aim: less than {MOST_CLIENT_MB:g})."
    )


def _many_table(turns: Sequence[Sequence[Many]]) -> str:
    rows: list[list[str]] = []
    for number, clients in enumerate(MANY_CLIENTS):
        own = [turn[number] for turn in turns]
        rows.append(
            [
                str(clients),
                in_short([one.seconds for one in own], "{:.1f}"),
                in_short([one.steps / one.seconds for one in own]),
                in_short([100 * (one.accuracy or 0.0) for one in own], "{:.1f}"),
                in_short([one.client_mb for one in own]),
                in_short([one.together_mb for one in own]),
            ]
        )
    return table(["clients", "s", "steps/s", "accuracy %", "client process MB", "all processes MB"], rows)


def figures(found: Found) -> list[Figure]:
    """What other programs are told."""
    handed: list[Figure] = []
    for clients in LATENCY_CLIENTS if found.latencies else ():
        own = [one for one in found.latencies if one.clients == clients]
        paced = tuple(one.paced.ratio for one in own)
        name = f"latency of {clients} clients"
        handed.append(
            Figure(name=f"{name}, 99th over 50th", unit="times", values=paced, better="lower", target=MOST_RATIO)
        )
        for label, values in (("median", [one.paced.p50_s for one in own]), ("99th", [one.paced.p99_s for one in own])):
            milliseconds = tuple(1e3 * value for value in values)
            handed.append(
                Figure(name=f"{name}, {label}", unit="ms", values=milliseconds, better="lower", headline=False)
            )
    if found.servers:
        handed += servers_figures(found.servers)
    if found.many:
        slopes = tuple(slope([(one.clients, one.client_mb) for one in turn]) for turn in found.many)
        name = f"a client more, of {MANY_CLIENTS[-1]}"
        handed.append(Figure(name=name, unit="MB", values=slopes, better="lower", target=MOST_CLIENT_MB))
        epochs = tuple(turn[-1].seconds for turn in found.many)
        handed.append(Figure(name=f"an epoch of {MANY_CLIENTS[-1]} clients", unit="s", values=epochs, better="lower"))
    return handed


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["latency", "servers", "clients"]
    add: Callable[..., Any] = parser.add_argument
    add("--only", nargs="+", choices=parts, default=parts, metavar="PART", help=f"some of {', '.join(parts)}")
    add("--repeat", type=int, default=5, metavar="N", help="repetitions (default: 5)")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    about = circumstances()
    name = "scale" if len(args.only) == len(parts) else f"scale-{'-'.join(args.only)}"
    picture = path_of(name, about, "png")
    try:
        found = asyncio.run(measure(args))
    except zsfl.ZsflError as error:
        print(f"benchmarks/scale.py: {error}", file=sys.stderr)
        return 2
    if found.servers:
        draw(picture, found.servers)
    text = page(found, picture.name)
    print(f"\n{text}\n\nkept in {write(name, about, asdict(found), text)}")
    hand_over(args.json, name, about, figures(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
