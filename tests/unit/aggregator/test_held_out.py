"""Versions are tested one after another by whoever is there, and the best one is known."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from helpers.waiting import eventually, until

from zsfl import reports
from zsfl.aggregator.held_out import MAX_WAITING, Best, HeldOut, Order
from zsfl.aggregator.roster import Roster
from zsfl.aggregator.stage import Stage
from zsfl.aggregator.tally import outliers
from zsfl.aggregator.trials import Trials
from zsfl.errors import RemoteProtocolError, RunFailed, StaleWeights
from zsfl.ids import BODY, NodeId, Version
from zsfl.latest import Latest
from zsfl.learning.modes import Async, Exact
from zsfl.learning.robust import Average, Median
from zsfl.learning.weighting import weight_objection
from zsfl.weights.shelf import KEPT_VERSIONS, Shelf
from zsfl.wire.fields import ShardInfo
from zsfl.wire.messages import Announcement, Evaluated, FetchWeights

A, B = NodeId("a"), NodeId("b")


class Hall:
    """Three shards with held-out samples at two clients, one shard without any, and who tests them."""

    def __init__(
        self,
        patience_s: float = 600.0,
        waits: bool = True,
        at_once: Sequence[int] = (),
        metric: Any = max,
        average: Average = "mean",
    ) -> None:
        """Shards that answer `at_once` do so the moment they are asked."""
        self.said: list[Announcement] = []
        self.notes: list[str] = []
        self.results: list[reports.Tested] = []
        node = SimpleNamespace(
            name="agg",
            card=SimpleNamespace(id=NodeId("agg")),
            settings=SimpleNamespace(patience_s=patience_s),
            publish=self.publish,
            note=lambda message, level: self.notes.append(f"{level}: {message}"),
        )
        self.stage = Stage(cast(Any, node))
        self.shelf = Shelf({BODY: ()})
        self.roster = Latest(Roster(5))
        infos = [ShardInfo(shard=n, train_samples=9, test_samples=4 * (n < 3)) for n in range(4)]
        self.roster.value.join(A, "client-0", infos[:2])
        self.roster.value.join(B, "client-2", infos[2:])
        job = SimpleNamespace(
            how=Exact() if waits else Async(),
            metric=metric,
            average=average,
            bound=None,
            objection_to=lambda n, samples: weight_objection(n, samples, None),
        )
        self.tests = HeldOut(cast(Any, node), self.stage, self.shelf, self.roster, cast(Any, job))
        self.at_once = at_once

    def publish(self, announcement: Announcement) -> None:
        self.said.append(announcement)
        if announcement.state.tested is not None:
            for shard in self.at_once:
                self.answers(shard)

    async def order(self, version: int) -> None:
        self.shelf.put(Version(version), {})

        async def then(tested: reports.Tested, order: Order) -> None:
            assert order.version == tested.version == version
            if not order.left_out:
                self.shelf.answer(FetchWeights(portion=BODY, version=order.version))  # it is kept so long
            self.results.append(tested)

        await self.tests.order(Order(version=Version(version), state={}, round=3, seconds=1.5, then=then))

    def answers(
        self,
        shard: int,
        correct: float | None = 2.0,
        version: int | None = None,
        loss_sum: float = 2.0,
        weight: float = 4.0,
    ) -> None:
        at = self.stage.state.tested if version is None else Version(version)
        assert at is not None
        node = self.roster.value.node_of(shard) or A
        self.tests.heard(
            Evaluated(node=node, shard=shard, version=at, samples=4, weight=weight, correct=correct, loss_sum=loss_sum)
        )

    async def until_tested(self, version: int) -> None:
        await eventually(lambda: self.stage.state.tested == version)


@asynccontextmanager
async def at_work(hall: Hall) -> AsyncIterator[Hall]:
    running = asyncio.create_task(hall.tests.run())
    try:
        yield hall
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_test_ends_when_all_who_are_there_have_answered() -> None:
    async with at_work(Hall()) as hall:
        await hall.order(7)
        await hall.until_tested(7)
        hall.answers(0, correct=4.0)
        hall.answers(1, correct=1.0)
        hall.answers(1, version=6)  # of a test that is over
        assert hall.results == []
        hall.answers(2, correct=1.0)
        await until(hall.tests.all_done())
    whole = reports.Tested(
        node="agg",
        round=3,
        version=7,
        loss=0.5,
        accuracy=0.5,
        clients={"client-0": 1.0, "client-0 (shard 1)": 0.25, "client-2": 0.25},
        losses={"client-0": 0.5, "client-0 (shard 1)": 0.5, "client-2": 0.5},
        seconds=1.5,
        without=("shard 4 (no client yet)",),
    )
    assert hall.results == [whole]
    assert [(one.state.tested, one.state.evaluation) for one in hall.said] == [(7, 1), (None, 1)]
    assert hall.notes == []


async def test_versions_are_tested_one_after_another_and_more_have_to_wait() -> None:
    async with at_work(Hall()) as hall:
        for version in range(MAX_WAITING):
            await hall.order(version)
        more = asyncio.create_task(hall.order(MAX_WAITING))
        for version in range(MAX_WAITING + 1):
            await hall.until_tested(version)
            assert more.done() == (version > 0)
            for shard in range(3):
                hall.answers(shard)
            await eventually(lambda version=version: len(hall.results) == version + 1)
        await until(hall.tests.all_done())
    assert [tested.version for tested in hall.results] == list(range(MAX_WAITING + 1))
    assert hall.stage.state.evaluation == MAX_WAITING + 1


async def test_where_training_does_not_wait_the_oldest_that_is_not_begun_is_left_out() -> None:
    async with at_work(Hall(waits=False)) as hall:
        await hall.order(0)
        await hall.until_tested(0)
        for version in range(1, MAX_WAITING + 2):
            await until(hall.order(version))
        assert [note.split("version ")[1] for note in hall.notes] == ["1 is not tested", "2 is not tested"]
        for version in (0, *range(3, MAX_WAITING + 2)):
            await hall.until_tested(version)
            for shard in range(3):
                hall.answers(shard)
        await until(hall.tests.all_done())
    assert [tested.version for tested in hall.results] == list(range(MAX_WAITING + 2))
    assert [tested.version for tested in hall.results if tested.loss is None] == [1, 2]


async def test_one_that_did_not_answer_is_not_waited_for_until_it_is_heard_again() -> None:
    async with at_work(Hall(patience_s=0.05, at_once=(0, 1))) as hall:
        for version in range(3):
            await hall.order(version)
            if version == 1:
                await eventually(lambda: len(hall.results) == 2)
                assert len([note for note in hall.notes if "did not test" in note]) == 1
                hall.answers(2, version=0)  # too late for it, but it is there
            await eventually(lambda version=version: len(hall.results) == version + 1)
    assert len([note for note in hall.notes if "did not test" in note]) == 2


async def test_a_version_is_kept_until_it_is_tested() -> None:
    async with at_work(Hall()) as hall:
        await hall.order(0)
        await hall.until_tested(0)
        for version in range(1, KEPT_VERSIONS + 3):
            hall.shelf.put(Version(version), {})
        for shard in range(3):
            hall.answers(shard)
        await until(hall.tests.all_done())
        assert len(hall.results) == 1
    hall.shelf.put(Version(99), {})
    with pytest.raises(StaleWeights):
        hall.shelf.answer(FetchWeights(portion=BODY, version=Version(0)))


async def test_nobody_waits_for_one_who_leaves_in_a_test_and_one_who_joins_is_asked_too() -> None:
    async with at_work(Hall()) as hall:
        await hall.order(0)
        await hall.until_tested(0)
        hall.roster.value.join(NodeId("c"), "client-4", [ShardInfo(shard=4, train_samples=9, test_samples=4)])
        hall.roster.touch()
        hall.answers(0)
        hall.answers(1)
        hall.answers(4)
        hall.roster.value.lost(B, 0.0)
        hall.roster.touch()
        await until(hall.tests.all_done())
    assert list(hall.results[0].clients) == ["client-0", "client-0 (shard 1)", "client-4"]
    assert hall.results[0].without == ("client-2",), "shard 3 has no held-out samples"


async def test_one_who_does_not_answer_is_waited_for_with_patience_and_then_no_more() -> None:
    async with at_work(Hall(patience_s=0.05, at_once=(0, 2))) as hall:
        await hall.order(5)
        await until(hall.tests.all_done())
    assert hall.results[0].clients.keys() == {"client-0", "client-2"}
    assert "client-0 (shard 1)" in hall.results[0].without
    assert hall.notes == [
        "warning: client-0 (shard 1) did not test version 5 for 0.05 s; tests go on without them",
    ]


async def test_without_held_out_samples_there_is_nothing_to_say() -> None:
    hall = Hall()
    hall.roster.value.lost(A, 0.0)
    hall.roster.value.lost(B, 0.0)
    async with at_work(hall):
        await hall.order(1)
        await until(hall.tests.all_done())
    assert [(tested.loss, tested.accuracy, tested.clients) for tested in hall.results] == [(None, None, {})]
    assert hall.results[0].without == ()


async def test_a_shard_without_right_and_wrong_has_no_accuracy() -> None:
    async with at_work(Hall(metric=None)) as hall:
        await hall.order(1)
        await hall.until_tested(1)
        for shard in range(3):
            hall.answers(shard, correct=None)
        await until(hall.tests.all_done())
    assert (hall.results[0].loss, hall.results[0].accuracy) == (0.5, None)
    assert set(hall.results[0].clients.values()) == {None}


def result(version: int, loss: float | None, accuracy: float | None = None) -> reports.Tested:
    return reports.Tested(round=0, version=version, loss=loss, accuracy=accuracy, clients={}, seconds=0.0)


async def test_a_result_counts_only_as_its_shards_own_client_says_it() -> None:
    async with at_work(Hall()) as hall:
        await hall.order(7)
        await hall.until_tested(7)
        for node, samples in ((B, 4), (NodeId("nobody"), 4), (A, 5)):
            hall.tests.heard(
                Evaluated(
                    node=node, shard=0, version=Version(7), samples=samples, weight=4.0, correct=0.0, loss_sum=9.0
                )
            )
        for correct in (4.1, 2.0**53):
            with pytest.raises(RemoteProtocolError, match=r"of 4 held-out samples of shard 0 cannot be right"):
                hall.answers(0, correct=correct)
        hall.answers(0, correct=4.00001)
        for shard in range(3):
            hall.answers(shard, correct=4.0)
        await eventually(lambda: hall.results)
    assert hall.results[0].accuracy == 1.0


async def test_who_leaves_out_what_the_job_measures_changes_nothing() -> None:
    async with at_work(Hall()) as hall:
        await hall.order(7)
        await hall.until_tested(7)
        with pytest.raises(
            RemoteProtocolError, match=r"held-out test of shard 2 cannot be counted: correct samples are"
        ):
            hall.answers(2, correct=None)
        with pytest.raises(RemoteProtocolError, match=r"shard 2 cannot be counted: it weighs n=1e-09 for 4 samples"):
            hall.answers(2, weight=1e-9)
        for shard in range(3):
            hall.answers(shard, correct=2.0)
        await eventually(lambda: hall.results)
    assert (hall.results[0].loss, hall.results[0].accuracy) == (0.5, 0.5)


def test_the_best_is_the_most_accurate_and_the_first_of_equals() -> None:
    best = Best()
    results = [result(1, 0.1, 0.5), result(2, 9.0, 0.6), result(3, 0.1, 0.6), result(4, 0.1, 0.2)]
    assert [best.take(one) for one in results] == [True, True, False, False]
    assert (best.tested, best.since) == (results[1], 2)
    assert best.take(result(5, 1.0, 0.7))
    assert best.since == 0


def test_without_accuracy_the_best_has_the_least_loss() -> None:
    best = Best()
    assert [best.take(result(version, loss)) for version, loss in enumerate([2.0, 3.0, -1.0])] == [True, False, True]
    assert best.tested == result(2, -1.0)


def test_a_version_that_is_tested_again_counts_once() -> None:
    best = Best()
    best.take(result(1, 1.0, 0.5))
    best.take(result(2, 1.0, 0.4))
    assert not best.take(result(2, 1.0, 0.9))
    assert (best.tested, best.since) == (result(1, 1.0, 0.5), 1)


def test_a_test_of_no_samples_is_none() -> None:
    best = Best()
    assert not any(best.take(result(version, None)) for version in range(5))
    assert (best.tested, best.since) == (None, 0)


@pytest.mark.parametrize("loss_sum", [math.nan, math.inf, -math.inf, 1.7e308, -1e290, 5e6])
async def test_one_client_whose_loss_says_nothing_is_left_out_and_named_once(loss_sum: float) -> None:
    async with at_work(Hall()) as hall:
        for version in (4, 5):
            await hall.order(version)
            await hall.until_tested(version)
            for shard in (0, 1):
                hall.answers(shard)
            hall.answers(2, loss_sum=loss_sum, correct=4.0)
            await eventually(lambda version=version: len(hall.results) == version - 3)
    for tested in hall.results:
        assert (tested.loss, tested.accuracy, tested.left_out) == (0.5, 0.5, ("client-2",))
        assert tested.clients["client-2"] is None
        assert tested.losses == {"client-0": 0.5, "client-0 (shard 1)": 0.5, "client-2": None}
    said = [note for note in hall.notes if "was not finite" in note]
    assert len(said) == 1
    assert "the held-out loss of client-2 was not finite at version 4, or is no match" in said[0]


@pytest.mark.parametrize(
    ("losses", "whose"),
    [
        ({"eve": None}, "on the samples of eve: lower"),
        ({"eve": None, "mallory": None, "anna": 0.5}, "on the samples of eve, mallory: lower"),
        ({"eve": None, "anna": None}, "on the samples of all 2 shards together: lower"),
        ({f"eve-{n}": None for n in range(10)} | {"anna": 0.5}, "of eve-0, .*, eve-7 and 2 others: lower"),
    ],
)
async def test_where_the_loss_ends_a_run_it_is_said_whose_it_was(losses: dict[str, float | None], whose: str) -> None:
    training = SimpleNamespace(newest="newest", proven="proven")
    unused = cast(Any, None)
    trials = Trials(unused, unused, unused, unused, cast(Any, training), unused)

    async def then(tested: reports.Tested, order: Order) -> None: ...

    order = Order(version=Version(4), state={}, round=3, seconds=1.0, then=then)
    tested = msgspec.structs.replace(result(4, math.inf), losses=losses)
    with pytest.raises(RunFailed, match=f"the held-out loss became inf after round 3 .version 4., .*{whose}"):
        await trials._tested(tested, order, None)
    assert training.newest == "proven"


def test_of_two_clients_one_does_not_speak_for_both() -> None:
    def said(shard: int, loss_sum: float) -> Evaluated:
        return Evaluated(
            node=A, shard=shard, version=Version(1), samples=4, weight=4.0, correct=None, loss_sum=loss_sum
        )

    assert outliers({0: said(0, math.nan), 1: said(1, 2.0)}) == {0}
    assert outliers({0: said(0, math.nan)}) == frozenset()
    assert outliers({0: said(0, -1e290), 1: said(1, 2.0)}) == {0}
    assert outliers({0: said(0, 2e9), 1: said(1, 4e3)}) == frozenset(), "this far apart they may be"


@pytest.mark.parametrize("strange", [(1, 2), (0, 1, 2)])
async def test_where_most_say_so_the_loss_is_no_number(strange: tuple[int, ...]) -> None:
    async with at_work(Hall()) as hall:
        await hall.order(4)
        await hall.until_tested(4)
        for shard in range(3):
            hall.answers(shard, loss_sum=math.nan if shard in strange else 2.0)
        await eventually(lambda: bool(hall.results))
    (tested,) = hall.results
    assert tested.loss is not None
    assert math.isnan(tested.loss)
    assert tested.left_out == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.7e308])
@pytest.mark.parametrize("strange", [(1, 2), (0, 1, 2)])
async def test_where_clients_are_not_trusted_the_loss_is_always_a_number(strange: tuple[int, ...], bad: float) -> None:
    async with at_work(Hall(average=Median())) as hall:
        await hall.order(4)
        await hall.until_tested(4)
        for shard in range(3):
            hall.answers(shard, loss_sum=bad if shard in strange else 2.0)
        await eventually(lambda: bool(hall.results))
    (tested,) = hall.results
    assert (tested.loss, tested.accuracy) == ((None, None) if len(strange) == 3 else (0.5, 0.5))
    assert len(tested.left_out) == len(strange)


@pytest.mark.parametrize(
    ("lie", "left_out"), [(-3999.0, ()), (3999.0, ()), (-5e3, ("client-2",)), (5e3, ("client-2",))]
)
async def test_where_clients_are_not_trusted_no_loss_makes_a_version_the_best_or_the_worst(
    lie: float, left_out: tuple[str, ...]
) -> None:
    """Without a metric the pooled loss says which version is best, and when training ends."""
    async with at_work(Hall(average=Median(), metric=None)) as hall:
        await hall.order(4)
        await hall.until_tested(4)
        for shard, loss_sum in enumerate((2.0, 3.0, lie)):
            hall.answers(shard, loss_sum=loss_sum, correct=None)
        await eventually(lambda: bool(hall.results))
    (tested,) = hall.results
    assert tested.left_out == left_out
    assert tested.loss is not None
    assert 0.5 <= tested.loss <= 0.75, "within what the honest ones say"
    assert (tested.losses["client-2"] is None) == bool(left_out)
    assert any("the held-out loss of client-2" in note for note in hall.notes) == bool(left_out)
