"""How well and how soon modes and baselines learn one job: a table, and accuracy by round and by time.

Any job will do:

    python benchmarks/learning.py benchmarks/jobs/mnist_skewed.py --compare exact elastic fedavg splitfed-v1

Modes run as a cluster of real processes on this machine, baselines in this process, see zsfl.baselines. Seconds are
those of training, without the held-out tests as far as these do not slow training down.

Without a job it runs what benchmarks/METHODOLOGY.md describes, in about 25 minutes: MNIST over uneven
clients, clients with few labels, and one slow client. It is looked for as in benchmarks/mnist.py.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from _curves import Curve, Point, draw, grouped
from _figures import Figure, add_json_flag, hand_over
from _jobs import wrapped
from _record import ROOT, circumstances, path_of, table, write

import zsfl
from zsfl import baselines
from zsfl.learning.modes import ModeName

MODES: tuple[str, ...] = get_args(ModeName)
RATE_STEP = 10**0.5
"""From one learning rate that --tune tries to the next."""
FARTHEST_RATE = 1e4
"""How many times larger or smaller than the job's a learning rate is that --tune no longer tries."""
CLEARLY_WORSE = 0.01
"""A learning rate that loses so much accuracy to the best is the last that --tune tries on that side."""
TUNED = ", tuned"
OF_A_JOB = ("compare", "clients", "rounds", "tune", "evaluate_every", "client_processes")
"""Flags that say nothing about the scenarios, which have their own."""
SLOWER = 5.0
"""How many times slower the slow client of the suite is."""


