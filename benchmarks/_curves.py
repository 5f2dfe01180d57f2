"""Runs of learning algorithms, and two plots of them: accuracy by round, accuracy by seconds of training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")
"""Told apart by most colour-blind people (Okabe and Ito, and a grey)."""
DASHES = ((4, 1.5), (1.2, 1.2), (6, 1.5, 1.2, 1.5), (2.5, 2.5))
"""Of baselines, in turn: on and off, in line widths."""
MOST_DOTS = 20
"""A line with more tests than these has no dots."""


@dataclass(frozen=True, slots=True)
class Point:
    """One held-out test."""

    round: float
    """Rounds that were done; of a test inside a round by its share of the versions, as these rarely divide evenly."""
    seconds: float
    """Of training, when the tested weights were made."""
    accuracy: float


@dataclass(slots=True)
class Curve:
    """One run of one algorithm."""

    name: str
    seed: int
    clients: int
    points: list[Point] = field(default_factory=list[Point])
    """All tests, in order."""
    ends: list[float] = field(default_factory=list[float])
    """Accuracy at the end of each round."""
    steps_per_s: float = 0.0
    late: int = 0
    dropped: int = 0
    note: str = ""

    @property
    def final(self) -> float:
        """Accuracy at the end."""
        return self.ends[-1]

    @property
    def drop(self) -> float:
        """By how much accuracy fell at most from the end of one round to that of a later one, from the third on."""
        late = self.ends[2:]
        return max((high - low for i, high in enumerate(late) for low in late[i:]), default=0.0)

    def reached(self, target: float) -> Point | None:
        """The first test that is as good as that."""
        return next((point for point in self.points if point.accuracy >= target), None)


def grouped(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """Runs that differ by nothing but their seed, under a name; it tells the clients where their number varies."""
    varies = len({curve.clients for curve in curves}) > 1
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(f"{curve.name}, {curve.clients} clients" if varies else curve.name, []).append(curve)
    return groups


def draw(path: Path, title: str, curves: Sequence[Curve], solid: Collection[str], target: float) -> None:
    """Write the plots as a PNG; names in `solid` are drawn solid, others dashed. The legend begins with the best.

    Runs of one algorithm share a line style, and a colour too, unless several numbers of clients are compared: these
    are told by colour then.
    """
    # The object interface, since pyplot keeps global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.6), dpi=110, layout="constrained")
    figure.suptitle(title, fontweight="bold")
    by_round, by_time = figure.subplots(1, 2, sharey=True)
    groups = grouped(curves)
    styles = _styles(groups, solid)
    handles: list[tuple[float, str, Any]] = []
    for label, runs in groups.items():
        final = statistics.median(run.final for run in runs)
        for run in runs:
            style = {**styles[label], "marker": "." if len(run.points) <= MOST_DOTS else "", "markersize": 7}
            accuracies = [100 * point.accuracy for point in run.points]
            (line,) = by_round.plot([point.round for point in run.points], accuracies, **style)
            by_time.plot([point.seconds for point in run.points], accuracies, **style)
            if run is runs[0]:
                handles.append((-final, f"{label}  {final:.1%}", line))
    _finish(by_round, "By round", "rounds", target)
    _finish(by_time, "By time of training", "seconds", target)
    _logarithmic(by_time)
    by_round.locator_params(axis="x", integer=True)
    by_round.set_ylabel("accuracy, % of held-out samples")
    lowest = min((100 * point.accuracy for curve in curves for point in curve.points), default=0.0)
    by_round.set_ylim(bottom=5 * math.floor(lowest / 5) - 0.5, top=100.5)
    handles.sort(key=lambda handle: handle[0])
    lines, labels = [line for *_, line in handles], [label for _, label, _ in handles]
    figure.legend(lines, labels, loc="outside right center", frameon=False, title="at the end", handlelength=3.2)
    FigureCanvasAgg(figure).print_figure(path, format="png")


def _styles(groups: dict[str, list[Curve]], solid: Collection[str]) -> dict[str, dict[str, Any]]:
    """How each group is drawn."""
    runs = {label: group[0] for label, group in groups.items()}
    names = list(dict.fromkeys(run.name for run in runs.values()))
    dashed = [name for name in names if name not in solid]
    sizes = list(dict.fromkeys(run.clients for run in runs.values()))
    styles: dict[str, dict[str, Any]] = {}
    for label, run in runs.items():
        number = sizes.index(run.clients) if len(sizes) > 1 else names.index(run.name)
        styles[label] = {
            "color": COLORS[number % len(COLORS)],
            "linewidth": 2.0 if run.name in solid else 1.5,
            "alpha": 1.0 if len(groups[label]) == 1 else 0.6,
        }
        if run.name not in solid:
            # A second turn of the colours comes with the next dashes, so that no two lines look the same.
            turn = dashed.index(run.name) if len(sizes) > 1 else number // len(COLORS) + dashed.index(run.name)
            styles[label]["dashes"] = DASHES[turn % len(DASHES)]
    return styles


def _finish(axes: Axes, title: str, label: str, target: float) -> None:
    axes.axhline(100 * target, color="#7f7f7f", linewidth=0.9, linestyle=":", zorder=1)
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_xlabel(label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _logarithmic(axes: Axes) -> None:
    """Seconds by factors, written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
