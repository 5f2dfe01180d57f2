"""When a version has enough steps: each mode's rule, and what it makes of one slow client on a clock of its own."""

from __future__ import annotations

import heapq
import math

import pytest

from zsfl.aggregator.closing import AsyncClosing, Closing, ElasticClosing, ExactClosing, closing_for
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
    closing = begun(ElasticClosing(Elastic(quorum=0.5, grace=10.0)))
    for shard in range(4):
        assert not closing.closes(range(4), 1.0)
        closing.arrived(step(shard), 10, 1.0)
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
    assert closing.closes(range(4), 2.0)  # the late one counts towards the quorum too
    begun(closing, version=2, now_s=2.0)
    closing.expect({3: [10]})  # 3 was replaced: it owes nothing
    assert closing.missing(range(4)) == [0, 3]


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


def test_async_needs_steps_of_three_quarters_of_the_clients_and_late_ones_do_not_help() -> None:
    closing = begun(AsyncClosing(Async(), 2), version=1)
    closing.arrived(step(0, version=0), 10, 1.0)
    closing.arrived(step(1, version=1), 10, 1.0)
    closing.arrived(step(2, version=1), 10, 1.0)
    assert not closing.closes(range(4), 1.0)
    closing.arrived(step(2, version=1, k=1), 10, 1.0)
    assert closing.closes(range(4), 1.0)


def versions_made(mode: Mode, seconds: float, clients: int = 20, slow_s: float = 5.0) -> int:
    """Versions in so many seconds where a step takes everybody 1 s, give or take a little, and client 0 slow_s.

    As real clients do, each gives the next version a moment, of the length of its step, before it steps again at one.
    """
    quota = mode.quota if isinstance(mode, Async) else 1
    closing, everybody = closing_for(mode, quota), range(clients)
    sizes = {shard: [10] for shard in everybody}
    version, now_s = 0, 0.0
    events: list[tuple[float, int, str, int, int]] = []
    made: dict[int, tuple[int, int]] = dict.fromkeys(everybody, (-1, 0))
    free = set(everybody)

    def set_to_work(shard: int) -> None:
        k = made[shard][1] if made[shard][0] == version else 0
        if k < quota:
            made[shard] = version, k + 1
            free.discard(shard)
            took_s = slow_s if shard == 0 else 1.0 + shard / 1000
            heapq.heappush(events, (now_s + took_s, shard, "done", version, k))

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
                heapq.heappush(events, (now_s + 1.0, shard, "go on", version, k))
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
    assert versions_made(Elastic(), 100.0) >= 80
    assert versions_made(Async(), 100.0) >= 80
    assert versions_made(Elastic(quorum=1.0), 100.0) <= 60  # it insists on the slow one
