"""Who holds which shard."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsfl.aggregator.roster import Roster
from zsfl.errors import ConfigError, Held
from zsfl.ids import NodeId
from zsfl.ranges import ranges
from zsfl.wire.fields import ShardInfo

A, B = NodeId("a"), NodeId("b")


def info(shard: int, train: int = 10, test: int = 2) -> ShardInfo:
    return ShardInfo(shard=shard, train_samples=train, test_samples=test)


def test_shards_are_seated_until_none_is_missing() -> None:
    roster = Roster(3)
    assert roster.missing() == [0, 1, 2]
    roster.join(A, "client-0", [info(0), info(2, train=7, test=0)])
    assert roster.missing() == [1]
    roster.join(B, "client-1", [info(1)])
    roster.join(B, "client-1", [info(1)])
    assert roster.missing() == []
    assert roster.samples() == {0: 10, 1: 10, 2: 7}
    assert roster.tested() == {0, 1}
    roster.lost(B, 0.0)
    assert roster.tested() == {0}
    assert roster.samples([2]) == {2: 7}


def test_who_vanished_takes_part_for_a_while_and_who_said_goodbye_does_not() -> None:
    roster = Roster(3, return_s=5.0)
    roster.join(A, "client-0", [info(0), info(2)])
    roster.join(B, "client-1", [info(1)])
    roster.lost(A, 100.0)
    assert (roster.present(), roster.taking_part(104.9), roster.taking_part(105.0)) == ([1], [0, 1, 2], [1])
    assert (roster.next_leave_s(100.0), roster.next_leave_s(105.0)) == (105.0, math.inf)
    roster.returned(A)
    assert roster.taking_part(200.0) == [0, 1, 2]
    roster.lost(B, 200.0, said_goodbye=True)
    assert roster.taking_part(200.0) == [0, 2]
    assert roster.next_leave_s(200.0) == math.inf


def test_class_counts_are_summed_however_many_classes_each_has() -> None:
    roster = Roster(3)
    roster.join(A, "a", [ShardInfo(shard=0, train_samples=3, test_samples=0, classes=(1, 2))])
    roster.join(B, "b", [ShardInfo(shard=1, train_samples=9, test_samples=0, classes=(0, 4, 5))])
    assert roster.classes() == (1, 6, 5)
    assert roster.classes([0]) == (1, 2)
    assert roster.classes([]) == ()


def test_two_nodes_cannot_hold_one_shard_and_a_refused_one_holds_none() -> None:
    roster = Roster(2)
    roster.join(A, "client-0", [info(0)])
    with pytest.raises(Held, match="shard 0 is already held by client-0; give this client another"):
        roster.join(B, "client-1", [info(1), info(0)])
    assert roster.missing() == [1]


def test_a_shard_of_a_lost_client_can_be_taken_over_with_the_same_data() -> None:
    roster = Roster(1)
    roster.join(A, "client-0", [info(0)])
    roster.lost(A, 0.0)
    assert roster.missing() == [0]
    assert roster.samples() == {0: 10}
    assert roster.name(0) == "client-0, which is gone"
    with pytest.raises(ConfigError, match="has 11 samples at other and had 10 when the run began"):
        roster.join(B, "other", [info(0, train=11)])
    roster.join(B, "other", [info(0)])
    assert roster.missing() == []
    roster.lost(A, 0.0)  # the news of it may come twice
    assert roster.missing() == []
    with pytest.raises(Held, match="already held by other"):
        roster.join(A, "client-0", [info(0)])


def test_a_client_that_is_there_after_all_need_not_join_again() -> None:
    roster = Roster(1)
    roster.join(A, "client-0", [info(0)])
    roster.lost(A, 0.0)
    roster.returned(A)
    assert roster.missing() == []
    roster.lost(A, 0.0)
    roster.join(B, "client-1", [info(0)])
    roster.returned(A)
    assert roster.name(0) == "client-1 (shard 0)"


@pytest.mark.parametrize(
    ("offered", "says"),
    [(info(2), "shard 2 is out of range: this job has shards 0 to 1"), (info(1, train=0), "shard 1 holds no samples")],
)
def test_a_shard_that_cannot_be_is_refused(offered: ShardInfo, says: str) -> None:
    roster = Roster(2)
    with pytest.raises(ConfigError, match=says):
        roster.join(A, "client-0", [info(0), offered])
    assert roster.missing() == [0, 1]


def test_shards_are_named_for_people() -> None:
    roster = Roster(3)
    roster.join(A, "client-1", [info(1), info(2)])
    assert [roster.name(shard) for shard in range(3)] == ["shard 0 (no client yet)", "client-1", "client-1 (shard 2)"]
    several = Roster(5)
    several.join(A, "client-2-4", [info(shard) for shard in (2, 3, 4)])
    assert [several.label(shard) for shard in (2, 4)] == ["client-2-4 (shard 2)", "client-2-4 (shard 4)"]


joins = st.tuples(st.just("join"), st.sampled_from("abc"), st.sets(st.integers(0, 4), max_size=3))
losses = st.tuples(st.just("lost"), st.sampled_from("abc"), st.just(set[int]()))


@given(st.lists(joins | losses, max_size=40))
def test_whatever_comes_and_goes_each_shard_has_one_holder(events: list[tuple[str, str, set[int]]]) -> None:
    roster, holder, present = Roster(4), dict[int, str](), dict[int, bool]()
    for event, node, wanted in events:
        if event == "lost":
            roster.lost(NodeId(node), 0.0)
            present.update({shard: False for shard, name in holder.items() if name == node})
        elif 4 in wanted or any(present.get(shard) and holder[shard] != node for shard in wanted):
            with pytest.raises((ConfigError, Held)):
                roster.join(NodeId(node), node, [info(shard) for shard in wanted])
        else:
            roster.join(NodeId(node), node, [info(shard) for shard in wanted])
            holder.update(dict.fromkeys(wanted, node))
            present.update(dict.fromkeys(wanted, True))
        assert roster.missing() == [shard for shard in range(4) if not present.get(shard)]
        assert roster.samples().keys() == holder.keys()


partings = st.tuples(
    st.floats(0, 9), st.sampled_from("abc"), st.sampled_from(["lost", "lost", "goodbye", "returned", "joins"])
)


@given(st.lists(partings, max_size=20), st.sampled_from([0.0, 5.0]))
def test_who_is_gone_takes_part_until_it_leaves_and_not_a_moment_longer(
    events: list[tuple[float, str, str]], return_s: float
) -> None:
    roster, now_s = Roster(3, return_s), 100.0
    gone_since_s: dict[int, float | None] = {}
    for shard, node in enumerate("abc"):
        roster.join(NodeId(node), f"client-{shard}", [info(shard)])
        gone_since_s[shard] = None
    for after_s, node, event in events:
        now_s += after_s
        shard = "abc".index(node)
        match event:
            case "joins":
                roster.join(NodeId(node), f"client-{shard}", [info(shard)])
                gone_since_s[shard] = None
            case "returned":
                roster.returned(NodeId(node))
                gone_since_s[shard] = None
            case _ if gone_since_s[shard] is None:
                gone_since_s[shard] = -math.inf if event == "goodbye" else now_s
        if event in ("lost", "goodbye"):
            roster.lost(NodeId(node), now_s, said_goodbye=event == "goodbye")
        awaited = {n: since for n, since in gone_since_s.items() if since is not None and now_s < since + return_s}
        present = [n for n, since in gone_since_s.items() if since is None]
        assert roster.present() == present
        assert roster.taking_part(now_s) == sorted([*present, *awaited])
        leave_s = roster.next_leave_s(now_s)
        assert leave_s == min((since + return_s for since in awaited.values()), default=math.inf)
        if awaited:
            assert roster.taking_part(math.nextafter(leave_s, 0.0)) == roster.taking_part(now_s)
            assert len(roster.taking_part(leave_s)) < len(roster.taking_part(now_s))


@given(st.sets(st.integers(0, 60)))
def test_ranges_name_each_number_once(numbers: set[int]) -> None:
    text = ranges(sorted(numbers))
    named: list[int] = []
    for run in text.split(", ") if text else []:
        first, _, last = run.partition("-")
        named += range(int(first), int(last or first) + 1)
    assert named == sorted(numbers)
