"""Each part of each expected step is collected once, whatever is offered by whomever in whatever order."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from zsfl.aggregator.gathering import PARTS, Gathering, Key
from zsfl.ids import Cid, NodeId, PartName, RunId, Version, step_cid
from zsfl.learning.averaging import Contribution
from zsfl.wire.messages import SpillOffer

RUN, FOREIGN = RunId("3fa9c1"), RunId("000000")
SHARDS = range(3)
NODES = [NodeId("a"), NodeId("b"), NodeId("c")]


def cid(version: int, shard: int = 0, run: RunId = RUN) -> Cid:
    return step_cid(run, shard, Version(version))


def offer(key: Key, version: int) -> SpillOffer:
    return SpillOffer(cid=key[0], part=key[1], version=Version(version), size_bytes=1)


def contribution(key: Key, version: int) -> Contribution:
    return Contribution(
        cid=key[0],
        part=key[1],
        version=Version(version),
        n=1.0,
        loss_sum=None,
        samples=1,
        grads={},
        buffers={},
        node="s",
    )


def expected(version: int) -> dict[Cid, int]:
    return {cid(version, shard): shard for shard in SHARDS}


def keys(version: int) -> list[Key]:
    return [(one, part) for one in expected(version) for part in PARTS]


def begun(version: int) -> Gathering:
    gathering = Gathering()
    gathering.begin(Version(version), expected(version))
    return gathering


def nothing_counted(_: Cid) -> bool:
    return False


def test_a_window_is_complete_once_every_part_of_every_step_is_here() -> None:
    gathering = begun(4)
    order = keys(4)
    random.Random(3).shuffle(order)
    for key in order:
        assert not gathering.complete
        verdict = gathering.offered(NODES[0], [offer(key, 4)], nothing_counted)
        assert verdict.fetch == [key]
        assert gathering.arrived(contribution(key, 4))
    assert gathering.complete
    assert gathering.missing() == []
    assert [(one.cid, one.part) for one in gathering.window()] == sorted(keys(4))


def test_what_is_missing_is_told_by_shard() -> None:
    gathering = begun(4)
    for key in keys(4):
        if key != (cid(4, 1), "client"):
            gathering.arrived(contribution(key, 4))
    assert gathering.missing() == [1]


def test_a_spill_is_asked_of_one_holder_at_a_time() -> None:
    gathering, key = begun(4), keys(4)[0]
    assert gathering.offered(NODES[0], [offer(key, 4)] * 2, nothing_counted).fetch == [key]
    assert gathering.offered(NODES[1], [offer(key, 4)], nothing_counted).fetch == []
    gathering.not_delivered(NODES[1])  # was asked for nothing
    assert gathering.offered(NODES[1], [offer(key, 4)], nothing_counted).fetch == []
    gathering.not_delivered(NODES[0], [key])
    assert gathering.offered(NODES[1], [offer(key, 4)], nothing_counted).fetch == [key]


def test_a_second_copy_is_no_news() -> None:
    gathering, key = begun(4), keys(4)[0]
    assert gathering.arrived(contribution(key, 4))
    assert not gathering.arrived(contribution(key, 4))
    assert gathering.offered(NODES[0], [offer(key, 4)], nothing_counted).fetch == []


def test_what_nobody_expects_is_neither_fetched_nor_taken() -> None:
    gathering = begun(4)
    strangers: list[tuple[Key, int]] = [
        ((cid(4, 9), "body"), 4),
        ((cid(5), "body"), 5),
        ((cid(4, run=FOREIGN), "body"), 4),
    ]
    for key, version in strangers:
        verdict = gathering.offered(NODES[0], [offer(key, version)], nothing_counted)
        assert (verdict.fetch, verdict.release) == ([], [])
        assert not gathering.arrived(contribution(key, version))
    assert not gathering.arrived(contribution(keys(4)[0], 3))  # says that other weights were used


def test_a_late_one_that_was_counted_is_released() -> None:
    gathering = begun(4)
    verdict = gathering.offered(NODES[0], [offer(keys(3)[0], 3)], lambda one: one == cid(3))
    assert (verdict.fetch, verdict.release) == ([], [cid(3)])


def test_a_late_one_that_nobody_asked_for_is_let_be() -> None:
    gathering = begun(4)
    verdict = gathering.offered(NODES[0], [offer((cid(3, 7), "body"), 3)], nothing_counted)
    assert (verdict.fetch, verdict.release) == ([], [])


def test_spills_of_another_run_are_let_be() -> None:
    gathering = begun(4)
    gathering.begin(Version(5), {})
    verdict = gathering.offered(NODES[0], [offer((cid(1, run=FOREIGN), PARTS[0]), 1)], nothing_counted)
    assert (verdict.fetch, verdict.release) == ([], [])


class Collecting(RuleBasedStateMachine):
    """Offers, deliveries, losses and commits in any order, with every holder lying about nothing but being slow."""

    def __init__(self) -> None:
        super().__init__()
        self.gathering = begun(0)
        self.version = 0
        self.fetching: dict[NodeId, set[Key]] = {node: set() for node in NODES}
        self.news: list[Key] = []
        self.counted: list[Cid] = []

    @rule(
        node=st.sampled_from(NODES),
        age=st.integers(-1, 2),
        shard=st.integers(0, len(SHARDS)),
        part=st.sampled_from(PARTS),
        run=st.sampled_from([RUN, RUN, RUN, FOREIGN]),
    )
    def offers(self, node: NodeId, age: int, shard: int, part: PartName, run: RunId) -> None:
        version = max(0, self.version - age)
        key = (cid(version, shard, run), part)
        verdict = self.gathering.offered(node, [offer(key, version)], self.counted.__contains__)
        assert set(verdict.release) <= set(self.counted)
        for wanted in verdict.fetch:
            assert wanted in keys(self.version)
            assert wanted not in self.news
            assert all(wanted not in others for others in self.fetching.values())
            self.fetching[node].add(wanted)

    @rule(node=st.sampled_from(NODES), twice=st.booleans())
    def delivers(self, node: NodeId, twice: bool) -> None:
        for key in sorted(self.fetching[node])[:1]:
            self.fetching[node].discard(key)
            version = int(key[0][8:16])
            is_news = self.gathering.arrived(contribution(key, version))
            assert is_news == (version == self.version)
            if is_news:
                self.news.append(key)
            if twice:
                assert not self.gathering.arrived(contribution(key, version))

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
        """Fill the window as the holders would in the end, and commit it."""
        for key in keys(self.version):
            if self.gathering.arrived(contribution(key, self.version)):
                self.news.append(key)
        assert self.gathering.complete
        window = [(one.cid, one.part) for one in self.gathering.window()]
        assert window == sorted(self.news) == sorted(keys(self.version))
        self.counted += expected(self.version)
        self.version += 1
        self.gathering.begin(Version(self.version), expected(self.version))
        self.news.clear()
        for asked in self.fetching.values():
            asked.clear()

    @invariant()
    def complete_only_with_all(self) -> None:
        assert len(set(self.news)) == len(self.news)
        assert self.gathering.complete == (len(self.news) == len(keys(self.version)))
        missing = {shard for shard in SHARDS for part in PARTS if (cid(self.version, shard), part) not in self.news}
        assert self.gathering.missing() == sorted(missing)


TestCollecting = Collecting.TestCase
TestCollecting.settings = settings(max_examples=60, stateful_step_count=40)
