"""Every step is counted at most once or dropped at most once, whatever is offered by whomever in whatever order."""

from __future__ import annotations

import random
from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from zsfl.aggregator.fates import StepSet
from zsfl.aggregator.gathering import PARTS, Gathering, Key
from zsfl.ids import Cid, NodeId, PartName, RunId, StepId, Version, parse_cid, step_cid
from zsfl.learning.averaging import Contribution
from zsfl.wire.messages import SpillOffer

RUN, FOREIGN = RunId("3fa9c1"), RunId("000000")
SHARDS = range(3)
NODES = [NodeId("a"), NodeId("b"), NodeId("c")]


def cid(version: int, shard: int = 0, run: RunId = RUN, k: int = 0) -> Cid:
    return step_cid(run, shard, Version(version), k)


def offer(key: Key) -> SpillOffer:
    return SpillOffer(cid=key[0], part=key[1], version=parse_cid(key[0]).version, size_bytes=1)


def contribution(key: Key, version: int | None = None) -> Contribution:
    return Contribution(
        cid=key[0],
        part=key[1],
        version=parse_cid(key[0]).version if version is None else Version(version),
        n=1.0,
        loss_sum=None,
        samples=7,
        grads={},
        buffers={},
        node="s",
    )


def expected(version: int) -> list[Cid]:
    return [cid(version, shard) for shard in SHARDS]


def keys(cids: Iterable[Cid]) -> list[Key]:
    return [(one, part) for one in cids for part in PARTS]


def begun(version: int, bound: int = 0) -> Gathering:
    gathering = Gathering(RUN, max_staleness=bound, steps_per_version=2)
    gathering.begin(Version(version), expected(version))
    return gathering


def fill(gathering: Gathering, cids: Iterable[Cid]) -> None:
    for key in keys(cids):
        assert gathering.arrived(contribution(key))


def test_a_window_has_every_part_of_every_step_that_came_in_cid_order() -> None:
    gathering = begun(4)
    order = keys(expected(4))
    random.Random(3).shuffle(order)
    for key in order:
        assert not gathering.is_whole(key[0])
        assert gathering.offered(NODES[0], [offer(key)]).fetch == [key]
        assert gathering.arrived(contribution(key))
    assert all(gathering.is_whole(one) for one in expected(4))
    assert gathering.samples(parse_cid(cid(4))) == 7
    window, dropped = gathering.take()
    assert [(one.cid, one.part) for one in window] == keys(expected(4))
    assert dropped == {}


def test_a_spill_is_asked_of_one_holder_at_a_time() -> None:
    gathering, key = begun(4), keys(expected(4))[0]
    assert gathering.offered(NODES[0], [offer(key)] * 2).fetch == [key]
    assert gathering.offered(NODES[1], [offer(key)]).fetch == []
    gathering.not_delivered(NODES[1])  # was asked for nothing
    assert gathering.offered(NODES[1], [offer(key)]).fetch == []
    gathering.not_delivered(NODES[0], [key])
    assert gathering.offered(NODES[1], [offer(key)]).fetch == [key]


def test_a_second_copy_is_no_news() -> None:
    gathering, key = begun(4), keys(expected(4))[0]
    assert gathering.arrived(contribution(key))
    assert not gathering.arrived(contribution(key))
    assert gathering.offered(NODES[0], [offer(key)]).fetch == []


def test_what_nobody_expects_is_neither_fetched_nor_taken() -> None:
    gathering = begun(4)
    for one in (cid(4, 9), cid(5), cid(4, run=FOREIGN), cid(4, k=2), cid(4, k=1)):
        verdict = gathering.offered(NODES[0], [offer((one, "body"))])
        assert (verdict.fetch, verdict.release) == ([], [])
        assert not gathering.arrived(contribution((one, "body")))
    assert not gathering.arrived(contribution((cid(4), "body"), version=3))  # says that other weights were used
    assert gathering.take() == ([], {})


def test_whoever_joins_is_expected_too() -> None:
    gathering = begun(4)
    gathering.expect([cid(4, 9)])
    assert gathering.offered(NODES[0], [offer((cid(4, 9), "body"))]).fetch == [(cid(4, 9), "body")]


def test_with_nothing_expected_in_particular_any_step_counts() -> None:
    gathering = Gathering(RUN, max_staleness=1, steps_per_version=2)
    gathering.begin(Version(4), None)
    steps = [cid(4, 8), cid(4, 8, k=1), cid(3, 5)]
    fill(gathering, steps)
    assert {one.cid for one in gathering.take()[0]} == set(steps)


def test_a_settled_step_is_released_whenever_it_is_offered_again() -> None:
    gathering = begun(0)
    fill(gathering, expected(0))
    gathering.take()
    gathering.end()
    for version in range(1, 50):
        verdict = gathering.offered(NODES[1], [offer((cid(0), "body"))])
        assert (verdict.fetch, verdict.release) == ([], [cid(0)])
        gathering.begin(Version(version), expected(version))


def test_a_step_that_comes_after_its_window_counts_in_the_next_or_is_dropped() -> None:
    for bound in (0, 1):
        gathering = begun(4, bound)
        fill(gathering, [cid(4, 0)])
        gathering.take()
        gathering.end()
        late = gathering.offered(NODES[0], [offer(key) for key in keys([cid(4, 1)])])
        assert len(late.fetch) == 2 * bound
        if bound:
            fill(gathering, [cid(4, 1)])
        whole = gathering.begin(Version(5), expected(5))
        assert whole == [parse_cid(cid(4, 1))] * bound
        window, dropped = gathering.take()
        assert [one.cid for one in window] == [cid(4, 1)] * 2 * bound
        assert dropped == ({} if bound else {cid(4, 1): "1 version late; at most 0 count"})


