"""When a version has enough steps: each mode's rule, and what it makes of one slow client on a clock of its own."""

from __future__ import annotations

import heapq
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zsfl.aggregator.closing import AsyncClosing, Closing, ElasticClosing, ExactClosing, closing_for
from zsfl.client.role import PAUSE
from zsfl.ids import RunId, StepId, Version
from zsfl.learning.modes import Async, Elastic, Exact, Mode

RUN = RunId("abcdef")
FOUR = {shard: [10] for shard in range(4)}


def step(shard: int, version: int = 0, k: int = 0) -> StepId:
    return StepId(RUN, Version(version), shard, k)


def begun(closing: Closing, version: int = 0, now_s: float = 0.0, sizes: dict[int, list[int]] | None = None) -> Closing:
    closing.began(Version(version), FOUR if sizes is None else sizes, now_s)
    return closing


def test_exact_waits_for_every_step_of_those_who_are_there() -> None:
    closing = begun(ExactClosing(), sizes={0: [5, 5], 1: [5, 0], 2: [0, 0]})
    assert closing.missing([0, 1, 2]) == [0, 1]
    closing.arrived(step(0), 5, 1.0)
    closing.arrived(step(1), 5, 1.0)
    assert not closing.closes([0, 1, 2], 1.0)
    assert closing.closes([1, 2], 1.0)  # 0 left
    closing.arrived(step(0, k=1), 5, 2.0)
    assert closing.closes([0, 1, 2], 2.0)
    closing.expect({3: [5, 5]})
    assert (closing.closes([0, 1, 2, 3], 2.0), closing.missing([0, 1, 2, 3])) == (False, [3])
    assert closing.next_deadline_s() == math.inf


def test_exact_makes_no_version_of_nothing() -> None:
    assert not begun(ExactClosing()).closes([], 9.0)


def test_elastic_closes_at_once_when_all_are_here() -> None:
    for samples in (10, 9):  # fewer than were planned, which no mode should hang on
        closing = begun(ElasticClosing(Elastic(quorum=1.0, grace=10.0)))
        for shard in range(4):
            assert not closing.closes(range(4), 1.0)
            closing.arrived(step(shard), samples, 1.0)
        assert closing.closes(range(4), 1.0)


def test_elastic_gives_the_rest_some_grace_after_the_quorum() -> None:
    closing = begun(ElasticClosing(Elastic(quorum=0.75, grace=0.5)), now_s=100.0)
    for shard in range(3):
        closing.arrived(step(shard), 10, 101.0 + shard)
        assert closing.closes(range(4), 101.0 + shard) is False
    assert closing.next_deadline_s() == 103.0 + 1.5
    assert not closing.closes(range(4), 104.4)
    assert closing.closes(range(4), 104.5)
    assert closing.missing(range(4)) == [3]


def test_elastic_does_not_wait_for_those_who_still_owe_an_earlier_step() -> None:
    closing = begun(ElasticClosing(Elastic(quorum=0.5, grace=0.0)))
    for shard in range(2):
        closing.arrived(step(shard), 10, 1.0)
    assert closing.closes(range(4), 1.0)
    begun(closing, version=1, now_s=1.0)
    assert closing.missing(range(4)) == [0, 1]
    closing.arrived(step(2, version=0), 10, 1.5)  # late, and free again
    assert closing.missing(range(4)) == [0, 1, 2]
    closing.arrived(step(0, version=1), 10, 2.0)
    assert not closing.closes(range(4), 2.0)  # the late one is no part of a quorum of this version
    closing.arrived(step(1, version=1), 10, 2.0)
    assert closing.closes(range(4), 2.0)
    begun(closing, version=2, now_s=2.0)
    closing.expect({3: [10]})  # 3 was replaced: it owes nothing
    assert closing.missing(range(4)) == [0, 1, 3]


