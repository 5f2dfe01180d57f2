"""How well and how soon modes and baselines learn one job: a table, and accuracy by round and by time.

Any job will do:

    python benchmarks/learning.py benchmarks/jobs/mnist_skewed.py --compare exact elastic fedavg splitfed-v1

Modes run as a cluster of real processes on this machine, baselines in this process, see zsfl.baselines. Seconds are
those of training, without the held-out tests as far as these do not slow training down.

    python benchmarks/learning.py --suite

runs what benchmarks/METHODOLOGY.md describes: uneven clients, skewed labels, one slow client.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from _curves import Curve, Point, draw
from _record import ROOT, circumstances, table, write

import zsfl
from zsfl import baselines
from zsfl.learning.modes import ModeName

MODES: tuple[str, ...] = get_args(ModeName)
RATES = (1.0, 0.3, 0.1, 0.03)
"""What --tune tries for every baseline, times the job's learning rate."""
SLOWER = 5.0
"""How many times slower the slow client of the suite is."""


def wrapped(job: Path, folder: Path, changes: Mapping[str, Any]) -> Path:
    """A job file that is `job` with some fields changed."""
    path = folder / f"{job.stem}_changed.py"
    path.write_text(
        "import dataclasses, pathlib\n"
        "import zsfl\n"
        f"job = dataclasses.replace(zsfl.load_job(pathlib.Path({str(job.absolute())!r})), **{dict(changes)!r})\n"
    )
    return path


async def run_mode(job: Path, mode: str, clients: int, rounds: int, seed: int, every: int | None) -> Curve:
    """Train with real processes."""
    curve = Curve(mode, seed)
    tests: list[zsfl.Tested] = []
    with tempfile.TemporaryDirectory(prefix="zsfl-bench-") as runs:
        changes = {"seed": seed, "evaluate_every": every}
        cluster = zsfl.LocalCluster(
            wrapped(job, Path(runs), changes),
            clients=clients,
            split_servers=2,
            mode=mode,
            runs=runs,
            on_report=lambda report: tests.append(report) if isinstance(report, zsfl.Tested) else None,
        )
        async with cluster:
            ended = [report async for report in cluster.train(rounds)]
    per_round = ended[-1].version / len(ended)
    curve.points = [Point(one.version / per_round, one.seconds, one.accuracy or 0.0) for one in tests]
    curve.ends = [report.accuracy or 0.0 for report in ended]
    curve.steps_per_s = sum(r.steps for r in ended) / sum(r.seconds for r in ended)
    curve.late, curve.dropped = sum(r.late for r in ended), sum(r.dropped for r in ended)
    return curve


