"""The terminal view of a run: a pure fold of reports, drawn with rich or told line by line."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from zsfl.dashboard.pace import Pace
from zsfl.dashboard.served import Served, Serving
from zsfl.reports import (
    ADVICE,
    AnyReport,
    Assembled,
    Before,
    Exited,
    Failed,
    Finished,
    Following,
    Met,
    Note,
    Ready,
    RoundReport,
    Starting,
    Tested,
    Waiting,
    WindowReport,
)
from zsfl.words import FEWER, fewer, number_of, percent, short_names

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

LIVE_ROUNDS = 8
"""So few that the live view fits into 24 lines; rich cuts off what does not."""
FINAL_ROUNDS = 30
LEFT = (
    ("plot.png", "loss and accuracy by round"),
    ("model.safetensors", "the merged model; load_model.py loads it"),
    ("metrics.jsonl", "every report, a JSON line each"),
    ("ledger.jsonl", "which steps made which weights"),
    ("checkpoint/", "what --resume goes on from"),
)
"""What a finished run leaves in its folder."""
SHOWN_NOTES = 4
RECENT_WINDOWS = 20
"""Window reports over which the live view counts who serves whom."""
REDRAW_S = 0.1
REPEAT_S = 10.0
"""How often the plain form repeats that a node still waits for the same thing."""


class RunView:
    """What the reports of one run add up to; `on` is the only way in."""

    def __init__(self, first: str = "") -> None:
        """`first`: what is done before any node reports."""
        self.first = first
        self.folder: Path | None = None
        """Of the run, once there is one."""
        self.nodes = 0
        """How many are started; 0 while unknown."""
        self.ready: dict[str, str] = {}
        """Node name to role."""
        self.waiting: dict[str, Waiting] = {}
        """What each node waits for, by node name; cleared once the run moves."""
        self.window: WindowReport | None = None
        """The latest of the current round."""
        self.following: Following | None = None
        """What others than the aggregator said last of how far the run is."""
        self.rounds: deque[RoundReport] = deque(maxlen=FINAL_ROUNDS)
        """The last ones."""
        self.notes: deque[tuple[str, bool]] = deque(maxlen=SHOWN_NOTES)
        """Lines, and whether each is a warning; at the end only those are left."""
        self.finished: Finished | None = None
        self.failed: Failed | None = None
        """The first with these words: a mistake in the job is one that every node finds."""
        self.ended_by_failure: set[str] = set()
        """Nodes that said why they ended."""
        self._served = Served()
        self._recent: deque[Serving] = deque(maxlen=RECENT_WINDOWS)
        self._pace = Pace()
        self._now_s = 0.0
        self._begun_s: float | None = None

    def on(self, report: AnyReport, now_s: float) -> None:
        """Take one report in; `now_s` is monotonic."""
        self.tick(now_s)
        match report:
            case Starting():
                self.nodes = report.nodes
            case Following():
                self.following = report
                self._pace.see(self.done, now_s)
            case Ready():
                self.ready[report.node] = report.role
                self.waiting.pop(report.node, None)
            case Waiting():
                self.waiting[report.node] = report
            case WindowReport():
                self.window = report
                self._recent.append({client: {server: 1} for client, server in report.serving.items()})
                self._moved()
            case RoundReport():
                self.rounds.append(report)
                self._served.add(report.round, report.serving)
                if self.window is not None and self.window.round <= report.round:  # it was tested while others ran
                    self.window = None
                self._moved()
            case Before():
                for one in report.reports:
                    if isinstance(one, RoundReport):
                        self._served.add(one.round, one.serving)
            case Finished():
                self.finished = report
                self.waiting.clear()
                self.notes = deque((note for note in self.notes if note[1]), maxlen=SHOWN_NOTES)
            case Failed():
                self.ended_by_failure.add(report.node)
                if self.failed is None or report.message not in self.failed.message:
                    self.failed = report
            case Exited() if report.node in self.ended_by_failure:
                self.ended_by_failure.discard(report.node)  # it may be started again
            case Note(level=level) if level == ADVICE:
                pass  # a line of its own, above
            case Assembled() | Met() | Note() | Tested() | Exited():
                if isinstance(report, Assembled):
                    self.waiting.clear()
                    self.folder = Path(report.folder) if report.folder else None
                if line := plain_line(report):
                    warns = isinstance(report, Exited) or (isinstance(report, Note) and report.level != "info")
                    self.notes.append((line, warns))

    def tick(self, now_s: float) -> None:
        """So late it is."""
        self._now_s = now_s
        self._begun_s = now_s if self._begun_s is None else self._begun_s

    @property
    def seconds(self) -> float:
        """How long it has been looked at."""
        return self._now_s - (self._now_s if self._begun_s is None else self._begun_s)

    def _moved(self) -> None:
        self.waiting.clear()
        self._pace.see(self.done, self._now_s)

    @property
    def done(self) -> float:
        """Rounds trained so far, the current one as a fraction."""
        now = self.window or (None if self.rounds else self.following)
        if now is not None:  # in async mode windows count on for ever
            return now.round - 1 + (now.window / now.windows if 0 < now.window <= now.windows else 0.0)
        return float(self.rounds[-1].round) if self.rounds else 0.0

    @property
    def total(self) -> int:
        """Rounds to train; 0 while unknown."""
        latest = self.window or (self.rounds[-1] if self.rounds else self.following)
        return latest.rounds if latest else 0

    @property
    def left_s(self) -> float | None:
        """Seconds to go at the pace seen of late; None while there is none."""
        return self._pace.left_s(self.total, self._now_s)

    @property
    def serving(self) -> Serving:
        """Who serves whom: over the last windows while training, over all rounds when it is over."""
        steps: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for serving in self._recent if self._is_live else self._served.all:
            for client, servers in serving.items():
                steps[client].update(servers)
        return steps

    @property
    def served(self) -> str:
        """When that was."""
        if self._is_live or self._served.rounds is None:
            return "lately"
        first, last = self._served.rounds
        return f"round {last}" if first == last else f"rounds {first}-{last}"

    @property
    def _is_live(self) -> bool:
        return self.finished is None and bool(self._recent)


def server_shares(serving: Serving) -> list[tuple[str, float, str]]:
    """Of each split server: name, share of all steps (0..1), and of which clients it serves how much."""
    total = sum(sum(servers.values()) for servers in serving.values())
    rows: list[tuple[str, float, str]] = []
    for server in sorted({server for servers in serving.values() for server in servers}):
        steps = sum(servers.get(server, 0) for servers in serving.values())
        by_tenths: defaultdict[int, list[str]] = defaultdict(list)
        for client, servers in serving.items():
            if servers.get(server):
                by_tenths[max(1, round(10 * servers[server] / sum(servers.values())))].append(client)
        clients = "; ".join(
            ("" if tenths == 10 else f"{tenths * 10}% of ") + short_names(names)
            for tenths, names in sorted(by_tenths.items(), reverse=True)
        )
        rows.append((server, steps / max(total, 1), clients))
    return rows


def ready_line(report: Ready) -> str:
    """The first line of a node, for the person who started it."""
    how = f"encrypted, as machine {report.machine}" if report.machine else "without keys: nothing is encrypted"
    return f"{report.node} is ready at {report.address}, {how}"


def plain_line(report: AnyReport) -> str | None:
    """One report as one line of text; None for those that come too often or say nothing to a reader."""
    match report:
        case Met() if not report.here and report.role != "observer":
            called = f"{report.known_as}, " if report.known_as else ""
            return f"{report.node}: {report.peer} joined from {report.address}, on {called}machine {report.machine}"
        case Waiting():
            hints = "".join(f"\n    check: {hint}" for hint in report.hints)
            return f"{report.node} waits for {report.what} ({report.seconds:.0f} s){hints}"
        case Assembled():
            servers = number_of(report.split_servers, "split server")
            return f"assembled: {number_of(report.clients, 'client')}, {servers}"
        case RoundReport():
            return (
                f"round {report.round}/{report.rounds}: train loss {report.train_loss:.4f}, "
                f"test loss {_number(report.loss)}, test accuracy {percent(report.accuracy, report.without)}, "
                f"{report.steps_per_s:,.0f} steps/s, {report.bytes_sent / 1e6:,.1f} MB sent, served by "
                + ", ".join(f"{server} {share:.0%}" for server, share, _ in server_shares(report.serving))
                + (f"; {fewer(report.without)}" if report.without else "")
            )
        case Tested() if not report.ends_round:
            return (
                f"version {report.version}, in round {report.round + 1}: test loss {_number(report.loss)}, "
                f"test accuracy {percent(report.accuracy, report.without)}"
                + (f"; {fewer(report.without)}" if report.without else "")
            )
        case Note():
            return f"{report.node}: {report.message}" if report.node else report.message
        case Exited(code=code) if code:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return f"{report.node} {how}"
        case Finished():
            early = ", ended early since its tests got no better" if report.early else ""
            best = (
                f" (best {percent(report.best_accuracy, report.best_without)} at version {report.best_version})"
                if _was_better(report)
                else ""
            )
            absent = _absent(report)
            return (
                f"finished: {number_of(report.rounds, 'round')} in {report.seconds:.1f} s{early}, "
                f"test accuracy {percent(report.accuracy, report.without)}{best}, test loss {_number(report.loss)}; "
                + (f"{fewer(absent)}; " if absent else "")
                + f"see {report.folder}"
            )
        case Failed():
            return f"{report.node} failed: {report.message} ({report.kind})"
        case Ready() | Met() | Starting() | Following() | WindowReport() | Tested() | Before() | Exited():
            return None


def _was_better(finished: Finished) -> bool:
    """Whether an earlier version was better than the last one."""
    best, last = finished.best_accuracy, finished.accuracy
    return best is not None and last is not None and best > last


def _absent(finished: Finished) -> set[str]:
    """Whose samples are not in all of its figures that are shown."""
    return {*finished.without, *(finished.best_without if _was_better(finished) else ())}


def render(view: RunView) -> RenderableType:
    """The whole view for a terminal of 80 columns or more."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    if not view.total and (view.ready or view.first):
        parts.append(Text(_starting(view) + f" ({view.seconds:.0f} s)" * (view.seconds >= 1), style="dim"))
    for waiting in view.waiting.values():
        parts.append(Text(plain_line(waiting) or "", style="yellow"))
    if view.rounds:
        shown = LIVE_ROUNDS if view.finished is None else FINAL_ROUNDS
        parts += [_rounds_table(list(view.rounds)[-shown:]), Text()]
    if view.serving:
        parts += [_serving_table(view), Text()]
    if view.total and view.finished is None:
        parts.append(progress_bar(view))
    parts += [Text(note, style="yellow" if warns else "dim") for note, warns in view.notes]
    if view.finished is not None:
        parts += [_result_table(view.finished)]
    if view.failed is not None:
        parts.append(Text(plain_line(view.failed) or "", style="bold red"))
    return Group(*parts)