@pytest.mark.parametrize(("mode", "bound"), [(Elastic(late="drop"), 0), (Elastic(max_staleness=2), 2)])
def test_elastic_waits_again_for_who_owes_what_no_longer_counts(mode: Elastic, bound: int) -> None:
    closing = begun(ElasticClosing(mode))
    for version in range(1, bound + 2):
        for shard in range(3):
            closing.arrived(step(shard, version - 1), 10, float(version))
        begun(closing, version, float(version))
        assert closing.missing(range(4)) == ([0, 1, 2, 3] if version > bound else [0, 1, 2])


def test_elastic_makes_no_version_of_nothing_when_everybody_is_late() -> None:
    closing = begun(ElasticClosing(Elastic(quorum=0.5, grace=0.0, deadline_s=1.0)))
    closing.arrived(step(0), 10, 1.0)
    closing.arrived(step(1), 10, 1.0)
    begun(closing, version=1, now_s=1.0)
    begun(closing, version=2, now_s=2.0)  # nobody came to version 1, which was void
    assert closing.missing(range(4)) == []
    assert not closing.closes(range(4), 99.0)
    closing.arrived(step(2, version=0), 10, 99.0)
    assert closing.closes(range(4), 99.0)


def test_elastic_looks_for_its_quorum_again_when_somebody_joins() -> None:
    closing = begun(ElasticClosing(Elastic(quorum=0.6, grace=3.0)))
    for shard in range(3):
        closing.arrived(step(shard), 10, 1.0)
    assert not closing.closes(range(4), 1.0)
    closing.expect({4: [10], 5: [10]})
    assert not closing.closes(range(6), 5.0)
    assert closing.missing(range(6)) == [3, 4, 5]
    closing.arrived(step(4), 10, 5.5)
    assert closing.closes(range(6), 5.5)


@pytest.mark.parametrize("clients", [2, 3, 4])
def test_elastic_with_few_clients_needs_all_but_one_and_then_no_more_of_the_one_that_owes(clients: int) -> None:
    closing, everybody = ElasticClosing(Elastic()), range(clients)
    sizes = {shard: [10] for shard in everybody}
    begun(closing, version=0, now_s=0.0, sizes=sizes)
    for shard in everybody[1:]:
        closing.arrived(step(shard), 10, 1.0)
        assert not closing.closes(everybody, 1.0)
    assert not closing.closes(everybody, 1.4)
    assert closing.closes(everybody, 1.5)
    begun(closing, version=1, now_s=1.5, sizes=sizes)
    for shard in everybody[1:]:
        closing.arrived(step(shard, version=1), 10, 2.5)
    assert closing.closes(everybody, 2.5)


@pytest.mark.parametrize("mode", [Elastic(), Async(quota=1), Async(samples=1000)])
def test_who_is_stuck_with_most_of_the_data_holds_up_a_version_only_while_something_comes(mode: Mode) -> None:
    closing = closing_for(mode, 1)
    begun(closing, version=0, now_s=100.0, sizes={0: [90], 1: [5], 2: [5]})
    assert closing.next_deadline_s() == math.inf
    closing.arrived(step(1), 5, 100.5)
    assert (closing.closes(range(3), 100.5), closing.next_deadline_s()) == (False, 103.0)
    closing.arrived(step(2), 5, 101.0)
    assert (closing.closes(range(3), 105.9), closing.next_deadline_s()) == (False, 106.0)
    assert closing.closes(range(3), 106.0)


def test_elastic_waits_for_everybody_where_the_quorum_is_everything() -> None:
    closing = begun(ElasticClosing(Elastic(quorum=1.0)))
    for shard in range(3):
        closing.arrived(step(shard), 10, 1.0)
    assert (closing.closes(range(4), 1000.0), closing.next_deadline_s()) == (False, math.inf)


