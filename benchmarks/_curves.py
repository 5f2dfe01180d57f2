"""Two plots of many runs: accuracy by round, accuracy by seconds of training."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000", "#8c564b", "#bcbd22")
"""The first seven are told apart by most colour-blind people (Okabe and Ito)."""


@dataclass(frozen=True, slots=True)
class Point:
    """One held-out test."""

    round: float
    """Rounds that were done, as far as tests inside a round know: it counts versions."""
    seconds: float
    accuracy: float


@dataclass(slots=True)
class Curve:
    """One run of one algorithm."""

    name: str
    seed: int
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
        """By how much accuracy fell at most from one round to a later one, after the third."""
        late = self.ends[2:]
        return max((high - low for i, high in enumerate(late) for low in late[i:]), default=0.0)

    def reached(self, target: float) -> Point | None:
        """The first test that is as good as that."""
        return next((point for point in self.points if point.accuracy >= target), None)


def draw(path: Path, title: str, curves: Sequence[Curve], solid: Collection[str]) -> None:
    """Write the plots as a PNG; names in `solid` are drawn solid, others dashed. Runs of one name share a colour."""
    # The object interface, since pyplot keeps global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(curve.name for curve in curves))
    figure = Figure(figsize=(11, 4.6), dpi=120, layout="constrained")
    figure.suptitle(title, fontweight="bold")
    by_round, by_time = figure.subplots(1, 2, sharey=True)
    for curve in curves:
        number = names.index(curve.name)
        is_first = curve is next(one for one in curves if one.name == curve.name)
        style = {
            "color": COLORS[number % len(COLORS)],
            "linestyle": "-" if curve.name in solid else "--",
            "linewidth": 2.0 if curve.name in solid else 1.4,
            "label": curve.name if is_first else "_again",
        }
        accuracies = [100 * point.accuracy for point in curve.points]
        by_round.plot([point.round for point in curve.points], accuracies, **style)
        by_time.plot([point.seconds for point in curve.points], accuracies, **style)
    _finish(by_round, "By round", "rounds")
    _finish(by_time, "By time of training", "seconds")
    by_time.set_xscale("log")
    by_round.set_ylabel("accuracy, % of held-out samples")
    by_round.set_ylim(top=100.5)
    figure.legend(*by_round.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    FigureCanvasAgg(figure).print_figure(path, format="png")


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_xlabel(label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
