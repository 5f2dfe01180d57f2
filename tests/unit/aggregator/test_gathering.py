"""Every step is counted at most once or dropped at most once, whatever is offered by whomever in whatever order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from zsfl.aggregator.fates import StepSet
from zsfl.aggregator.gathering import PARTS, Gathering, Verdict
from zsfl.ids import Cid, NodeId, PartName, RunId, StepId, Version, parse_cid, step_cid
from zsfl.learning.averaging import Contribution
from zsfl.wire.messages import SpillOffer

Key = tuple[Cid, PartName]
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
    gathering = Gathering(RUN, max_staleness=bound, steps_per_version=2, shards=20)
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
    never = [cid(4, 20), cid(4, k=2), cid(3, k=2)]  # its holder need not keep them
    for one in (*never, cid(4, 9), cid(5), cid(4, run=FOREIGN), cid(4, k=1), cid(3, run=FOREIGN)):
        for may_hold in (True, False):
            verdict = gathering.offered(NODES[0], [offer((one, "body"))], lambda _, may_hold=may_hold: may_hold)
            assert (verdict.fetch, verdict.release) == ([], [one] * (one in never))
        assert not gathering.arrived(contribution((one, "body")))
    assert not gathering.arrived(contribution((cid(4), "body"), version=3))  # says that other weights were used
    assert gathering.take() == ([], {})


def test_what_may_be_needed_of_a_holder_that_leaves() -> None:
    gathering = Gathering(RUN, max_staleness=1, steps_per_version=2, shards=20)
    assert gathering.may_need(cid(4), "body")  # so little is known before it begins
    gathering.begin(Version(4), expected(4))
    late, lost, foreign = cid(3), cid(2), cid(4, run=FOREIGN)
    joined = cid(4, 9)  # whose client is there, and is asked for it in a moment
    assert [gathering.may_need(one, "body") for one in (cid(4), late, lost, foreign, joined)] == [1, 1, 0, 0, 1]
    assert gathering.arrived(contribution((cid(4), "body")))
    assert [gathering.may_need(cid(4), part) for part in PARTS] == [False, True]
    assert gathering.arrived(contribution((cid(4), "client")))
    gathering.take()
    assert not gathering.may_need(cid(4), "body")
    assert gathering.arrived(contribution((cid(4, 1), "client")))
    gathering.void("it fell apart")
    assert not gathering.may_need(cid(4, 1), "body")


def test_halves_are_steps_whose_body_part_is_not_on_its_way() -> None:
    gathering = begun(4)
    for shard in SHARDS:
        assert gathering.arrived(contribution((cid(4, shard), "client")))
    gathering.offered(NODES[0], [offer((cid(4, 0), "body"))])
    assert gathering.arrived(contribution((cid(4, 1), "body")))
    assert gathering.halves() == [cid(4, 2)]
    gathering.not_delivered(NODES[0])
    assert gathering.halves() == [cid(4, 0), cid(4, 2)]
    merged = SpillOffer(cid=cid(4, 0), part="body", version=Version(4), size_bytes=1, members=(cid(4, 0), cid(4, 2)))
    gathering.offered(NODES[0], [merged])
    assert gathering.halves() == []


def test_whoever_joins_is_expected_too() -> None:
    gathering = begun(4)
    gathering.expect([cid(4, 9)])
    assert gathering.offered(NODES[0], [offer((cid(4, 9), "body"))]).fetch == [(cid(4, 9), "body")]


def test_with_nothing_expected_in_particular_any_step_counts() -> None:
    gathering = Gathering(RUN, max_staleness=1, steps_per_version=2, shards=20)
    gathering.begin(Version(4), None)
    steps = [cid(4, 8), cid(4, 8, k=1), cid(3, 5)]
    fill(gathering, steps)
    assert {one.cid for one in gathering.take()[0]} == set(steps)


def test_a_settled_step_is_released_whenever_it_is_offered_again() -> None:
    gathering = begun(0)
    fill(gathering, expected(0))
    gathering.take()
    gathering.end()
    at_once = gathering.offered(NODES[1], [offer((cid(0), "body"))], lambda _: False)
    assert (at_once.fetch, at_once.release) == ([], [])  # who knows whether it is ever recorded
    gathering.recorded()
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
    gathering.recorded()
    assert gathering.offered(NODES[0], [offer((cid(4, 1), "client"))]).release == [cid(4, 1)]


def test_a_step_is_dropped_for_the_first_reason_there_was() -> None:
    gathering = begun(4)
    for version in (5, 6, 7):
        gathering.offered(NODES[0], [offer((cid(3), "body"))])
        gathering.end()
        gathering.begin(Version(version), expected(version))
    assert gathering.take()[1] == {cid(3): "1 version late; at most 0 count"}


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
    """Offers, deliveries, losses, joins and commits in any order, beside a plain account of what must come of them."""

    made = Gathering
    """What is looked at."""

    @initialize(bound=st.integers(0, 3), is_free=st.booleans())
    def starts(self, bound: int, is_free: bool) -> None:
        self.bound, self.is_free = bound, is_free
        self.gathering = self.made(RUN, max_staleness=bound, steps_per_version=2, shards=20)
        self.version, self.is_open = -1, False
        self.asked: dict[Key, NodeId] = {}
        self.held: dict[Cid, set[PartName]] = {}
        self.doomed: set[Cid] = set()
        """Dropped, and in no record yet."""
        self.counted: set[Cid] = set()
        self.dropped: dict[Cid, str] = {}
        self.known: set[Cid] = set()
        """Every step that was ever held, or offered when it was too late."""
        self.begins()

    # --- what must come of it ---------------------------------------------------------------------------

    def is_too_late(self, one: Cid) -> bool:
        return self.version - parse_cid(one).version + (not self.is_open) > self.bound

    def may_count(self, one: Cid) -> bool:
        step = parse_cid(one)
        is_asked_for = step.version < self.version or self.expected is None or one in self.expected
        is_settled = one in self.counted or one in self.dropped or one in self.doomed
        return self.is_ours(one) and is_asked_for and not is_settled and not self.is_too_late(one)

    def is_ours(self, one: Cid) -> bool:
        step = parse_cid(one)
        return step.run == RUN and step.k < 2 and step.version <= self.version

    def whole(self) -> list[Cid]:
        return sorted(one for one, parts in self.held.items() if len(parts) == 2)

    def doom(self, cids: Iterable[Cid]) -> None:
        for one in list(cids):
            self.held.pop(one, None)
            self.doomed.add(one)

    # --- what happens -----------------------------------------------------------------------------------

    @precondition(lambda self: not self.is_open)
    @rule()
    def begins(self) -> None:
        self.version, self.is_open = self.version + 1, True
        self.expected = None if self.is_free else set(expected(self.version))
        late = self.gathering.begin(Version(self.version), self.expected)
        self.doom(one for one in self.held if self.is_too_late(one))
        assert late == [parse_cid(one) for one in self.whole()]

    @precondition(lambda self: self.is_open)
    @rule()
    def commits(self) -> None:
        window, dropped = self.gathering.take()
        self.gathering.recorded()
        whole = self.whole()
        assert [(one.cid, one.part) for one in window] == keys(whole)
        assert dropped.keys() == self.doomed
        assert all(dropped.values())
        for one in whole:
            del self.held[one]
        self.counted.update(whole)
        self.dropped |= dropped
        self.doomed = set()
        self.gathering.end()
        self.is_open = False

    @rule()
    def somebody_joins(self) -> None:
        new = [cid(self.version, len(SHARDS))]
        self.gathering.expect(new)
        if self.expected is not None:
            self.expected.update(new)

    @rule(
        node=st.sampled_from(NODES),
        age=st.sampled_from([0, 0, 0, 1, 1, 2, 3, 5, -1]),
        shard=st.integers(0, len(SHARDS)),
        parts=st.sampled_from([PARTS, PARTS[:1], PARTS[1:]]),
        run=st.sampled_from([RUN, RUN, RUN, RUN, FOREIGN]),
        k=st.sampled_from([0, 0, 0, 1, 2]),
    )
    def offers(self, node: NodeId, age: int, shard: int, parts: tuple[PartName, ...], run: RunId, k: int) -> None:
        one = cid(max(0, self.version - age), shard, run, k)
        offered: list[Key] = [(one, part) for part in parts]
        verdict = self.gathering.offered(node, map(offer, offered))
        is_useless = one in self.counted or one in self.dropped or (run == RUN and k == 2)
        assert verdict.release == [one] * len(offered) * is_useless
        wanted = [key for key in offered if key not in self.asked and key[1] not in self.held.get(one, ())]
        assert verdict.fetch == (wanted if self.may_count(one) else [])
        self.asked |= {(one, part): node for one, part in verdict.fetch if part != "merged"}
        if self.is_ours(one) and self.is_too_late(one) and not is_useless:
            self.known.add(one)
            self.doom([one])

    @rule(node=st.sampled_from(NODES), count=st.integers(1, 4), twice=st.booleans())
    def delivers(self, node: NodeId, count: int, twice: bool) -> None:
        for one, part in [key for key in sorted(self.asked) if self.asked[key] == node][:count]:
            del self.asked[one, part]
            assert self.gathering.arrived(contribution((one, part))) == self.may_count(one)
            if self.may_count(one):
                self.held.setdefault(one, set()).add(part)
                self.known.add(one)
            if twice:
                assert not self.gathering.arrived(contribution((one, part)))

    @rule(node=st.sampled_from(NODES), is_gone=st.booleans())
    def does_not_deliver(self, node: NodeId, is_gone: bool) -> None:
        its = [key for key in sorted(self.asked) if self.asked[key] == node]
        its = its if is_gone else its[:1]
        self.gathering.not_delivered(node, None if is_gone else its)
        for key in its:
            del self.asked[key]

    @rule(falls_apart=st.sampled_from([False, False, True]))
    def the_next_version_comes(self, falls_apart: bool) -> None:
        if falls_apart:
            self.gathering.void("it fell apart")
            self.doom(self.held)
            for one in sorted(self.doomed):  # for which there is no use any more
                assert not self.gathering.expects(one)
        if self.is_open:
            self.commits()
        self.begins()

    @rule()
    def the_aggregator_is_killed_and_resumes(self) -> None:
        """What is in the ledger stays so; all else may come once more."""
        self.gathering = self.made(FOREIGN, max_staleness=self.bound, steps_per_version=2, shards=20)
        self.gathering.resume(RUN, [*self.counted, *self.dropped])
        self.known -= self.held.keys() | self.doomed
        self.asked, self.held, self.doomed = {}, {}, set()
        self.version, self.is_open = self.version - self.is_open, False
        self.begins()

    @invariant()
    def each_step_is_counted_dropped_or_pending(self) -> None:
        fates = [*self.counted, *self.dropped, *self.doomed, *self.held]
        assert len(fates) == len(set(fates))
        assert set(fates) == self.known
        for one, parts in self.held.items():
            assert self.gathering.is_whole(one) == (len(parts) == 2)

    def teardown(self) -> None:
        """In the end everything is counted or dropped, and let go of whenever it is offered again."""
        for _ in range(self.bound + 2):
            if not self.is_open:
                self.begins()
            self.commits()
        self.each_step_is_counted_dropped_or_pending()
        assert not self.held
        assert not self.doomed
        for one in self.known:
            verdict = self.gathering.offered(NODES[0], [offer((one, "body"))])
            assert (verdict.fetch, verdict.release) == ([], [one])


TestCollecting = Collecting.TestCase
TestCollecting.settings = settings(max_examples=1000, stateful_step_count=15)


class Forgetting(Gathering):
    """Does not know after a restart what was counted before."""

    def resume(self, run: RunId, settled: Iterable[Cid]) -> None:
        super().resume(run, ())


class Repeating(Gathering):
    """Takes a step again that a version has counted."""

    def take(self) -> tuple[Sequence[Contribution], Mapping[Cid, str]]:
        taken = super().take()
        self._settled = StepSet(2)
        return taken


class Eager(Gathering):
    """Has spills released that no version has counted."""

    def offered(
        self, node: NodeId, offers: Iterable[SpillOffer], may_hold: Callable[[SpillOffer], bool] = lambda _: True
    ) -> Verdict:
        offers = list(offers)
        verdict = super().offered(node, offers, may_hold)
        return Verdict(
            fetch=verdict.fetch, release=[*verdict.release, *(one.cid for one in offers if not verdict.fetch)]
        )


class Silent(Gathering):
    """Drops what is late without a record of it."""

    def take(self) -> tuple[Sequence[Contribution], Mapping[Cid, str]]:
        window, _ = super().take()
        return window, {}


@pytest.mark.parametrize("broken", [Forgetting, Repeating, Eager, Silent])
def test_what_is_broken_on_purpose_is_caught(broken: type[Gathering]) -> None:
    machine = type("Broken", (Collecting,), {"made": broken})
    quick = settings(max_examples=500, stateful_step_count=30, database=None, phases=[Phase.generate], deadline=None)
    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(machine, settings=quick)