def test_a_step_that_never_came_whole_is_dropped_when_it_is_too_late() -> None:
    gathering = begun(4, 1)
    gathering.arrived(contribution((cid(4, 1), "body")))
    gathering.take()
    for version in (5, 6):
        gathering.end()
        gathering.begin(Version(version), expected(version))
    assert gathering.take()[1] == {cid(4, 1): "its client part never came"}
    assert gathering.offered(NODES[0], [offer((cid(4, 1), "client"))]).release == [cid(4, 1)]


def test_what_is_void_is_dropped() -> None:
    gathering = begun(4)
    fill(gathering, [cid(4, 0)])
    gathering.arrived(contribution((cid(4, 1), "body")))
    gathering.void("fell apart")
    assert gathering.take() == ([], {cid(4, 0): "fell apart", cid(4, 1): "fell apart"})


steps = st.builds(StepId, st.just(RUN), st.integers(0, 3000).map(Version), st.integers(0, 5), st.integers(0, 2))


@given(st.lists(steps), st.lists(steps))
def test_a_set_of_steps_is_a_set(added: list[StepId], asked: list[StepId]) -> None:
    few = StepSet(3)
    for step in added:
        few.add(step)
    for step in (*added, *asked):
        assert (step in few) == (step in added)
    assert StepId(RUN, Version(0), 0, 3) not in few


class Collecting(RuleBasedStateMachine):
    """Offers, deliveries, losses and commits in any order, with every holder lying about nothing but being slow."""

    BOUND = 2

    def __init__(self) -> None:
        super().__init__()
        self.gathering = begun(0, self.BOUND)
        self.version = 0
        self.fetching: dict[NodeId, set[Key]] = {node: set() for node in NODES}
        self.held: set[Key] = set()
        self.counted: set[Cid] = set()
        self.dropped: dict[Cid, str] = {}
        self.seen: set[Cid] = set()

    @rule(
        node=st.sampled_from(NODES),
        age=st.integers(-1, 5),
        shard=st.integers(0, len(SHARDS)),
        part=st.sampled_from(PARTS),
        run=st.sampled_from([RUN, RUN, RUN, FOREIGN]),
        k=st.integers(0, 2),
    )
    def offers(self, node: NodeId, age: int, shard: int, part: PartName, run: RunId, k: int) -> None:
        version = max(0, self.version - age)
        key = (cid(version, shard, run, k), part)
        verdict = self.gathering.offered(node, [offer(key)])
        assert set(verdict.release) <= self.counted | self.dropped.keys()
        if key[0] in self.counted or key[0] in self.dropped:
            assert verdict.release == [key[0]]
        for wanted in verdict.fetch:
            assert 0 <= self.version - version <= self.BOUND
            assert run == RUN
            assert wanted not in self.held
            assert all(wanted not in others for others in self.fetching.values())
            self.fetching[node].add(wanted)
            self.seen.add(wanted[0])

    @rule(node=st.sampled_from(NODES), twice=st.booleans())
    def delivers(self, node: NodeId, twice: bool) -> None:
        for key in sorted(self.fetching[node])[:1]:
            self.fetching[node].discard(key)
            is_news = self.gathering.arrived(contribution(key))
            if is_news:
                assert key not in self.held
                assert key[0] not in self.counted
                assert key[0] not in self.dropped
                self.held.add(key)
            if twice:
                assert not self.gathering.arrived(contribution(key))

    @rule(node=st.sampled_from(NODES))
    def is_lost(self, node: NodeId) -> None:
        self.gathering.not_delivered(node)
        self.fetching[node].clear()

    @rule(node=st.sampled_from(NODES))
    def does_not_deliver(self, node: NodeId) -> None:
        self.gathering.not_delivered(node, list(self.fetching[node])[:1])
        for key in list(self.fetching[node])[:1]:
            self.fetching[node].discard(key)

    @rule()
    def commits(self) -> None:
        whole = {one for one, part in self.held if part == "body" and (one, "client") in self.held}
        window, dropped = self.gathering.take()
        assert [(one.cid, one.part) for one in window] == keys(sorted(whole))
        assert not dropped.keys() & (self.counted | self.dropped.keys() | whole)
        assert all(self.version - parse_cid(one).version > self.BOUND for one in dropped)
        self.counted |= whole
        self.dropped |= dropped
        self.held = {key for key in self.held if key[0] not in whole and key[0] not in dropped}
        self.gathering.end()
        self.version += 1
        late = self.gathering.begin(Version(self.version), expected(self.version))
        self.held = {key for key in self.held if self.version - parse_cid(key[0]).version <= self.BOUND}
        assert {(step.shard, step.version) for step in late} <= {
            (parse_cid(one).shard, parse_cid(one).version) for one, _ in self.held
        }

    @invariant()
    def nothing_counts_twice(self) -> None:
        assert not self.counted & self.dropped.keys()
        assert all(
            self.gathering.is_whole(one) == ((one, "body") in self.held and (one, "client") in self.held)
            for one, _ in self.held
        )


TestCollecting = Collecting.TestCase
TestCollecting.settings = settings(max_examples=60, stateful_step_count=40)