def test_async_does_not_wait_for_those_who_sit_a_version_out() -> None:
    closing = begun(AsyncClosing(Async(samples=1000), 2), sizes={0: [0], 1: [10], 2: [0]})
    assert closing.missing(range(3)) == [1]
    for k in range(2):
        assert not closing.closes(range(3), 1.0)
        closing.arrived(step(1, k=k), 10, 1.0)
    assert closing.closes(range(3), 1.0)
    begun(closing, version=1, sizes={0: [10], 1: [10], 2: [0]})
    assert closing.missing(range(3)) == [0, 1]  # who sat out is not slow
    for shard in range(2):
        for k in range(2):
            assert not closing.closes(range(3), 2.0)
            closing.arrived(step(shard, version=1, k=k), 10, 2.0)
    assert closing.closes(range(3), 2.0)


def test_elastic_closes_by_the_clock_if_anything_has_come() -> None:
    closing = begun(ElasticClosing(Elastic(quorum=1.0, deadline_s=5.0)))
    assert not closing.closes(range(4), 6.0)
    closing.arrived(step(1), 10, 6.5)
    assert closing.closes(range(4), 6.5)
    begun(closing, version=1, now_s=10.0)
    closing.arrived(step(1, version=1), 10, 11.0)
    assert not closing.closes(range(4), 14.9)
    assert closing.next_deadline_s() == 15.0
    assert closing.closes(range(4), 15.0)


def test_elastic_needs_the_quorum_of_those_who_are_there_only() -> None:
    closing = begun(ElasticClosing(Elastic(quorum=0.9, grace=5.0)))
    closing.arrived(step(0), 10, 1.0)
    assert not closing.closes([0, 1], 1.0)
    assert closing.closes([0], 1.0)


def test_async_counts_samples_late_ones_included() -> None:
    closing = begun(AsyncClosing(Async(samples=30), 2), version=3)
    closing.arrived(step(0, version=1), 10, 1.0)
    closing.arrived(step(1, version=3), 10, 1.0)
    assert not closing.closes(range(4), 1.0)
    closing.arrived(step(1, version=3, k=1), 10, 1.0)
    assert closing.closes(range(4), 1.0)


def test_async_closes_by_the_clock_or_when_all_have_used_their_quota() -> None:
    closing = begun(AsyncClosing(Async(samples=1000, seconds=4.0, quota=2), 2))
    assert not closing.closes(range(4), 5.0)
    closing.arrived(step(0), 10, 1.0)
    assert (closing.closes(range(4), 3.9), closing.next_deadline_s(), closing.closes(range(4), 4.0)) == (
        False,
        4.0,
        True,
    )
    closing.arrived(step(0, k=1), 10, 2.0)
    assert closing.closes([0], 2.0)
    assert closing.missing(range(4)) == [1, 2, 3]


def test_async_needs_a_step_of_nine_in_ten_clients_and_late_ones_do_not_help() -> None:
    closing = begun(AsyncClosing(Async(), 2), version=1, sizes={shard: [10] for shard in range(10)})
    for shard in range(2):
        closing.arrived(step(shard, version=0), 10, 1.0)
    for shard in range(8):
        closing.arrived(step(shard, version=1), 10, 1.0)
        assert not closing.closes(range(10), 1.0)
    assert closing.closes(range(8), 1.0)
    closing.arrived(step(8, version=1), 10, 1.0)
    assert closing.closes(range(10), 1.0)


def test_async_is_content_with_second_steps_of_others() -> None:
    closing = begun(AsyncClosing(Async(), 2), version=1)
    for k in range(2):
        closing.arrived(step(0, version=1, k=k), 10, 1.0)
        closing.arrived(step(1, version=1, k=k), 10, 1.0)
        assert closing.closes(range(4), 1.0) == (k == 1)


