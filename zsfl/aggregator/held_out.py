"""Held-out tests: clients test chosen versions one after another, while training goes on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from zsfl.aggregator.roster import MOST_NAMED, Roster
from zsfl.aggregator.stage import Stage
from zsfl.aggregator.tally import mean_loss, outliers, pooled
from zsfl.errors import RemoteProtocolError
from zsfl.ids import Version
from zsfl.latest import Latest
from zsfl.learning.job import Job
from zsfl.learning.modes import Exact
from zsfl.learning.robust import is_trusting, most_wrong
from zsfl.node import Node
from zsfl.reports import Tested
from zsfl.weights.shelf import Shelf
from zsfl.wire.messages import Evaluated
from zsfl.words import number_of

MAX_WAITING = 4
"""Tests ordered and not over: each holds a version of the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A version to be tested."""

    version: Version
    state: Mapping[str, Tensor]
    round: int
    seconds: float
    """When it was made, since training began."""
    then: Callable[[Tested, Order], Awaitable[None]]
    """What to do with the result."""
    left_out: bool = False
    """There is no time to test it."""


@dataclass(slots=True)
class Best:
    """The best test so far, by accuracy, or by loss where there is none."""

    score: float = -math.inf
    tested: Tested | None = None
    since: int = 0
    """Tests since then, none of which was better."""
    seen: set[int] = field(default_factory=set[int])
    """Versions that were taken: a resumed run may test one again."""

    def take(self, tested: Tested) -> bool:
        """Whether this test is better than all before; one of no samples says nothing."""
        if tested.loss is None or tested.version in self.seen:
            return False
        score = -tested.loss if tested.accuracy is None else tested.accuracy
        self.seen.add(tested.version)
        if score > self.score:
            self.score, self.tested, self.since = score, tested, 0
            return True
        self.since += 1
        return False


ROUNDED = 1 + 1e-5
"""A sum of shares in float32 may be by so much too large."""


class HeldOut:
    """Orders tests of the clients that are there, and pools what they answer."""

    def __init__(self, node: Node, stage: Stage, shelf: Shelf, roster: Latest[Roster], job: Job) -> None:
        """In exact mode training waits for room for more tests; else the oldest that is not begun is left out."""
        self._node = node
        self._job = job
        self._waits = isinstance(job.how, Exact)
        self._trusting = is_trusting(job.average, job.bound)
        self._stage = stage
        self._shelf = shelf
        self._roster = roster
        self._orders: Latest[list[Order]] = Latest([])
        self._answers: dict[int, Evaluated] = {}
        self._silent: frozenset[int] = frozenset()
        """Shards that did not answer the test before: nobody waits for them until they are heard again."""

        self._strange: frozenset[int] = frozenset()
        """Shards whose test was left out at some version: it was said."""

    @property
    def is_full(self) -> bool:
        """Whether so many tests are under way that another one is waited with."""
        return self._waits and len(self._orders.value) >= MAX_WAITING

    async def order(self, order: Order) -> None:
        """Have a version tested, as soon as those ordered before are."""
        if self._waits:
            await self._orders.wait_for(lambda _: not self.is_full)
        else:
            self._make_room()
        self._shelf.pin(order.version)
        self._orders.value.append(order)
        self._orders.touch()

    def _make_room(self) -> None:
        """Leave out the oldest test that is not begun, if there are too many. Results still come in order."""
        orders = self._orders.value
        waiting = [place for place, order in enumerate(orders) if place and not order.left_out]
        if len(waiting) + 1 < MAX_WAITING:
            return
        order = orders[waiting[0]]
        self._node.note(f"tests take longer than training: version {order.version} is not tested", "warning")
        self._shelf.unpin(order.version)
        orders[waiting[0]] = replace(order, state={}, left_out=True)

    async def all_done(self) -> None:
        """Returns when everything that was ordered is tested."""
        await self._orders.wait_for(lambda orders: not orders)

    def heard(self, evaluated: Evaluated) -> None:
        """A client tested a version; what nobody asked for, or any more, or of another's shard, is ignored."""
        roster = self._roster.value
        if roster.node_of(evaluated.shard) != evaluated.node or evaluated.samples > roster.test_samples(
            evaluated.shard
        ):
            return
        if why := self._objection(evaluated):
            raise RemoteProtocolError(f"the held-out test of shard {evaluated.shard} cannot be counted: {why}")
        if (evaluated.correct or 0.0) > evaluated.samples * ROUNDED:
            raise RemoteProtocolError(
                f"{evaluated.correct:g} of {number_of(evaluated.samples, 'held-out sample')} of shard "
                f"{evaluated.shard} cannot be right: Job.metric gives the number of correct samples"
            )
        self._silent -= {evaluated.shard}
        if evaluated.version == self._stage.state.tested and evaluated.shard in self._roster.value.tested():
            self._answers[evaluated.shard] = evaluated
            self._roster.touch()

    def _objection(self, evaluated: Evaluated) -> str:
        if (evaluated.correct is None) != (self._job.metric is None):
            return f"correct samples are {'missing' if evaluated.correct is None else 'given'}, unlike Job.metric"
        return self._job.objection_to(evaluated.weight, evaluated.samples)

    async def run(self) -> None:
        """Carry out orders."""
        while True:
            order = (await self._orders.wait_for(bool))[0]
            if order.left_out:
                await order.then(self._tested(order, {}), order)
            else:
                await order.then(await self._test(order), order)
                self._shelf.unpin(order.version)
            self._orders.value.pop(0)
            self._orders.touch()

    async def _test(self, order: Order) -> Tested:
        self._answers = {}
        self._stage.enter(tested=order.version, evaluation=self._stage.state.evaluation + 1)
        await self._until_answered()
        self._stage.enter(tested=None)
        return self._tested(order, self._answers)

    def _tested(self, order: Order, answers: Mapping[int, Evaluated]) -> Tested:
        strange = outliers(answers, self._trusting)
        if new := strange - self._strange:
            names = ", ".join(self._roster.value.label(shard) for shard in sorted(new)[:MOST_NAMED])
            self._node.note(
                f"the held-out loss of {names} was not finite at version {order.version}, or is no match for that of "
                "the others: such tests are left out; look for bad samples there",
                "warning",
            )
        self._strange |= strange
        usual = {shard: one for shard, one in answers.items() if shard not in strange}
        wrong = most_wrong(self._job.average, self._job.bound, sum(bool(one.samples) for one in usual.values()))
        loss, accuracy = pooled(usual, self._trusting, wrong)
        said = {
            self._roster.value.label(shard): None if shard in strange else one for shard, one in sorted(answers.items())
        }
        return Tested(
            node=self._node.name,
            round=order.round,
            version=order.version,
            seconds=order.seconds,
            loss=loss,
            accuracy=accuracy,
            clients={name: one and _accuracy(one) for name, one in said.items()},
            losses={name: one and mean_loss(one.loss_sum, one.weight) for name, one in said.items()},
            left_out=tuple(self._roster.value.label(shard) for shard in sorted(strange)[:MOST_NAMED]),
            without=self._roster.value.untested(answers) if answers else (),
        )

    async def _until_answered(self) -> None:
        """Wait for everybody who is there, as long as there is always one more answer in time."""
        patience_s = self._node.settings.patience_s
        while late := self._late():
            before = len(self._answers)
            try:
                async with asyncio.timeout(patience_s):
                    await self._roster.wait_for(
                        lambda _, before=before: len(self._answers) > before or not self._late()
                    )
            except TimeoutError:
                names = ", ".join(self._roster.value.label(shard) for shard in sorted(late)[:8])
                what = f"{names} did not test version {self._stage.state.tested} for {patience_s:g} s"
                self._node.note(f"{what}; tests go on without them", "warning")
                self._silent |= late
                return

    def _late(self) -> frozenset[int]:
        """Who is there and waited for."""
        return self._roster.value.tested() - self._answers.keys() - self._silent


def _accuracy(one: Evaluated) -> float | None:
    return None if one.correct is None or not one.samples else one.correct / one.samples