def _starting(view: RunView) -> str:
    """What goes on until the first version is there."""
    if not view.ready:
        return view.first
    if view.folder is not None:
        return "the first steps are made"
    return "ready" + f", {len(view.ready)} of {view.nodes} nodes" * bool(view.nodes) + f": {short_names(view.ready)}"


def _rounds_table(rounds: Collection[RoundReport]) -> Table:
    absent = [f"{FEWER} without"] if any(report.without for report in rounds) else []
    table = _table("round", "train loss", "test loss", "test accuracy", "steps/s", "MB sent", *absent)
    for column in table.columns:
        column.justify = "right"
    for report in rounds:
        table.add_row(
            f"{report.round}/{report.rounds}",
            f"{report.train_loss:.4f}",
            _number(report.loss),
            percent(report.accuracy, report.without),
            f"{report.steps_per_s:,.0f}",
            f"{report.bytes_sent / 1e6:,.1f}",
            *([short_names(report.without)] if absent else []),
        )
    return table


def _serving_table(view: RunView) -> Table:
    from rich.text import Text

    table = _table("split server", f"share, {view.served}", "serves")
    for server, share, clients in server_shares(view.serving):
        table.add_row(Text(server), f"{share:.0%}", Text(clients))
    return table


def _result_table(finished: Finished) -> Table:
    from rich.text import Text

    table = _table("result", "")
    early = ", ended early" if finished.early else ""
    table.add_row("rounds", f"{finished.rounds} in {finished.seconds:.1f} s (version {finished.version}){early}")
    table.add_row("test accuracy", Text(percent(finished.accuracy, finished.without), style="bold green"))
    if _was_better(finished):
        best = percent(finished.best_accuracy, finished.best_without)
        table.add_row("best", f"{best} at version {finished.best_version}: best.safetensors")
    if absent := _absent(finished):
        table.add_row("", fewer(absent))
    table.add_row("test loss", _number(finished.loss))
    table.add_row("left in", Text(f"{finished.folder}/", style="bold", overflow="fold"))
    for name, what in LEFT:
        table.add_row("", Text.assemble(f"{name:18}", (what, "dim")))
    return table


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(*columns, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")


def progress_bar(view: RunView) -> Table:
    """How far the run is, and how long it goes on."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    cells: list[RenderableType] = [
        ProgressBar(total=view.total, completed=view.done, width=24),
        f"round {max(1, math.ceil(view.done))}/{view.total}",
    ]
    if view.window is not None:
        cells += [f"loss {view.window.loss:.4f}", f"{view.window.steps_per_s:,.0f} steps/s"]
    if view.done >= view.total:
        cells.append("last test and plot")
    elif view.left_s is not None:
        cells.append(f"{_clock(view.left_s)} left")
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_row(*cells)
    return grid


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
