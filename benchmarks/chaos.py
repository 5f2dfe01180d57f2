"""Nodes of every role are killed at random moments, and started again: does the run end as it would have ended?

    python benchmarks/chaos.py
    python benchmarks/chaos.py --seeds 5 --kills 100
    python benchmarks/chaos.py --minutes 30 --every 10       one long run: memory, descriptors and disk over time

Eight clients, three split servers, an aggregator and one that stands by, each its own process, in exact mode and double
precision. About two and a half minutes for each seed.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from _figures import Figure, add_json_flag, hand_over
from _jobs import JOBS, wrapped
from _record import circumstances, in_short, path_of, table, write

import zsfl
from zsfl.aggregator.audit import audit
from zsfl.ids import Role
from zsfl.reports import AnyReport, Exited, Ready, RoundReport, WindowReport

JOB, COUNTED = JOBS / "digits_double.py", JOBS / "digits_counted.py"
CLIENTS, SPLIT_SERVERS, STANDBYS = 8, 3, 1
SETTINGS: dict[str, Any] = {"mdns": False, "beat_s": 0.2, "lost_after_s": 1.0}
LOOK_S = 5.0
"""How often a long run is looked at."""


@dataclass(slots=True)
class Look:
    """What all processes of a cluster hold at one moment."""

    minutes: float
    memory_mb: float
    descriptors: int
    disk_mb: float
    versions: int


@dataclass(slots=True)
class Wrecked:
    """One run in which nodes were killed."""

    seed: int
    kills: dict[str, int] = field(default_factory=dict[str, int])
    rounds: int = 0
    versions: int = 0
    counted: int = 0
    made: dict[str, int] = field(default_factory=dict[str, int])
    """How often a tail or a body was gone through in training, also by who was killed in the middle of it."""
    seconds: float = 0.0
    equal: bool = False
    faults: list[str] = field(default_factory=list[str])
    pauses_s: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """By role of who was killed, until the next version was heard of."""
    looks: list[Look] = field(default_factory=list[Look])
    takeovers_s: list[float] = field(default_factory=list[float])
    """From the death of who led until the other one leads."""
    waiting: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])
    """Role and moment of kills since the last version was heard of."""
    leader: str = "aggregator"
    died_s: float | None = None
    """When that one did; None while it leads."""

    def on(self, report: AnyReport) -> None:
        """For `LocalCluster(on_report=...)`."""
        match report:
            case Exited() if report.code:
                is_aggregating = report.node in ("aggregator", *(f"standby-{number}" for number in range(STANDBYS)))
                role = Role.AGGREGATOR if is_aggregating else report.node.rsplit("-", 1)[0]
                self.kills[str(role)] = self.kills.get(str(role), 0) + 1
                if report.node == self.leader or not is_aggregating:  # nobody waits for one that stands by
                    self.waiting.append((role, time.perf_counter()))
                if report.node == self.leader:
                    self.died_s = time.perf_counter()
            case Ready() if report.role == Role.AGGREGATOR:
                if report.node != self.leader and self.died_s is not None:
                    self.takeovers_s.append(time.perf_counter() - self.died_s)
                self.leader, self.died_s = report.node, None
            case WindowReport() | RoundReport():
                now_s = time.perf_counter()
                for role, killed_s in self.waiting:
                    self.pauses_s.setdefault(role, []).append(now_s - killed_s)
                self.waiting.clear()
            case _:
                pass


def digests(folder: Path) -> list[str]:
    """Of the weights of every version."""
    return [json.loads(line)["weights"] for line in (folder / "ledger.jsonl").read_bytes().splitlines()]


async def wrecked(seed: int, kills: int, every_s: float, minutes: float, runs: Path) -> Wrecked:
    """Train while nodes are killed, until enough were, and compare with a run in which nothing happens."""
    found, begun_s = Wrecked(seed), time.perf_counter()
    os.environ["ZSFL_BENCH_MADE"] = str(runs)
    chaos = zsfl.Chaos(kills=kills, every_s=every_s, seed=seed)
    cluster = zsfl.LocalCluster(
        COUNTED,
        run="wrecked",
        split_servers=SPLIT_SERVERS,
        standbys=STANDBYS,
        runs=runs,
        chaos=chaos,
        on_report=found.on,
        **SETTINGS,
    )
    async with cluster:
        looking = asyncio.create_task(_look(cluster, found, runs)) if minutes else None
        while len(cluster.killed) < kills and not (minutes and time.perf_counter() > begun_s + 60 * minutes):
            found.rounds += len([report async for report in cluster.train(1)])
        if looking is not None:
            looking.cancel()
    found.seconds = time.perf_counter() - begun_s
    found.made = {part: (runs / part).stat().st_size for part in ("tail", "body")}
    folder = Path(cluster.result.folder) if cluster.result else runs / "wrecked"
    proof = audit(folder)
    found.faults, found.versions, found.counted = proof.faults, proof.versions, proof.counted
    if proof.pending:
        found.faults.append(f"{proof.pending} steps are pending")
    calm = wrapped(JOB, runs, {"rounds": found.rounds})
    async with zsfl.LocalCluster(zsfl.load_job(calm), in_process=True, runs=runs, run="calm") as undisturbed:
        async for _ in undisturbed.train():
            pass
    wanted = digests(runs / "calm")
    found.equal = digests(folder) == wanted
    found.faults += _other_histories(runs, wanted)
    return found


def _other_histories(runs: Path, wanted: Sequence[str]) -> list[str]:
    """What is left of whoever was succeeded must be the beginning of the one history."""
    left = {folder.name: digests(folder) for folder in runs.glob("wrecked*")}
    return [f"{name} has another history" for name, found in left.items() if found != wanted[: len(found)]]


async def _look(cluster: zsfl.LocalCluster, found: Wrecked, runs: Path) -> None:
    begun_s = time.perf_counter()
    while True:
        processes = [node.pid for node in cluster.nodes.values() if node.pid and node.exit_code is None]
        memory, descriptors = 0, 0
        for pid in processes:
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                memory += process.memory_full_info().pss
                descriptors += process.num_fds()
        minutes = (time.perf_counter() - begun_s) / 60
        found.looks.append(Look(minutes, memory / 1e6, descriptors, *_on_disk(runs)))
        await asyncio.sleep(LOOK_S)


def _on_disk(runs: Path) -> tuple[float, int]:
    """MB of all files but the ledgers, and the lines of the longest of these."""
    size, versions = 0, 0
    for folder, _, names in os.walk(runs):  # which takes no offence at what is deleted meanwhile
        for path in (Path(folder, name) for name in names):
            with suppress(OSError):
                if path.name == "ledger.jsonl":
                    versions = max(versions, path.read_bytes().count(b"\n"))
                else:
                    size += path.stat().st_size
    return size / 1e6, versions


# --- the page -------------------------------------------------------------------------------------------------


def page(runs: Sequence[Wrecked]) -> str:
    """All tables."""
    head = ["seed", "kills", "clients", "servers", "aggregator", "versions", "steps", "s", "weights", "audit"]
    rows = [
        [
            str(run.seed),
            str(sum(run.kills.values())),
            *(str(run.kills.get(role, 0)) for role in (Role.CLIENT, Role.SPLIT_SERVER, Role.AGGREGATOR)),
            f"{run.versions:,}",
            f"{run.counted:,}",
            f"{run.seconds:.0f}",
            "equal" if run.equal else "OTHER",
            "clean" if not run.faults else f"{len(run.faults)} WRONG",
        ]
        for run in runs
    ]
    parts = [
        f"{CLIENTS} clients, {SPLIT_SERVERS} split servers, 1 aggregator and {STANDBYS} that stands by, killed by "
        "SIGKILL and started again; exact mode, float64. `equal`: the weights of every version are, bit for bit, those "
        "of a run in which nothing happens.",
        table(head, rows),
        "How long no version was heard of after a kill, seconds: median (lowest to highest). For the aggregator that "
        "is until it was started again, or succeeded, had made its last versions again, and everybody had found it.",
        _pauses(runs),
    ]
    if takeovers := [seconds for run in runs for seconds in run.takeovers_s]:
        parts.append(
            f"{len(takeovers)} times another aggregator took over before the one that led was back: "
            f"{in_short(takeovers, '{:.2f}')} s after its death, of which {SETTINGS['lost_after_s']:g} s are the "
            "silence that it takes to know of it."
        )
    counted, kills = sum(run.counted for run in runs), sum(sum(run.kills.values()) for run in runs)
    tails, bodies = (sum(run.made[part] for run in runs) for part in ("tail", "body"))
    parts.append(
        f"Of each step that counted the tail was gone through {tails / counted:.3f} times and the body "
        f"{bodies / counted:.3f} times: for each kill {(tails - counted) / kills:.1f} steps of clients and "
        f"{(bodies - counted) / kills:.1f} of split servers were made again."
    )
    return "\n\n".join(parts)


def _pauses(runs: Sequence[Wrecked]) -> str:
    rows: list[list[str]] = []
    for role in (Role.CLIENT, Role.SPLIT_SERVER, Role.AGGREGATOR):
        if taken := [pause for run in runs for pause in run.pauses_s.get(role, [])]:
            rows.append([role, in_short(taken, "{:.2f}"), str(len(taken))])
    return table(["killed", "s", "times"], rows)


def draw(run: Wrecked, path: Path) -> None:
    """Memory, descriptors and disk over time, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(10, 8), dpi=110, layout="constrained")
    picture.suptitle(f"{sum(run.kills.values())} kills in {run.seconds / 60:.0f} minutes, {run.versions:,} versions")
    minutes = [look.minutes for look in run.looks]
    what: list[tuple[str, list[float]]] = [
        ("memory of all nodes, MB (PSS)", [look.memory_mb for look in run.looks]),
        ("open descriptors of all nodes", [float(look.descriptors) for look in run.looks]),
        ("disk, MB, but for the ledger", [look.disk_mb for look in run.looks]),
        ("versions", [float(look.versions) for look in run.looks]),
    ]
    for axes, (title, values) in zip(picture.subplots(2, 2).flat, what, strict=True):
        axes.plot(minutes, values, linewidth=1.2)
        axes.set_title(title, loc="left", fontsize="medium")
        axes.set_xlabel("minutes")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    FigureCanvasAgg(picture).print_figure(path, format="png")


