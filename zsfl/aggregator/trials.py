"""Which versions are tested on held-out data, and what becomes of the result: the best one, the end of training."""

from __future__ import annotations

import math
import time

import msgspec
from torch import Tensor

from zsfl.aggregator.held_out import Best, HeldOut, Order
from zsfl.aggregator.progress import Progress
from zsfl.aggregator.replay import Recovered
from zsfl.aggregator.run_folder import RunFolder
from zsfl.aggregator.training import Training
from zsfl.errors import RunFailed
from zsfl.ids import Version
from zsfl.learning.job import Job
from zsfl.learning.modes import Exact
from zsfl.node import Node
from zsfl.reports import Before, Finished, RoundReport, Tested
from zsfl.words import number_of

MOST_SHOWN = 8
"""Clients named in an error."""
TOLD_AT_ONCE = 4096
"""Of what was before, figures of so many shards: each takes some hundred bytes of a line, which has its bound."""


class Trials:
    """Has versions tested, keeps the best, and says when no later one is worth training for."""

    def __init__(
        self, node: Node, job: Job, folder: RunFolder, progress: Progress, training: Training, held_out: HeldOut
    ) -> None:
        self._node = node
        self._job = job
        self._folder = folder
        self._progress = progress
        self._training = training
        self._held_out = held_out
        self._begun_s = 0.0
        self._untested: list[tuple[RoundReport | None, Version, dict[str, Tensor]]] = []
        """Versions that were to be tested when the run ended that is resumed, with the report of the round they end."""
        self._before: list[RoundReport | Tested] = []
        """What that run has left."""
        self.best = Best()
        self.last: RoundReport | None = None
        """Of the newest round that was tested."""

    def resume(self, at: Recovered, round_: int) -> list[tuple[Version, dict[str, Tensor]]]:
        """Go on at this point after the checkpoint of a round; versions that are tested yet, to be put on the shelf."""
        done: dict[int, RoundReport] = {}
        for one in self._folder.reports():
            if isinstance(one, Tested) and one.version <= at.version:  # what was tested of later ones is lost with them
                self.best.take(one)
                self._before.append(one)
            elif isinstance(one, RoundReport) and one.round <= at.round:
                done[one.round] = one
                self._before.append(one)
        self.last = done[max(done)] if done else None
        left = self._progress.untested(done.keys(), round_)
        self._untested += left
        if at.windows and self._job.tests(at.version) and at.version not in self.best.seen:
            self._untested.append((None, *self._training.newest))
        return [(version, state) for _, version, state in left]

    async def begin(self) -> None:
        """Training begins: tell what was before, and have tested what an earlier process did not come to."""
        self._begun_s = time.monotonic()
        at_once = max(1, TOLD_AT_ONCE // self._job.shards)
        for first in range(0, len(self._before), at_once):
            some = self._before[first : first + at_once]
            self._node.report(Before(node=self._node.name, reports=tuple(some)))
        self._before.clear()
        for report, version, state in self._untested:
            await self.order(report, version, state)

    @property
    def is_enough(self) -> bool:
        """Whether tests have not got better for so long that training ends."""
        return self._job.stop_after is not None and self.best.since >= self._job.stop_after

    @property
    def may_take_long(self) -> bool:
        """Whether ordering a test waits for others that are under way."""
        return self._may_end or self._held_out.is_full

    @property
    def _may_end(self) -> bool:
        """Whether training may end with the next test, and where it does must not depend on who was quicker."""
        return self._job.stop_after is not None and isinstance(self._job.how, Exact)

    async def made(self, version: Version) -> bool:
        """A version inside a round is there: have it tested, if the job wants that. Whether training ends here."""
        if self._job.tests(version):
            await self.order(None, *self._training.newest)
        return self.is_enough

    async def order(
        self, report: RoundReport | None, version: Version, state: dict[str, Tensor], made_s: float | None = None
    ) -> None:
        """Have a version tested that was made at `made_s`, or now; with it, `report` of the round it ends is whole."""

        async def keep(tested: Tested, order: Order) -> None:
            await self._tested(tested, order, report)

        seconds = (time.monotonic() if made_s is None else made_s) - self._begun_s
        round_ = self._training.round if report is None else report.round
        await self._held_out.order(Order(version=version, state=state, round=round_, seconds=seconds, then=keep))
        if self._may_end:
            await self._held_out.all_done()

    def finished(self, rounds: int, seconds: float) -> Finished:
        """How the run ended, which was to have so many rounds."""
        best, last, done = self.best.tested, self.last, self._training.round
        return Finished(
            node=self._node.name,
            rounds=done,
            version=self._training.version,
            accuracy=last.accuracy if last else None,
            loss=last.loss if last else None,
            seconds=seconds,
            folder=str(self._folder.path),
            best_accuracy=best.accuracy if best else None,
            best_version=best.version if best else None,
            early=done < rounds,
            without=last.without if last else (),
            best_without=best.without if best else (),
        )

    async def _tested(self, tested: Tested, order: Order, report: RoundReport | None) -> None:
        if tested.loss is not None and not math.isfinite(tested.loss):
            self._training.newest = self._training.proven
            raise RunFailed(
                f"the held-out loss became {tested.loss} after round {order.round} (version {order.version}), "
                f"{_by_whom(tested)}: lower the learning rate, or look for bad samples; "
                "with Job.norm_bound or Job.average no client's held-out loss ends a run"
            )
        is_best = tested.loss is not None and self.best.take(tested)
        tested = msgspec.structs.replace(tested, ends_round=report is not None)
        whole = report and whole_of(report, tested)

        # One by one, so that a disk which refuses one of them gets no other twice.
        if is_best:
            await self._node.persistently(lambda: self._progress.keep_best(order.state))
        await self._node.persistently(lambda: self._folder.append_metrics(tested))
        if whole is not None:
            await self._node.persistently(lambda: self._folder.append_metrics(whole))
            if not order.left_out:
                room_bytes = self._node.settings.keep_mib << 20
                await self._node.persistently(lambda: self._progress.keep_from(whole.round, room_bytes))
        self._node.report(tested)
        if whole is not None:
            self.last = whole
            self._node.report(whole)


def _by_whom(tested: Tested) -> str:
    """Whose samples make the loss no number."""
    whose = [name for name, loss in tested.losses.items() if loss is None]
    if not whose or len(whose) == len(tested.losses) > 1:
        return f"on the samples of all {number_of(len(tested.losses), 'shard')} together"
    others = f" and {len(whose) - MOST_SHOWN} others" if len(whose) > MOST_SHOWN else ""
    return f"on the samples of {', '.join(whose[:MOST_SHOWN])}{others}"


def whole_of(report: RoundReport, tested: Tested) -> RoundReport:
    """The report of a round with what its test gave."""
    without = tuple(dict.fromkeys((*report.without, *tested.without)))
    return msgspec.structs.replace(report, loss=tested.loss, accuracy=tested.accuracy, without=without)
