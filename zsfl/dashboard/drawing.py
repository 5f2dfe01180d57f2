"""The plots of runs: curves of one, or of several beside one another."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from zsfl.dashboard.runs import Run
from zsfl.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#1f6fb4", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1c2128", "#a59a00")
"""Told apart by the colour-blind, too (Okabe and Ito 2008, yellow made darker); the page has the same."""
TESTS_OF_EACH, TRAINING_OF_EACH = "#1f6fb470", "#d1661a55"
MOST_DRAWN = 16
"""Runs in one plot."""


def natural(name: str) -> list[tuple[str, int]]:
    """For sorting: client-2 before client-10."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", name)]


def curves(runs: Sequence[Run]) -> str:
    """The plot as an SVG element."""
    drawn = io.StringIO()
    _figure(runs).savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    return text[text.index("<svg") :]


def draw_runs(runs: Sequence[Run], path: Path) -> None:
    """Loss and accuracy of several runs by round, time and version, into a file whose ending says its kind."""
    if len(runs) > MOST_DRAWN:
        raise ConfigError(f"{len(runs)} runs are too many for one plot: name up to {MOST_DRAWN}")
    try:
        _figure(runs).savefig(path)
    except OSError as error:
        raise ConfigError(f"cannot draw into {path}: {error.strerror}; name another with --plot") from error
    except ValueError as error:
        raise ConfigError(f"cannot draw into {path}: {error}") from error


def _figure(runs: Sequence[Run]) -> Any:
    # The object interface, since pyplot keeps global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 10), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(3, 2)
    for run, colour in zip(runs, COLOURS * (1 + len(runs) // len(COLOURS)), strict=False):
        rounds, before = run.rounds, f"{run.name}: " if len(runs) > 1 else ""
        across = ([float(one.round) for one in rounds], _times(run), [float(one.version) for one in rounds])
        for (loss, accuracy), at in zip(rows, across, strict=True):
            if not before:
                _draw_each(loss, accuracy, at, run)
            _curve(loss, at, [one.train_loss for one in rounds], f"{before}training", colour, "--")
            _curve(loss, at, [one.loss for one in rounds], f"{before}held out", colour, "-")
            _curve(accuracy, at, _in_percent(one.accuracy for one in rounds), f"{before}held out", colour, "-")
    for axes in (*rows[0], *rows[2]):
        axes.locator_params(axis="x", integer=True)
    for row, across in zip(rows, ("round", "seconds of training", "version"), strict=True):
        for axes, title in zip(row, ("Loss, mean over samples", "Accuracy, % of held-out samples"), strict=True):
            axes.set_title(title, loc="left", fontsize="medium")
            axes.set_xlabel(across)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            if axes.lines:
                axes.legend(frameon=False, fontsize="small", ncols=1 + len(axes.get_legend_handles_labels()[1]) // 5)
            else:
                axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
    return figure


def _draw_each(loss: Axes, accuracy: Axes, at: Sequence[float], run: Run) -> None:
    """Thin lines: how each client fares on its own held-out samples, and in training; of a few, each has its colour."""
    tests = {test.version: test for test in run.tests}
    tested = [tests.get(one.version) for one in run.rounds]
    trained, losses = [one.train_losses for one in run.rounds], [test.losses if test else {} for test in tested]
    right = [test.clients if test else {} for test in tested]
    names = sorted({name for one in (*trained, *losses, *right) for name in one}, key=natural)
    own = dict(zip(names, COLOURS[1:], strict=False)) if len(names) < len(COLOURS) else {}
    for axes, figures, what, colour, dashes, scale in (
        (loss, trained, "training", TRAINING_OF_EACH, "--", 1),
        (loss, losses, "held out", TESTS_OF_EACH, "-", 1),
        (accuracy, right, "held out", TESTS_OF_EACH, "-", 100),
    ):
        label = f"{what}, each client"
        for name in names:
            values = [one.get(name) for one in figures]
            points = [(x, scale * y) for x, y in zip(at, values, strict=True) if y is not None]
            style: dict[str, Any] = {"linewidth": 0.7, "color": own.get(name, colour)}
            if own:
                style["linestyle"], label = dashes, name.replace("$", r"\$") if what == "held out" else "_"
            if points:
                cast("Any", axes).plot(*zip(*points, strict=True), label=label, **style)
                label = "_"  # one line of the legend is enough


def _in_percent(shares: Iterable[float | None]) -> list[float | None]:
    return [None if share is None else 100 * share for share in shares]


def _times(run: Run) -> list[float]:
    seconds, so_far = 0.0, list[float]()
    for one in run.rounds:
        seconds += one.seconds
        so_far.append(seconds)
    return so_far


def _curve(
    axes: Axes, across: Sequence[float], up: Sequence[float | None], label: str, colour: str, style: Literal["-", "--"]
) -> None:
    points = [(x, y) for x, y in zip(across, up, strict=True) if y is not None]
    if points:
        marker = "." if len(points) <= 40 else ""
        style_of: dict[str, Any] = {"linewidth": 1.6, "linestyle": style, "color": colour, "label": label}
        cast("Any", axes).plot(*zip(*points, strict=True), marker=marker, **style_of)