async def run_mode(
    job: Path,
    mode: str,
    *,
    clients: int,
    rounds: int,
    seed: int = 0,
    every: int | None = None,
    client_processes: int | None = None,
) -> Curve:
    """Train with real processes; `every` so many versions there is a test beside those that end the rounds."""
    curve = Curve(mode, seed, clients)
    tests: list[zsfl.Tested] = []
    with tempfile.TemporaryDirectory(prefix="zsfl-bench-") as runs:
        cluster = zsfl.LocalCluster(
            wrapped(job, Path(runs), {"seed": seed, "evaluate_every": every}),
            clients=clients,
            split_servers=2,
            client_processes=client_processes,
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


def run_baseline(job: zsfl.Job, name: str, rounds: int, rate: float = 1.0) -> Curve:
    """Train in this process, at so many times the job's learning rate."""
    options = dict(job.optimizer.options)
    if rate != 1:
        options["lr"] = options["lr"] * rate
    changed = dataclasses.replace(job, optimizer=dataclasses.replace(job.optimizer, options=options))
    done = list(baselines.run(name, changed, rounds))
    curve = Curve(name, job.seed, job.shards, note="" if rate == 1 else f"{options['lr']:.2g}")
    curve.points = [Point(one.round, one.seconds, one.accuracy or 0.0) for one in done]
    curve.ends = [one.accuracy or 0.0 for one in done]
    curve.steps_per_s = done[-1].steps / max(done[-1].seconds, 1e-9)
    return curve


def run_tuned(job: zsfl.Job, name: str, rounds: int) -> list[Curve]:
    """A baseline at the job's learning rate, and at the best one if that is another.

    It is chosen by the held-out samples themselves, which flatters the baseline.
    """
    given = best = run_baseline(job, name, rounds)
    for step in (1 / RATE_STEP, RATE_STEP):
        rate = step
        while 1 / FARTHEST_RATE < rate < FARTHEST_RATE:
            found = run_baseline(job, name, rounds, rate)
            if found.final < best.final - CLEARLY_WORSE:
                break
            best = max(best, found, key=lambda curve: curve.final)
            rate *= step
    if best is given:
        return [given]
    best.name += TUNED
    return [given, best]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is compared on one job."""

    title: str
    job: Path
    names: Sequence[str]
    """Of modes and baselines; the table compares the others with the first."""
    clients: Sequence[int]
    rounds: int
    seeds: Sequence[int]
    target: float
    tune: Sequence[str] = ()
    """Baselines that also run at the learning rate that is best for them."""
    every: int | None = None
    client_processes: int | None = None

    def run(self) -> list[Curve]:
        """All algorithms, seed by seed, so that what disturbs the machine disturbs all of them."""
        curves: list[Curve] = []
        for clients in self.clients:
            for seed in self.seeds:
                for name in self.names:
                    found = self._run(name, clients, seed)
                    what = ", ".join(f"{curve.name} {curve.final:.2%}" for curve in found)
                    print(f"{self.job.stem}, {clients} clients, seed {seed}: {what}", flush=True)
                    curves += found
        return curves

    def _run(self, name: str, clients: int, seed: int) -> list[Curve]:
        if name in MODES:
            mode = run_mode(
                self.job,
                name,
                clients=clients,
                rounds=self.rounds,
                seed=seed,
                every=self.every,
                client_processes=self.client_processes,
            )
            return [asyncio.run(mode)]
        job = dataclasses.replace(zsfl.load_job(self.job), shards=clients, seed=seed)
        if name in self.tune:
            return run_tuned(job, name, self.rounds)
        return [run_baseline(job, name, self.rounds)]

    def page(self, curves: Sequence[Curve], picture: str) -> str:
        """The table and the plots for people; `picture` is the name of their file."""
        spread = ", as median (lowest to highest of the seeds)" if len(self.seeds) > 1 else ""
        first = f"than {self.names[0]}"
        head = [
            "",
            "final",
            f"points more {first}",
            "best",
            "largest drop after round 3",
            f"rounds to {self.target:.0%}",
        ]
        head += [f"s to {self.target:.0%}", f"times sooner {first}", "steps/s", "late / dropped", "tuned to"]
        rows = [self._row(label, runs, curves) for label, runs in grouped(curves).items()]
        return (
            f"## {self.title}\n\n{', '.join(map(str, self.clients))} clients, {self.rounds} rounds, "
            f"seeds {', '.join(map(str, self.seeds))}{spread}.\n\n{table(head, rows)}\n\n![plots]({picture})"
        )

    def _row(self, label: str, runs: Sequence[Curve], curves: Sequence[Curve]) -> list[str]:
        firsts = {(one.clients, one.seed): one for one in curves if one.name == self.names[0]}
        pairs = [(run, firsts[run.clients, run.seed]) for run in runs]
        reached = [run.reached(self.target) for run in runs]
        notes = sorted({run.note for run in runs if run.note})
        return [
            label,
            _median([run.final for run in runs], "{:.2%}"),
            _median([100 * (run.final - one.final) for run, one in pairs], "{:+.2f}"),
            _median([max(run.ends) for run in runs], "{:.2%}"),
            _median([100 * run.drop for run in runs], "{:.2f}"),
            _median([point and point.round for point in reached], "{:.1f}"),
            _median([point and point.seconds for point in reached], "{:.1f}"),
            _median([self._sooner(run, one) for run, one in pairs], "{:.2f}"),
            _median([run.steps_per_s for run in runs], "{:,.0f}"),
            f"{sum(run.late for run in runs)} / {sum(run.dropped for run in runs)}" if runs[0].name in MODES else "",
            ", ".join(notes),
        ]

    def _sooner(self, run: Curve, first: Curve) -> float | None:
        """How many times sooner than the first one it reached the target."""
        here, there = run.reached(self.target), first.reached(self.target)
        return there.seconds / here.seconds if here and there else None


def _median(values: Sequence[float | None], form: str) -> str:
    """The middle one, and the outer ones where there are several; a dash where one is missing."""
    found = [value for value in values if value is not None]
    if len(found) < len(values) or not found:
        return "-"
    middle = form.format(statistics.median(found))
    return middle if len(found) == 1 else f"{middle} ({form.format(min(found))} to {form.format(max(found))})"


def suite(seeds: Sequence[int], target: float) -> list[Comparison]:
    """What METHODOLOGY describes."""
    jobs = ROOT / "benchmarks" / "jobs"
    mnist = partial(Comparison, seeds=seeds, target=target)
    uneven = [
        mnist(
            title=title,
            job=jobs / file,
            names=["exact", "merged", "centralised"],
            clients=[5, 10, 20],
            rounds=10,
            client_processes=5,
        )
        for file, title in (
            ("mnist_sizes.py", "Clients of uneven size: Dirichlet(5.0)"),
            ("mnist_labels.py", "Clients with different labels: Dirichlet(0.5)"),
        )
    ]
    skewed = mnist(
        title="Clients with one or two labels each: Dirichlet(0.1)",
        job=jobs / "mnist_skewed.py",
        names=["exact", "elastic", *baselines.BASELINES],
        clients=[20],
        rounds=10,
        tune=["fedavg", "splitfed-v1", "splitfed-v2", "sl"],
        client_processes=5,
    )
    slow = mnist(
        title=f"One client {SLOWER:g} times slower (simulated)",
        job=jobs / "mnist_slow_client.py",
        names=MODES,
        clients=[20],
        rounds=6,
        every=8,
    )
    return [*uneven, skewed, slow]


def simulate_slowness() -> float:
    """Measure how long 20 equal clients take for a version, and have the slow one of the suite take a multiple."""
    usual = ROOT / "benchmarks" / "jobs" / "mnist.py"
    version_s = 20 / asyncio.run(run_mode(usual, "exact", clients=20, rounds=2)).steps_per_s
    os.environ["SIMULATED_DELAY_S"] = f"{(SLOWER - 1) * version_s:.4f}"
    return version_s


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for, print the tables, keep the figures."""
    args = _parse(argv)
    torch.set_num_threads(1)
    about = circumstances()
    try:
        if args.job is None:
            comparisons, name = suite(args.seeds, args.target), "learning"
            facts = {"version_s": simulate_slowness(), "simulated_delay_s": os.environ["SIMULATED_DELAY_S"]}
        else:
            comparisons, name, facts = [_comparison(args)], f"learning-{args.job.stem.replace('_', '-')}", {}
        path = keep(comparisons, name, about, facts, args.json)
    except zsfl.ZsflError as error:
        print(f"benchmarks/learning.py: {error}", file=sys.stderr)
        return 2
    print(f"kept in {path}, with the plots beside it")
    return 0


def keep(
    comparisons: Sequence[Comparison],
    name: str,
    about: Mapping[str, Any],
    facts: Mapping[str, Any],
    file: Path | None = None,
) -> Path:
    """Run and print them; each is kept as soon as it is done, together with those before it. `file` is --json's."""
    path, pages, runs = path_of(name, about, "json"), list[str](), list[dict[str, Any]]()
    handed: list[Figure] = []
    for number, one in enumerate(comparisons, 1):
        curves = one.run()
        picture = path_of(f"{name}-{number}" if len(comparisons) > 1 else name, about, "png")
        draw(picture, one.title, pictured(curves), MODES, one.target)
        pages.append(one.page(curves, picture.name))
        print(f"\n{pages[-1]}\n", flush=True)
        runs.append({**dataclasses.asdict(one), "job": one.job.name, "curves": list(map(dataclasses.asdict, curves))})
        path = write(name, about, {**facts, "runs": runs}, "\n\n".join(pages))
        handed += figures(one.title, curves)
    hand_over(file, name, about, handed)
    return path


def figures(title: str, curves: Sequence[Curve]) -> list[Figure]:
    """What other programs are told; the seeds are the repetitions."""
    return [
        figure
        for label, runs in grouped(curves).items()
        for figure in (
            Figure(name=f"{title}: {label}", unit="% in the end", values=tuple(100 * run.final for run in runs)),
            Figure(
                name=f"{title}: {label}, speed",
                unit="steps/s",
                values=tuple(run.steps_per_s for run in runs),
                headline=False,
            ),
        )
    ]


def pictured(curves: Sequence[Curve]) -> list[Curve]:
    """Without those that have a better one of the same algorithm beside them."""
    tuned = {curve.name.removesuffix(TUNED) for curve in curves if curve.name.endswith(TUNED)}
    return [curve for curve in curves if curve.name not in tuned]


def _comparison(args: argparse.Namespace) -> Comparison:
    known = [*MODES, *baselines.BASELINES]
    if unknown := [name for name in (*args.compare, *args.tune) if name not in known]:
        raise zsfl.ConfigError(f"cannot compare {', '.join(unknown)}: use some of {', '.join(known)}")
    job = zsfl.load_job(args.job)
    if job.metric is None:
        raise zsfl.ConfigError(f"job {job.name!r} has no metric: there is no accuracy to compare")
    if args.tune and "lr" not in job.optimizer.options:
        raise zsfl.ConfigError(f"--tune tries learning rates, and the optimizer of job {job.name!r} states no lr")
    return Comparison(
        title=job.name,
        job=args.job,
        names=args.compare,
        clients=args.clients or [job.shards],
        rounds=args.rounds or job.rounds,
        seeds=args.seeds,
        target=args.target,
        tune=args.tune,
        every=args.evaluate_every,
        client_processes=args.client_processes,
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("job", nargs="?", type=Path, metavar="JOB", help="job file (default: the scenarios of METHODOLOGY.md)")
    add("--compare", nargs="+", metavar="NAME", help="modes and baselines (default: exact centralised)")
    add("--clients", nargs="+", type=int, metavar="N", help="clients, one or several numbers (default: the job's)")
    add("--rounds", type=int, metavar="N", help="rounds to train (default: the job's)")
    add("--seeds", nargs="+", type=int, default=[0], metavar="S", help="run all once a seed (default: 0)")
    add("--target", type=float, default=0.95, metavar="A", help="accuracy to reach (default: 0.95)")
    add("--tune", nargs="+", default=[], metavar="NAME", help="baselines to run at the rate best for them, too")
    add("--evaluate-every", type=int, metavar="N", help="test modes every N versions too (default: after rounds)")
    add("--client-processes", type=int, metavar="N", help="processes that clients share (default: one each)")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    if args.job is None and (lone := [flag for flag in OF_A_JOB if getattr(args, flag)]):
        parser.error(f"name the job file that {', '.join('--' + flag.replace('_', '-') for flag in lone)} is for")
    args.compare = args.compare or ["exact", "centralised"]
    return args


if __name__ == "__main__":
    sys.exit(main())
