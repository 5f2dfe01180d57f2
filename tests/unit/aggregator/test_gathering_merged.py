"""A merged contribution is the body part of several steps: each still counts exactly once, or is dropped."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zsfl.aggregator.gathering import Gathering
from zsfl.ids import Cid, NodeId, PartName, RunId, Version, parse_cid, step_cid
from zsfl.learning.averaging import Contribution, StepShare
from zsfl.wire.messages import SpillOffer

RUN, NODE = RunId("3fa9c1"), NodeId("a")
SHARDS = 6


def cid(version: int, shard: int) -> Cid:
    return step_cid(RUN, shard, Version(version))


def single(one: Cid, part: PartName) -> Contribution:
    version = parse_cid(one).version
    return Contribution(
        cid=one, part=part, version=version, n=2.0, loss_sum=None, samples=2, grads={}, buffers={}, node="s"
    )


def merged(*cids: Cid) -> Contribution:
    return Contribution(
        cid=cids[0],
        part="body",
        version=parse_cid(cids[0]).version,
        n=2.0 * len(cids),
        loss_sum=None,
        samples=2 * len(cids),
        grads={},
        buffers={},
        node="s",
        members=tuple(StepShare(cid=one, n=2.0, samples=2, client="c") for one in cids),
    )


def offer(*cids: Cid) -> SpillOffer:
    version = parse_cid(cids[0]).version
    return SpillOffer(cid=cids[0], part="body", version=version, size_bytes=1, members=cids if len(cids) > 1 else ())


def begun(version: int = 4, bound: int = 0) -> Gathering:
    gathering = Gathering(RUN, max_staleness=bound, steps_per_version=1, shards=SHARDS)
    gathering.begin(Version(version), [cid(version, shard) for shard in range(SHARDS)])
    return gathering


def bodies(window: list[Contribution]) -> list[Cid]:
    """Steps whose body part is in the window."""
    found = [one for one in window if one.part == "body"]
    return [share for one in found for share in ([member.cid for member in one.members] or [one.cid])]


A, B, C = cid(4, 0), cid(4, 1), cid(4, 2)


def test_it_counts_with_all_its_steps_once_all_are_here() -> None:
    gathering = begun()
    assert gathering.offered(NODE, [offer(B, A)]).fetch == [(B, "merged")]
    assert gathering.offered(NODE, [offer(B, A)]).fetch == []
    assert gathering.arrived(merged(B, A))
    assert not gathering.arrived(merged(B, A))
    assert gathering.completed(B) == []
    assert gathering.arrived(single(A, "client"))
    assert gathering.completed(A) == []
    assert not gathering.is_whole(A)
    assert gathering.offered(NODE, [offer(A)]).fetch == []  # no use for its body part alone
    assert gathering.arrived(single(B, "client"))
    assert {parse_cid(A), parse_cid(B)} == set(gathering.completed(B))
    assert gathering.completed(A) == []
    window, dropped = gathering.take()
    assert [(one.cid, one.part, len(one.members)) for one in window] == [
        (A, "client", 0),
        (B, "body", 2),
        (B, "client", 0),
    ]
    assert dropped == {}
    gathering.recorded()
    assert gathering.offered(NODE, [offer(B, A)]).release == [B, A]


def test_it_goes_before_what_came_singly() -> None:
    gathering = begun()
    for part in ("body", "client"):
        gathering.arrived(single(A, part))
    assert gathering.completed(A) == [parse_cid(A)]
    assert gathering.arrived(merged(A, B))
    gathering.arrived(single(B, "client"))
    assert gathering.completed(B) == [parse_cid(B)]  # A was told already
    window, _ = gathering.take()
    assert bodies(list(window)) == [A, B]
    assert len(window) == 3


def test_a_step_that_is_whole_by_itself_does_not_wait_for_the_others() -> None:
    gathering = begun(bound=1)
    gathering.arrived(merged(A, B))
    gathering.arrived(single(B, "client"))
    late = begun(bound=1)
    for one in (single(A, "body"), merged(A, B), single(A, "client"), single(C, "client")):
        assert late.arrived(one)
    assert late.completed(A) == [parse_cid(A)]
    window, _ = late.take()
    assert [(one.cid, one.part) for one in window] == [(A, "body"), (A, "client")]
    late.recorded()
    assert late.offered(NODE, [offer(A, B)]).release == [A]  # of no use to B any more
    assert late.offered(NODE, [offer(B)]).fetch == [(B, "body")]
    assert not late.arrived(merged(A, B))
    assert late.arrived(single(B, "body"))
    assert late.arrived(single(B, "client"))
    assert late.completed(B) == [parse_cid(B)]


def test_why_steps_that_were_merged_are_dropped() -> None:
    gathering = begun()
    gathering.arrived(merged(A, B))
    gathering.arrived(single(B, "client"))
    gathering.take()
    gathering.end()
    gathering.begin(Version(5), [])
    assert gathering.take()[1] == {
        A: "its client part never came",
        B: "the client part of a step that it is merged with never came",
    }


def test_it_is_stuck_when_a_step_of_it_is_not_coming() -> None:
    gathering = begun()
    gathering.arrived(merged(A, B))
    assert not gathering.is_stuck([0, 1])
    assert not gathering.is_stuck([0])  # A is not here either
    gathering.arrived(single(A, "client"))
    assert not gathering.is_stuck([0, 1])
    assert gathering.is_stuck([0])
    gathering.arrived(single(B, "client"))
    assert not gathering.is_stuck([])


class Merging(RuleBasedStateMachine):
    """Singles, and merged ones that share no step with one another, in any order over several versions."""

    @initialize(bound=st.integers(0, 2), free=st.booleans())
    def starts(self, bound: int, free: bool) -> None:
        self.free = free
        self.gathering = Gathering(RUN, max_staleness=bound, steps_per_version=1, shards=SHARDS)
        self.version, self.is_open = -1, False
        self.counted: set[Cid] = set()
        self.dropped: set[Cid] = set()
        self.known: set[Cid] = set()
        self.told: Counter[Cid] = Counter()
        self.begins()

    @precondition(lambda self: not self.is_open)
    @rule()
    def begins(self) -> None:
        self.version, self.is_open = self.version + 1, True
        expected = None if self.free else [cid(self.version, shard) for shard in range(SHARDS)]
        late = self.gathering.begin(Version(self.version), expected)
        self.told = Counter(step_cid(*step[:1], step.shard, step.version, step.k) for step in late)

    @rule(age=st.integers(0, 3), shard=st.integers(0, SHARDS - 1), part=st.sampled_from(["body", "client", "client"]))
    def one_comes(self, age: int, shard: int, part: PartName) -> None:
        one = cid(max(0, self.version - age), shard)
        self.comes(single(one, part))

    @rule(age=st.integers(0, 2), pairs=st.booleans(), first=st.integers(0, 2))
    def a_merged_one_comes(self, age: int, pairs: bool, first: int) -> None:
        """In even versions pairs of shards are merged, in odd ones threes."""
        version = max(0, self.version - age)
        size = 2 if version % 2 == 0 else 3
        start = first * size % SHARDS
        self.comes(merged(*(cid(version, shard) for shard in range(start, start + size))))

    def comes(self, contribution: Contribution) -> None:
        cids = [member.cid for member in contribution.members] or [contribution.cid]
        could = all(self.gathering.expects(one) for one in cids)
        news = self.gathering.arrived(contribution)
        assert could or not news
        if news:
            self.known.update(cids)
            for step in self.gathering.completed(contribution.cid):
                self.told[step_cid(step.run, step.shard, step.version, step.k)] += 1

    @precondition(lambda self: self.is_open)
    @rule(void=st.sampled_from([False, False, False, True]))
    def commits(self, void: bool) -> None:
        if void:
            self.gathering.void("it fell apart")
        whole = {one for one in self.known if self.gathering.is_whole(one)}
        window, dropped = self.gathering.take()
        self.gathering.recorded()
        assert window == sorted(window, key=lambda one: (one.cid, one.part))
        clients = [one.cid for one in window if one.part == "client"]
        assert sorted(bodies(list(window))) == sorted(clients)
        assert set(clients) == whole
        assert len(clients) == len(whole)
        assert not self.counted & whole
        assert whole <= self.told.keys()
        self.counted |= whole
        assert not self.dropped & dropped.keys()
        self.dropped |= dropped.keys()
        self.gathering.end()
        self.is_open = False

    @invariant()
    def nothing_is_told_twice(self) -> None:
        assert all(count == 1 for count in self.told.values())
        assert not self.counted & self.dropped

    def teardown(self) -> None:
        for _ in range(5):
            if not self.is_open:
                self.begins()
            self.commits(False)
        assert self.counted | self.dropped == self.known
        for one in self.known:
            assert self.gathering.offered(NODE, [offer(one)]).release == [one]


TestMerging = Merging.TestCase
TestMerging.settings = settings(max_examples=60, stateful_step_count=30)
