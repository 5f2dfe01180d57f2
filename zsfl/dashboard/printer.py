"""Shows the reports of a run to the person who started it."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

from zsfl.dashboard.progress import REDRAW_S, REPEAT_S, RunView, plain_line, progress_bar, ready_line, render
from zsfl.dashboard.runs import LEDGER
from zsfl.reports import (
    ADVICE,
    AnyReport,
    Exited,
    Failed,
    Finished,
    Following,
    Note,
    Ready,
    RoundReport,
    Waiting,
    WindowReport,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live


TICK_S = 0.5
LOG_REPEAT_S = 600.0


def how_to_go_on(view: RunView, given: Sequence[str]) -> str:
    """What there is to say of a run that was interrupted; `given` are the words that it was started with."""
    if view.finished is not None:
        return ""
    if view.folder is None or not (view.rounds or view.window or _has_versions(view.folder)):
        return ", before anything was trained"
    words = list(given)
    for number, word in reversed(list(enumerate(given))):
        if word in ("--resume", "--no-resume") or word.startswith("--run="):
            del words[number]
        elif word == "--run":
            del words[number : number + 2]
    again = shlex.join(["zsfl", *words, "--run", view.folder.name, "--resume"])
    return f", and {view.folder} is kept; go on with: {again}"


def _has_versions(folder: Path) -> bool:
    """Whether a run on this machine has any."""
    return (folder / LEDGER).is_file() and (folder / LEDGER).stat().st_size > 0


class ProgressPrinter:
    """Shows reports as they come: redrawn in place on a terminal, else one line for each that matters."""

    def __init__(
        self, console: Console | None = None, clock_s: Callable[[], float] = time.monotonic, first: str = ""
    ) -> None:
        """`first`: what is done before any node reports."""
        from rich.console import Console

        self.view = RunView(first)
        self._console = console or Console()
        self._clock_s = clock_s
        self._live: Live | None = None
        self._drawn_s = float("-inf")
        self._told: dict[str, tuple[tuple[str, tuple[str, ...]], float]] = {}
        self._failures: list[Failed] = []
        """Not told yet: where one ends the run, whoever started that tells of it, and once is enough."""

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            from rich.live import Live

            # Redrawn by `on` alone: rich's refresh thread would read the view while it changes.
            self._live = Live(render(self.view), console=self._console, auto_refresh=False)
            self._live.start()
        elif self.view.first:
            self._console.out(self.view.first, highlight=False)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with suppress(SystemExit):  # as in `on`
            self._tell_failures(but=str(error or ""))
        if self.view.failed is not None and self.view.failed.message in str(error or ""):
            self.view.failed = None
        if self._live is not None:
            self._live.update(render(self.view), refresh=True)
            self._live.stop()
            self._live = None
        elif self.view.finished is not None:
            with suppress(SystemExit):  # as in `on`
                self._console.print(render(self.view))

    async def keep_drawing(self) -> None:
        """Draw now and then, also while nobody reports anything, so that it is seen how long that takes."""
        while self._live is not None:
            self.view.tick(self._clock_s())
            self._live.update(render(self.view), refresh=True)
            await asyncio.sleep(TICK_S)

    def on(self, report: AnyReport) -> None:
        """Take one report in and show what it changes."""
        now_s = self._clock_s()
        self.view.on(report, now_s)
        with suppress(SystemExit):  # rich's answer to a closed pipe; a run goes on when nobody watches any more
            self._show(report, now_s)

    def _show(self, report: AnyReport, now_s: float) -> None:
        if self._live is None or (isinstance(report, Note) and report.level == ADVICE):
            self._tell(report, now_s)
        elif not isinstance(report, WindowReport | Following) or now_s - self._drawn_s >= REDRAW_S:
            self._live.update(render(self.view), refresh=True)
            self._drawn_s = now_s

    def _tell_failures(self, but: str = "") -> None:
        """Tell of each mistake once, and not of those that `but` tells of."""
        failures, self._failures = self._failures, []
        told = but
        for failure in failures:
            if failure.message not in told and self._live is None:
                self._console.out(plain_line(failure), highlight=False)
            told += failure.message

    def _tell(self, report: AnyReport, now_s: float) -> None:
        if isinstance(report, Failed):
            self._failures.append(report)
            return
        if isinstance(report, Exited) and any(one.node == report.node for one in self._failures):
            return
        if isinstance(report, WindowReport | RoundReport | Finished):  # the run goes on without those who failed
            self._tell_failures()
        if isinstance(report, Waiting):
            told, told_s = self._told.get(report.node, (None, 0.0))
            news = (report.what, report.hints)
            if told == news and now_s - told_s < REPEAT_S:
                return
            self._told[report.node] = (news, now_s)
        if line := plain_line(report):
            self._console.out(line, highlight=False)


class NodePrinter:
    """What one node reports to the person who started it: a line each, and at a terminal, below, how far the run is.

    In a log, where nobody looks for hours, a wait that goes on is told of again every `LOG_REPEAT_S`.
    """

    def __init__(self, console: Console | None = None, clock_s: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console

        self._view = RunView()
        self._console = console or Console()
        self._clock_s = clock_s
        self._live: Live | None = None
        self._told: tuple[tuple[str, tuple[str, ...]], float] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._draw(None)

    def _is_old_news(self, report: AnyReport, now_s: float) -> bool:
        if not isinstance(report, Waiting) or self._console.is_terminal:
            return False
        news = (report.what, report.hints)
        if self._told is not None and self._told[0] == news and now_s - self._told[1] < LOG_REPEAT_S:
            return True
        self._told = (news, now_s)
        return False

    def on(self, report: AnyReport) -> None:
        """Take one report in and show it."""
        now_s = self._clock_s()
        self._view.on(report, now_s)
        if not self._is_old_news(report, now_s):
            with suppress(SystemExit):  # rich's answer to a closed pipe; a node goes on when nobody watches any more
                self._show(report)

    def _show(self, report: AnyReport) -> None:
        line = ready_line(report) if isinstance(report, Ready) else plain_line(report)
        if line is not None and not isinstance(report, Failed):  # its error is told once, at the end
            self._console.out(line, highlight=False)
        if isinstance(report, WindowReport | Following):
            self._draw(progress_bar(self._view))
        elif isinstance(report, Finished | Failed):
            self._draw(None)

    def _draw(self, what: RenderableType | None) -> None:
        """Redraw the last line; None: away with it."""
        from rich.live import Live

        if not self._console.is_terminal:
            return
        if what is None:
            if self._live is not None:
                self._live.stop()
            self._live = None
        elif self._live is None:
            self._live = Live(what, console=self._console, auto_refresh=False, transient=True)
            self._live.start(refresh=True)
        else:
            self._live.update(what, refresh=True)
