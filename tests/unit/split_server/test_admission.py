"""How much work a split server takes on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsfl.errors import Busy
from zsfl.split_server.admission import Admission


@given(st.integers(1, 5), st.lists(st.sampled_from(["enter", "leave", "drain"]), max_size=60))
def test_no_more_than_the_slots_are_taken_and_nothing_once_draining(slots: int, events: list[str]) -> None:
    admission = Admission(slots)
    inside, draining = 0, False
    for event in events:
        match event:
            case "enter":
                if inside == slots or draining:
                    with pytest.raises(Busy):
                        admission.enter()
                else:
                    admission.enter()
                    inside += 1
            case "leave" if inside:
                admission.leave()
                inside -= 1
            case "drain":
                admission.drain()
                draining = True
            case _:
                pass
        assert (admission.load.slots, admission.load.busy) == (0 if draining else slots, inside)
        assert admission.idle == (inside == 0)


def test_what_was_begun_is_taken_also_by_a_server_that_leaves_but_not_without_room() -> None:
    admission = Admission(1)
    admission.drain()
    with pytest.raises(Busy, match="leaving"):
        admission.enter()
    admission.enter(is_begun=True)
    with pytest.raises(Busy, match="taken"):
        admission.enter(is_begun=True)
    admission.leave()
    assert admission.idle


def test_surplus_is_told_when_to_come_back() -> None:
    admission = Admission(2)
    admission.measured(0.5)
    admission.enter()
    admission.enter()
    with pytest.raises(Busy, match="all 2 slots are taken") as caught:
        admission.enter()
    assert caught.value.retry_after_s == 1.0


def test_one_that_leaves_says_so() -> None:
    admission = Admission(2)
    admission.drain()
    with pytest.raises(Busy, match="is leaving; ask another"):
        admission.enter()


@given(st.lists(st.floats(0.001, 10), min_size=1))
def test_the_service_time_begins_at_the_first_and_stays_among_those_measured(seconds: list[float]) -> None:
    admission = Admission(1)
    admission.measured(seconds[0])
    assert admission.load.service_s == seconds[0]
    for one in seconds[1:]:
        admission.measured(one)
    assert min(seconds) * 0.999 <= admission.load.service_s <= max(seconds) * 1.001


def test_the_service_time_follows_a_change() -> None:
    admission = Admission(1)
    for _ in range(50):
        admission.measured(0.01)
    for _ in range(50):
        admission.measured(0.1)
    assert admission.load.service_s == pytest.approx(0.1, rel=0.01)