@pytest.mark.parametrize("mode", [Async(), Async(samples=1000, quota=1)])
def test_async_waits_for_nobody_who_was_silent_for_a_version_until_it_is_heard(mode: Async) -> None:
    closing = begun(AsyncClosing(mode, mode.quota), version=1)
    for k in range(mode.quota):
        for shard in range(3):
            closing.arrived(step(shard, version=1, k=k), 10, 1.0)
    begun(closing, version=2)
    for shard in range(3):
        assert not closing.closes(range(4), 2.0)
        closing.arrived(step(shard, version=2), 10, 2.0)
    assert closing.closes(range(4), 2.0)
    closing.arrived(step(3, version=1), 10, 2.0)  # too late for being one of those who are waited for
    assert closing.closes(range(4), 2.0)
    begun(closing, version=3)
    for shard in range(3):
        closing.arrived(step(shard, version=3), 10, 3.0)
    assert not closing.closes(range(4), 3.0)
    closing.arrived(step(3, version=3), 10, 3.0)
    begun(closing, version=4)
    for shard in range(3):
        closing.arrived(step(shard, version=4), 10, 4.0)
    begun(closing, version=5)
    closing.arrived(step(3, version=3), 10, 5.0)  # two versions late: it is slow
    begun(closing, version=6)
    for shard in range(3):
        closing.arrived(step(shard, version=6), 10, 6.0)
    assert closing.closes(range(4), 6.0)


def test_async_is_content_with_anybody_when_those_who_were_quick_are_gone() -> None:
    closing = begun(AsyncClosing(Async(), 1), version=1)
    closing.arrived(step(0, version=1), 10, 1.0)
    begun(closing, version=2)
    closing.arrived(step(1, version=0), 10, 2.0)
    assert not closing.closes([1, 2, 3], 2.0)
    closing.arrived(step(2, version=2), 10, 2.0)
    assert closing.closes([1, 2, 3], 2.0)


def test_a_quorum_that_is_none_any_more_ends_no_version() -> None:
    closing = closing_for(Elastic(quorum=0.75, grace=1.0), 2)
    sizes = {shard: [10, 10] for shard in range(2)}
    begun(closing, 0, 0.0, sizes)
    begun(closing, 1, 100.0, sizes)  # nobody delivered anything: both owe a step
    closing.arrived(step(0, version=1), 10, 101.0)
    assert not closing.closes([0, 1], 101.0)
    assert closing.next_deadline_s() == 102.0  # half of what the only punctual one has, and some grace
    closing.arrived(step(1, version=1), 10, 101.5)  # the other one has caught up: it is waited for
    assert not closing.closes([0, 1], 101.5)
    assert closing.next_deadline_s() > 102.0
    assert not closing.closes([0, 1], 102.0)
    closing.arrived(step(0, version=1, k=1), 10, 103.0)
    assert closing.closes([0, 1], 103.0)  # a quorum again, and its grace is over


modes = st.one_of(
    st.builds(
        Elastic,
        quorum=st.floats(0.1, 1),
        grace=st.floats(0, 2),
        deadline_s=st.none() | st.floats(0.1, 9),
        late=st.sampled_from(["count", "drop"]),
    ),
    st.builds(Async, samples=st.none() | st.integers(1, 90), seconds=st.none() | st.floats(0.1, 9)),
    st.just(Exact()),
)
arrivals = st.lists(st.tuples(st.floats(0, 5), st.integers(0, 3), st.integers(0, 1)), max_size=9)


