"""What the lines of a run's metrics.jsonl add up to: a pure fold of reports, thinned so that it stays small."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec

from zsfl.dashboard.step_time import step_time
from zsfl.reports import AnyReport, Before, Failed, Finished, RoundReport, Tested, WindowReport

MAX_ROUNDS = 2000
"""Of more rounds every second one is left out, again and again."""
MAX_CELLS = 200_000
"""The same, and for tests, by how many numbers of single clients they have."""
DETAILED = 100
"""The newest rounds, of which it is kept who served whom."""
OTHERS = "aggregator and others"
_Row = TypeVar("_Row")
_generations = itertools.count()
"""No two histories share one."""


class RoundRow(msgspec.Struct, frozen=True, kw_only=True):
    """One round, as `RoundReport` has it."""

    round: int
    rounds: int
    version: int
    train_loss: float
    train_losses: dict[str, float | None]
    loss: float | None
    accuracy: float | None
    steps: int
    steps_per_s: float
    seconds: float
    end_s: float
    """Seconds of training until it ended."""
    bytes_sent: int
    late: int
    dropped: int
    staleness: float
    without: tuple[str, ...]
    sent: dict[str, float]
    """Bytes sent by clients, split servers, and all others."""
    step_time: dict[str, float]
    """Where the time of a step goes, in seconds, see `zsfl.dashboard.step_time`."""
    serving: dict[str, dict[str, int]]
    """Client name to split-server name to steps; empty for rounds that are not among the newest."""


class TestRow(msgspec.Struct, frozen=True, kw_only=True):
    """One held-out test, as `Tested` has it."""

    __test__ = False

    round: int
    version: int
    loss: float | None
    accuracy: float | None
    clients: dict[str, float | None]
    losses: dict[str, float | None]
    at_s: float
    """Seconds of training until the version was made."""
    ends_round: bool


class Mark(msgspec.Struct, frozen=True):
    """How much of a history somebody has."""

    generation: int
    rounds: int
    tests: int


class Rows(msgspec.Struct, frozen=True, kw_only=True):
    """A history, or what was added to one."""

    rounds: Sequence[RoundRow]
    tests: Sequence[TestRow]


class History:
    """Takes in the reports of one run, in their order."""

    def __init__(self) -> None:
        self.rounds: list[RoundRow] = []
        self.tests: list[TestRow] = []
        self.window: WindowReport | None = None
        """The newest progress inside a round."""
        self.end: Finished | Failed | None = None
        """How it ended, where nothing came after."""
        self.unread = 0
        """Lines that could not be read: JSON has no infinity, so a run that diverged leaves some."""
        self._generation = next(_generations)
        self._began_s = 0.0
        """Seconds of training before the present aggregator process began."""
        self._told_s = 0.0

    @property
    def mark(self) -> Mark:
        """How much there is."""
        return Mark(self._generation, len(self.rounds), len(self.tests))

    def since(self, mark: Mark) -> Rows | None:
        """What was added since; None where that does not say it all."""
        if mark.generation != self._generation:
            return None
        return Rows(rounds=self.rounds[mark.rounds :], tests=self.tests[mark.tests :])

    def whole(self) -> Rows:
        """All of it."""
        return Rows(rounds=list(self.rounds), tests=list(self.tests))

    def begin_again(self) -> None:
        """The lines are others than they were."""
        self.rounds.clear()
        self.tests.clear()
        self.window = self.end = None
        self.unread, self._began_s, self._told_s = 0, 0.0, 0.0
        self._change()

    def _change(self) -> None:
        """Not only added to: whoever has some of it needs all of it."""
        self._generation = next(_generations)

    def on(self, report: AnyReport) -> None:
        """One more line."""
        match report:
            case WindowReport():
                self.window, self.end = report, None
            case Finished() | Failed():
                self.end = report
            case RoundReport():
                self._take_round(report)
            case Tested():
                self._take_test(report)
            case Before():
                for one in report.reports:
                    self.on(one)
            case _:
                pass

    def _take_round(self, report: RoundReport) -> None:
        while self.rounds and self.rounds[-1].round >= report.round:  # a resume made it again
            self.rounds.pop()
            self._change()
        self.rounds.append(self._row(report))
        if len(self.rounds) > DETAILED:
            old = self.rounds[-DETAILED - 1]
            self.rounds[-DETAILED - 1] = msgspec.structs.replace(old, serving={})
        if len(self.rounds) > MAX_ROUNDS or len(self.rounds) * len(report.train_losses) > MAX_CELLS:
            self.rounds = _thinned(self.rounds)
            self._change()

    def _row(self, report: RoundReport) -> RoundRow:
        before_s = self.rounds[-1].end_s if self.rounds else 0.0
        tested = next((test for test in reversed(self.tests) if test.version == report.version), None)
        names = ("round", "rounds", "version", "train_loss", "train_losses", "loss", "accuracy", "steps", "steps_per_s")
        return RoundRow(
            **{name: getattr(report, name) for name in names},
            seconds=report.seconds,
            end_s=max(before_s, tested.at_s if tested else before_s + report.seconds),
            bytes_sent=report.bytes_sent,
            late=report.late,
            dropped=report.dropped,
            staleness=report.staleness,
            without=report.without,
            sent=_sent(report),
            step_time=step_time(report.peers),
            serving=report.serving,
        )

    def _take_test(self, report: Tested) -> None:
        if report.seconds < self._told_s:  # another process aggregates
            self._began_s = max([0.0, *(row.end_s for row in self.rounds[-1:]), *(row.at_s for row in self.tests[-1:])])
        self._told_s = report.seconds
        while self.tests and self.tests[-1].version >= report.version:  # a resume made it again
            self.tests.pop()
            self._change()
        row = TestRow(
            round=report.round,
            version=report.version,
            loss=report.loss,
            accuracy=report.accuracy,
            clients=report.clients,
            losses=report.losses,
            at_s=self._began_s + report.seconds,
            ends_round=report.ends_round,
        )
        self.tests.append(row)
        cells = len(row.clients) + len(row.losses)
        if len(self.tests) * cells > MAX_CELLS or len(self.tests) > 2 * MAX_ROUNDS:
            self.tests = _thinned(self.tests)
            self._change()


def _thinned(rows: list[_Row]) -> list[_Row]:
    """Every second one, the first and the last included."""
    return [*rows[:-1:2], rows[-1]]


def _sent(report: RoundReport) -> dict[str, float]:
    """Who sent how much; whose role cannot be seen from who served whom is one of the others."""
    clients: Mapping[str, object] = report.serving
    servers = {server for served in report.serving.values() for server in served}
    sums: defaultdict[str, float] = defaultdict(float)
    for name, counters in report.peers.items():
        role = "clients" if name in clients else "split servers" if name in servers else OTHERS
        sums[role] += counters.get("bytes_sent", 0.0)
    return dict(sums)