def run_baseline(job: zsfl.Job, name: str, rounds: int, seed: int, rate: float = 1.0) -> Curve:
    """Train in this process, at so many times the job's learning rate."""
    options = dict(job.optimizer.options)
    options["lr"] = options["lr"] * rate
    changed = dataclasses.replace(job, seed=seed, optimizer=dataclasses.replace(job.optimizer, options=options))
    done = list(baselines.run(name, changed, rounds))
    curve = Curve(name, seed, note="" if rate == 1 else f"lr {options['lr']:g}")
    curve.points = [Point(one.round, one.seconds, one.accuracy or 0.0) for one in done]
    curve.ends = [one.accuracy or 0.0 for one in done]
    curve.steps_per_s = done[-1].steps / max(done[-1].seconds, 1e-9)
    return curve


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is compared on one job."""

    job: Path
    names: Sequence[str]
    clients: int
    rounds: int
    seeds: Sequence[int]
    target: float
    tune: bool = False
    every: int | None = None
    title: str = ""

    def run(self) -> list[Curve]:
        """All algorithms, seed by seed, so that what disturbs the machine disturbs all of them."""
        job = dataclasses.replace(zsfl.load_job(self.job), shards=self.clients)
        curves: list[Curve] = []
        for seed in self.seeds:
            for name in self.names:
                curve = self._one(job, name, seed)
                print(f"{self.job.stem}, {self.clients} clients, seed {seed}: {name} {curve.final:.2%}", flush=True)
                curves.append(curve)
        return curves

    def _one(self, job: zsfl.Job, name: str, seed: int) -> Curve:
        if name in MODES:
            return asyncio.run(run_mode(self.job, name, self.clients, self.rounds, seed, self.every))
        tunes = self.tune and name not in ("centralised", "merged")
        curves = [run_baseline(job, name, self.rounds, seed, rate) for rate in (RATES if tunes else (1.0,))]
        return max(curves, key=lambda curve: curve.final)

    def page(self, curves: Sequence[Curve]) -> str:
        """The table for people."""
        spread = " (median, lowest to highest of the seeds)" if len(self.seeds) > 1 else ""
        head = ["", "final", "best", "largest drop after round 3", f"rounds to {self.target:.0%}"]
        head += [f"s to {self.target:.0%}", "steps/s", "late", "dropped", ""]
        rows = [self._row(name, [curve for curve in curves if curve.name == name]) for name in self.names]
        return (
            f"{self.title or self.job.stem}: {self.clients} clients, {self.rounds} rounds, "
            f"seeds {', '.join(map(str, self.seeds))}{spread}\n\n{table(head, rows)}"
        )

    def _row(self, name: str, curves: Sequence[Curve]) -> list[str]:
        reached = [curve.reached(self.target) for curve in curves]
        return [
            name,
            _median([curve.final for curve in curves], "{:.2%}"),
            _median([max(curve.ends) for curve in curves], "{:.2%}"),
            _median([100 * curve.drop for curve in curves], "{:.2f}"),
            _median([point.round if point else None for point in reached], "{:.1f}"),
            _median([point.seconds if point else None for point in reached], "{:.1f}"),
            _median([curve.steps_per_s for curve in curves], "{:,.0f}"),
            str(sum(curve.late for curve in curves)),
            str(sum(curve.dropped for curve in curves)),
            ", ".join(sorted({curve.note for curve in curves if curve.note})),
        ]


def _median(values: Sequence[float | None], form: str) -> str:
    """The middle one, and the outer ones where there are several; a dash where one is missing."""
    found = [value for value in values if value is not None]
    if len(found) < len(values) or not found:
        return "-"
    middle = form.format(statistics.median(found))
    return middle if len(found) == 1 else f"{middle} ({form.format(min(found))} to {form.format(max(found))})"


def suite(seeds: Sequence[int]) -> list[Comparison]:
    """What METHODOLOGY describes."""
    jobs = ROOT / "benchmarks" / "jobs"
    fair = ["exact", "merged", "centralised"]
    uneven = [
        Comparison(
            job=jobs / f"{job}.py", names=fair, clients=clients, rounds=10, seeds=seeds, target=0.95, title=title
        )
        for job, title in (("mnist_sizes", "Sizes by Dirichlet(5.0)"), ("mnist_labels", "Labels by Dirichlet(0.5)"))
        for clients in (5, 10, 20)
    ]
    names = ["exact", "elastic", *baselines.BASELINES]
    skewed = Comparison(
        job=jobs / "mnist_skewed.py",
        names=names,
        clients=20,
        rounds=10,
        seeds=seeds,
        target=0.95,
        tune=True,
        title="Labels by Dirichlet(0.1); baselines at the best of four learning rates",
    )
    slow = Comparison(
        job=jobs / "mnist_slow_client.py",
        names=MODES,
        clients=20,
        rounds=8,
        seeds=seeds[:1],
        target=0.95,
        every=8,
        title=f"One client {SLOWER:g} times slower (simulated)",
    )
    return [*uneven, skewed, slow]


def simulate_slowness() -> float:
    """Measure a version of 20 equal clients, and have the slow one of the suite take so many times longer."""
    usual = ROOT / "benchmarks" / "jobs" / "mnist.py"
    curve = asyncio.run(run_mode(usual, "exact", 20, 2, 0, None))
    version_s = 20 / curve.steps_per_s
    os.environ["SIMULATED_DELAY_S"] = f"{(SLOWER - 1) * version_s:.4f}"
    return version_s


def figures(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """For machines."""
    return [dataclasses.asdict(curve) for curve in curves]


def main() -> int:
    """Run what is asked for, print the tables, keep the figures."""
    args = _parse()
    torch.set_num_threads(1)
    about = circumstances()
    try:
        if not args.suite:
            comparisons, name = [_comparison(args)], f"learning-{args.job.stem.replace('_', '-')}"
            version_s = None
        else:
            comparisons, name = suite(args.seeds), "learning"
            version_s = simulate_slowness()
        done = [(comparison, comparison.run()) for comparison in comparisons]
    except zsfl.ZsflError as error:
        print(f"benchmarks/learning.py: {error}", file=sys.stderr)
        return 2
    page = "\n\n".join(comparison.page(curves) for comparison, curves in done)
    kept = {"version_s": version_s, "runs": [{**_facts(c), "curves": figures(curves)} for c, curves in done]}
    path = write(name, about, kept, page)
    for number, (comparison, curves) in enumerate(done, 1):
        suffix = f"-{number}" if len(done) > 1 else ""
        draw(path.with_name(f"{path.stem}{suffix}.png"), comparison.title or comparison.job.stem, curves, MODES)
    print(f"\n{page}\n\nkept in {path}, with its plots beside it")
    return 0


def _facts(comparison: Comparison) -> dict[str, Any]:
    facts = dataclasses.asdict(comparison)
    return {**facts, "job": comparison.job.name}


def _comparison(args: argparse.Namespace) -> Comparison:
    known = [*MODES, *baselines.BASELINES]
    if unknown := [name for name in args.compare if name not in known]:
        raise zsfl.ConfigError(f"cannot compare {', '.join(unknown)}: use some of {', '.join(known)}")
    job = zsfl.load_job(args.job)
    return Comparison(
        job=args.job,
        names=args.compare,
        clients=args.clients or job.shards,
        rounds=args.rounds or job.rounds,
        seeds=args.seeds,
        target=args.target,
        tune=args.tune,
        every=args.evaluate_every,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", nargs="?", type=Path, metavar="JOB", help="job file")
    parser.add_argument("--suite", action="store_true", help="run the scenarios of METHODOLOGY.md instead of one job")
    parser.add_argument(
        "--compare", nargs="+", default=["exact", "centralised"], metavar="NAME", help="modes, baselines"
    )
    parser.add_argument("--clients", type=int, metavar="N", help="clients (default: the job's shards)")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds to train (default: the job's)")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], metavar="S", help="run all once a seed (default: 0)"
    )
    parser.add_argument("--target", type=float, default=0.95, metavar="A", help="accuracy to reach (default: 0.95)")
    parser.add_argument("--tune", action="store_true", help="give each baseline the best of four learning rates")
    parser.add_argument("--evaluate-every", type=int, metavar="N", help="also test modes every N versions")
    args = parser.parse_args()
    if (args.job is None) != args.suite:
        parser.error("name a job file, or say --suite")
    return args


if __name__ == "__main__":
    sys.exit(main())