@settings(max_examples=200)
@given(modes, st.lists(arrivals, min_size=1, max_size=4), st.sets(st.integers(0, 3), min_size=1))
def test_a_version_closes_at_its_deadline_and_not_before(
    mode: Mode, versions: list[list[tuple[float, int, int]]], there: set[int]
) -> None:
    closing, now_s = closing_for(mode, 2), 100.0
    sizes = {shard: [10, 10] for shard in range(4)}
    for version, coming in enumerate(versions):
        begun(closing, version, now_s, sizes)
        assert not closing.closes(there, now_s)  # whatever has happened before
        seen: set[StepId] = set()
        closes = False
        for after_s, shard, age in coming:
            made = step(shard, max(0, version - age), sum(one.shard == shard for one in seen) % 2)
            if closes or made in seen or (age and isinstance(mode, Exact)):
                continue
            deadline_s = closing.next_deadline_s()
            if seen and now_s < deadline_s <= now_s + after_s:  # nothing happens before it
                assert not closing.closes(there, math.nextafter(deadline_s, 0.0))
                closes, now_s = closing.closes(there, deadline_s), deadline_s
                assert closes
                continue
            now_s += after_s
            seen.add(made)
            closing.arrived(made, 10, now_s)
            closes = closing.closes(there, now_s)
            assert closes or now_s < closing.next_deadline_s()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), unique=True), st.sets(st.integers(0, 3)))
def test_exact_closes_when_all_steps_of_those_who_are_there_have_come(
    came: list[tuple[int, int]], there: set[int]
) -> None:
    closing = begun(ExactClosing(), sizes={shard: [5, 5] for shard in range(4)})
    for shard, k in came:
        closing.arrived(step(shard, k=k), 5, 0.0)
    due = {(shard, k) for shard in there for k in range(2)}
    assert closing.closes(there, 0.0) == (due <= set(came) and came != [])
    assert closing.missing(there) == sorted({shard for shard, _ in due - set(came)})


def versions_made(mode: Mode, seconds: float, clients: int = 20, slow_s: float = 5.0) -> int:
    """Versions in so many seconds where a step takes everybody 1 s, give or take a little, and client 0 slow_s.

    As real clients do, each gives the next version a moment, `PAUSE` steps long, before it steps again at one.
    """
    quota = mode.quota if isinstance(mode, Async) else 1
    closing, everybody = closing_for(mode, quota), range(clients)
    sizes = {shard: [10] for shard in everybody}
    took = {shard: 1.0 + shard / 1000 for shard in everybody} | {0: slow_s}
    version, now_s = 0, 0.0
    events: list[tuple[float, int, str, int, int]] = []
    made: dict[int, tuple[int, int]] = dict.fromkeys(everybody, (-1, 0))
    free = set(everybody)

    def set_to_work(shard: int) -> None:
        k = made[shard][1] if made[shard][0] == version else 0
        if k < quota:
            made[shard] = version, k + 1
            free.discard(shard)
            heapq.heappush(events, (now_s + took[shard], shard, "done", version, k))

    closing.began(Version(0), sizes, 0.0)
    for shard in everybody:
        set_to_work(shard)
    while now_s < seconds:
        alarm = closing.next_deadline_s()
        if events and events[0][0] <= max(alarm, now_s):
            now_s, shard, kind, at, k = heapq.heappop(events)
            if kind == "done":
                closing.arrived(step(shard, at, k), 10, now_s)
                free.add(shard)
                heapq.heappush(events, (now_s + PAUSE * took[shard], shard, "go on", version, k))
                if at != version:
                    set_to_work(shard)
            elif shard in free and at == version:
                set_to_work(shard)
        else:
            assert alarm < math.inf, "nobody works and nothing is due"
            now_s = alarm
        if closing.closes(everybody, now_s):
            version += 1
            closing.began(Version(version), sizes, now_s)
            for shard in sorted(free):
                set_to_work(shard)
    return version


def test_one_slow_client_holds_up_exact_mode_and_no_other() -> None:
    assert versions_made(Exact(), 100.0) == pytest.approx(20, abs=1)
    for mode, share in [(Elastic(), 0.85), (Async(), 0.95), (Async(quota=1), 0.95), (Elastic(late="drop"), 0.6)]:
        undisturbed = versions_made(mode, 100.0, slow_s=1.0)
        assert undisturbed >= 95
        assert versions_made(mode, 100.0) >= share * undisturbed
    assert versions_made(Elastic(quorum=1.0), 100.0) <= 60  # it insists on the slow one