def figures(runs: Sequence[Wrecked]) -> list[Figure]:
    """What other programs are told."""
    handed = [
        Figure(name="equal to an undisturbed run", unit="of 1", values=tuple(float(r.equal) for r in runs), target=1.0),
        Figure(name="faults found", unit="", values=tuple(float(len(run.faults)) for run in runs), better="lower"),
    ]
    if takeovers := tuple(seconds for run in runs for seconds in run.takeovers_s):
        handed.append(Figure(name="until another aggregator leads", unit="s", values=takeovers, better="lower"))
    for role in (Role.CLIENT, Role.SPLIT_SERVER, Role.AGGREGATOR):
        if pauses := tuple(pause for run in runs for pause in run.pauses_s.get(role, [])):
            handed.append(
                Figure(name=f"no version after the death of a {role}", unit="s", values=pauses, better="lower")
            )
    return handed


def main(argv: Sequence[str] | None = None) -> int:
    """Wreck, compare, print the tables, keep the figures; 1 when a run came out otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--seeds", type=int, default=5, metavar="N", help="runs, with seeds 0 to N-1 (default: 5)")
    add("--kills", type=int, default=100, metavar="N", help="in each run (default: 100)")
    add("--every", type=float, default=1.0, metavar="S", help="seconds between two kills, on average (default: 1)")
    add("--minutes", type=float, default=0.0, metavar="M", help="instead, one run of so long, looked at every 5 s")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    about, runs = circumstances(), list[Wrecked]()
    kills = math.ceil(120 * args.minutes / args.every) if args.minutes else args.kills
    for seed in range(1 if args.minutes else args.seeds):
        with tempfile.TemporaryDirectory(prefix="zsfl-bench-") as folder:
            runs.append(asyncio.run(wrecked(seed, kills, args.every, args.minutes, Path(folder))))
        last = runs[-1]
        print(f"seed {seed}: {dict(last.kills)}, equal: {last.equal}, faults: {last.faults}", flush=True)
    text = page(runs)
    name = "chaos-long" if args.minutes else "chaos"
    if args.minutes:
        draw(runs[0], path_of(name, about, "png"))
        text += f"\n\n![memory, descriptors and disk over time]({path_of(name, about, 'png').name})"
    details = {"runs": [dataclasses.asdict(run) for run in runs]}
    print(f"\n{text}\n\nkept in {write(name, about, details, text)}")
    hand_over(args.json, name, about, figures(runs))
    return 0 if all(run.equal and not run.faults for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
