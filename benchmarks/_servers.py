"""A run to which split servers are added, each with a simulated accelerator; its tables and its plot."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from _cluster import end, train_on
from _figures import Figure
from _jobs import JOBS
from _record import in_short, table

import zsfl

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERVERS = (1, 2, 4, 8)
ACCELERATOR_CLIENTS, ACCELERATOR_PROCESSES = 48, 2
SETTLE_S, SERVED_S = 1.2, 1.6
LEAST_SPEEDUP, MOST_RAISE_S = 7.5, 2.0
RAISED = 0.8
"""Of the way from the throughput before to that after: from there on a server counts as being of use."""
MOMENT_S = 0.5
"""Throughput at a moment is that of so long before it."""


@dataclass(slots=True, kw_only=True)
class Servers:
    """One run in which split servers were added one after another."""

    done: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    """Seconds since the run began, and steps counted by then, at the end of each round."""
    steps_per_s: dict[int, float] = field(default_factory=dict[int, float])
    """By number of servers, once settled."""
    added: list[tuple[float, float, int]] = field(default_factory=list[tuple[float, float, int]])
    """When more were asked for, when the last of them was ready, and how many there were then."""

    def steps_at(self, now_s: float) -> float:
        """Steps counted by then, between two rounds in proportion."""
        before = (0.0, 0)
        for after in self.done:
            if after[0] >= now_s:
                return before[1] + (after[1] - before[1]) * (now_s - before[0]) / (after[0] - before[0])
            before = after
        return before[1]

    def rate(self, begun_s: float, ended_s: float) -> float:
        """Steps a second meanwhile."""
        return (self.steps_at(ended_s) - self.steps_at(begun_s)) / (ended_s - begun_s)

    def raised_s(self, number: int) -> float | None:
        """From when the `number`-th addition was ready until throughput was most of the way up; None: never."""
        _, ready_s, servers = self.added[number]
        smaller = [count for count in self.steps_per_s if count < servers]
        low, high = self.steps_per_s[max(smaller)], self.steps_per_s[servers]
        wanted = low + RAISED * (high - low)
        for hundredth in range(1, 1000):
            now_s = ready_s + hundredth / 100
            if self.rate(now_s, now_s + MOMENT_S) >= wanted:
                return hundredth / 100
        return None


async def servers() -> Servers:
    """One cluster that begins with one split server and ends with eight."""
    found = Servers()
    with tempfile.TemporaryDirectory(prefix="zsfl-bench-") as runs:
        cluster = zsfl.LocalCluster(
            JOBS / "simulated_accelerator.py",
            clients=ACCELERATOR_CLIENTS,
            split_servers=SERVERS[0],
            client_processes=ACCELERATOR_PROCESSES,
            runs=runs,
        )
        async with cluster:
            begun_s = time.monotonic()

            def heard(report: zsfl.RoundReport) -> None:
                before = found.done[-1][1] if found.done else 0
                found.done.append((time.monotonic() - begun_s, before + report.steps))

            training = asyncio.create_task(train_on(cluster, heard))
            have, windows = SERVERS[0], dict[int, tuple[float, float]]()
            for wanted in SERVERS:
                asked_s = time.monotonic() - begun_s
                if wanted > have:
                    for _ in range(wanted - have):
                        await cluster.start_split_server()
                    found.added.append((asked_s, time.monotonic() - begun_s, wanted))
                    have = wanted
                await asyncio.sleep(SETTLE_S)
                from_s = time.monotonic() - begun_s
                await asyncio.sleep(SERVED_S)
                windows[wanted] = from_s, time.monotonic() - begun_s
            await asyncio.sleep(MOMENT_S)
            await end(training)
    found.steps_per_s = {count: found.rate(*window) for count, window in windows.items()}
    return found


def servers_words(runs: Sequence[Servers]) -> str:
    raises = [run.raised_s(0) for run in runs]
    late = sum(taken is None for taken in raises)
    found = in_short([taken for taken in raises if taken is not None], "{:.2f}") if late < len(raises) else "never"
    starts = in_short([run.added[0][1] - run.added[0][0] for run in runs], "{:.2f}")
    return (
        f"A step of 64 samples holds a SIMULATED accelerator for 20 ms; {ACCELERATOR_CLIENTS} clients in "
        f"{ACCELERATOR_PROCESSES} processes, async mode. One run adds servers while it trains. Aims: 8 servers at "
        f"least {LEAST_SPEEDUP:g} times one; a second server of use within {MOST_RAISE_S:g} s. It was ready {starts} s "
        f"after it was asked for, and {found} s later throughput was {RAISED:.0%} of the way up"
        f"{f' ({late} of {len(raises)} runs: not)' if 0 < late < len(raises) else ''}."
    )


def servers_table(runs: Sequence[Servers]) -> str:
    rows = [
        [
            str(count),
            in_short([run.steps_per_s[count] for run in runs], "{:.1f}"),
            in_short([run.steps_per_s[count] / run.steps_per_s[SERVERS[0]] for run in runs], "{:.2f}"),
            f"{statistics.median([run.steps_per_s[count] for run in runs]) / (count / 0.02):.0%}",
        ]
        for count in SERVERS
    ]
    return table(["split servers", "steps/s", "times one server", "of what their accelerators can"], rows)


def servers_figures(runs: Sequence[Servers]) -> list[Figure]:
    """What other programs are told."""
    times = tuple(run.steps_per_s[SERVERS[-1]] / run.steps_per_s[SERVERS[0]] for run in runs)
    name = f"{SERVERS[-1]} split servers over one (simulated accelerators)"
    handed = [Figure(name=name, unit="times", values=times, target=LEAST_SPEEDUP)]
    if raises := tuple(taken for run in runs if (taken := run.raised_s(0)) is not None):
        name = "until a second split server is of use"
        handed.append(Figure(name=name, unit="s", values=raises, better="lower", target=MOST_RAISE_S))
    return handed


def draw(path: Path, runs: Sequence[Servers]) -> None:
    """Throughput over time while servers are added, each run a line."""
    # The object interface, since pyplot keeps global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), dpi=110, layout="constrained")
    axes: Axes = figure.subplots()
    for run in runs:
        last_s = run.done[-1][0] if run.done else 0.0
        moments = [tenth / 10 for tenth in range(round(10 * MOMENT_S), round(10 * last_s))]
        rates = [run.rate(now_s - MOMENT_S, now_s) for now_s in moments]
        (line,) = axes.plot(moments, rates, color="#0072b2", linewidth=1.2, alpha=0.6)
        line.set_label("steps/s" if run is runs[0] else "")
        for _, ready_s, _ in run.added:
            axes.axvline(ready_s, color="#7f7f7f", linewidth=0.7, linestyle=":", zorder=1)
    for count in SERVERS:
        axes.axhline(count / 0.02, color="#d55e00", linewidth=0.7, linestyle="--", zorder=1)
        axes.annotate(
            f"{count}", (1.005, count / 0.02), xycoords=("axes fraction", "data"), va="center", color="#d55e00"
        )
    axes.set_title("Split servers added to a run; dashed: what 1, 2, 4, 8 simulated accelerators can", loc="left")
    axes.set_xlabel("seconds; dotted: more servers are ready")
    axes.set_ylabel(f"steps/s over the last {MOMENT_S:g} s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_figure(path, format="png")
