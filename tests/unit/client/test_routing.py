"""Which split server takes the next request."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from zsfl.client.routing import MAX_ASKED, MAX_AVOIDED_S, MAX_SHUN_S, UNKNOWN_SLOTS, ServerChooser
from zsfl.ids import NodeId
from zsfl.wire.fields import Load

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


def load(service_s: float = 0.01, *, slots: int = 4, busy: int = 0) -> Load:
    return Load(slots=slots, busy=busy, service_s=service_s)


def picks(chooser: ServerChooser, count: int = 1000) -> Counter[NodeId | None]:
    return Counter(chooser.pick(0.0) for _ in range(count))


@pytest.fixture
def chooser() -> ServerChooser:
    made = ServerChooser(random.Random(7))
    made.joined(A)
    made.joined(B)
    return made


def test_there_may_be_nobody() -> None:
    chooser = ServerChooser(random.Random(1))
    assert chooser.pick(0.0) is None
    assert chooser.next_free_s() is None


def free_after(chooser: ServerChooser, server: NodeId, now_s: float) -> float:
    """How long this server is left alone from now on; the other one has no room."""
    other = B if server == A else A
    chooser.heard(other, load(slots=0))
    free_s = chooser.next_free_s()
    chooser.heard(other, load())
    assert free_s is not None
    return free_s - now_s


def test_a_silent_server_is_tried_ever_more_seldom_until_it_serves(chooser: ServerChooser) -> None:
    now_s, pauses = 100.0, list[float]()
    for _ in range(8):
        for _ in range(3):  # requests that were under way together count once
            chooser.silent(A, now_s)
        pauses.append(free_after(chooser, A, now_s))
        now_s += pauses[-1]
    assert pauses == [1, 2, 4, 8, 16, 32, MAX_AVOIDED_S, MAX_AVOIDED_S]
    chooser.served(A)
    chooser.silent(A, now_s)
    assert free_after(chooser, A, now_s) == 1


def test_the_only_server_is_tried_again_soon_however_silent_it_was(chooser: ServerChooser) -> None:
    chooser.lost(B)
    for now_s in (10.0, 20.0, 30.0):
        chooser.silent(A, now_s)
        assert chooser.next_free_s() == now_s + 1
        chooser.unreached(A, now_s + 1)
        assert chooser.pick(now_s + 1) == A


def test_a_server_whose_work_is_lost_is_tried_ever_more_seldom_though_it_serves(chooser: ServerChooser) -> None:
    now_s, pauses = 100.0, list[float]()
    for _ in range(5):
        chooser.served(A)
        for _ in range(3):
            chooser.unreached(A, now_s)
        pauses.append(free_after(chooser, A, now_s))
        now_s += pauses[-1]
    assert pauses == [5, 10, 20, 40, MAX_AVOIDED_S]
    chooser.lost(A)
    chooser.joined(A)
    chooser.unreached(A, now_s)
    assert free_after(chooser, A, now_s) == 5


def test_a_fast_server_gets_more_in_proportion(chooser: ServerChooser) -> None:
    chooser.heard(A, load(0.01))
    chooser.heard(B, load(0.03))
    share = picks(chooser, 4000)[A] / 4000
    assert share == pytest.approx(0.75, abs=0.03)


def test_a_crowded_server_gets_less(chooser: ServerChooser) -> None:
    chooser.heard(A, load(slots=1, busy=3))
    chooser.heard(B, load(slots=4, busy=0))
    counts = picks(chooser)
    assert counts[B] > 5 * counts[A] > 0


def test_requests_of_ours_count_before_the_server_says_so(chooser: ServerChooser) -> None:
    chooser.heard(A, load())
    chooser.heard(B, load())
    for _ in range(3):
        chooser.asked(A)
    assert picks(chooser)[B] > 750
    for _ in range(3):
        chooser.answered(A)
    assert 400 < picks(chooser)[A] < 600


def test_a_new_server_is_tried_soon(chooser: ServerChooser) -> None:
    chooser.heard(A, load(0.01, busy=3))
    chooser.heard(B, load(0.02))
    chooser.joined(C)
    assert picks(chooser)[C] > 500


def test_a_server_that_refused_is_left_alone_for_a_while(chooser: ServerChooser) -> None:
    chooser.refused(A, 0.0, 2.0)
    assert picks(chooser) == {B: 1000}
    chooser.refused(B, 0.0, 1.0)
    assert chooser.pick(0.5) is None
    assert chooser.next_free_s() == 1.0
    assert chooser.pick(1.0) == B
    assert {chooser.pick(2.0) for _ in range(100)} == {A, B}


def test_no_server_can_ask_to_be_left_alone_for_long(chooser: ServerChooser) -> None:
    chooser.lost(B)
    chooser.refused(A, 10.0, 1e9)
    assert chooser.next_free_s() == 10.0 + MAX_SHUN_S


def test_one_that_was_lost_and_came_back_starts_afresh(chooser: ServerChooser) -> None:
    chooser.asked(A)
    chooser.lost(A)
    chooser.joined(A)
    chooser.answered(A)
    assert 400 < picks(chooser)[A] < 600


@given(st.lists(st.floats(0, 86_400), min_size=1, max_size=5), st.integers(1, 1 << 53), st.integers(0, 1 << 53))
def test_whatever_servers_say_one_is_picked(services_s: list[float], slots: int, busy: int) -> None:
    chooser = ServerChooser(random.Random(1))
    for number, service_s in enumerate(services_s):
        chooser.joined(NodeId(str(number)))
        chooser.heard(NodeId(str(number)), load(service_s, slots=slots, busy=busy))
    assert chooser.pick(0.0) is not None


def test_no_server_is_asked_for_more_than_it_admits(chooser: ServerChooser) -> None:
    chooser.heard(A, load(slots=2))
    chooser.heard(B, load(slots=1 << 40))
    for _ in range(2):
        chooser.asked(A)
    assert picks(chooser) == {B: 1000}
    for _ in range(MAX_ASKED):
        chooser.asked(B)
    assert (chooser.pick(0.0), chooser.next_free_s(), chooser.occupied) == (None, None, True)
    chooser.answered(A)
    assert chooser.pick(0.0) == A


def test_a_server_that_is_unknown_is_asked_for_a_few() -> None:
    chooser = ServerChooser(random.Random(1))
    chooser.joined(A)
    for _ in range(UNKNOWN_SLOTS):
        assert chooser.pick(0.0) == A
        chooser.asked(A)
    assert chooser.pick(0.0) is None
    chooser.heard(A, load(slots=UNKNOWN_SLOTS + 1))
    assert chooser.pick(0.0) == A


def test_room_is_kept_for_what_only_one_server_can_answer_well(chooser: ServerChooser) -> None:
    chooser.lost(B)
    chooser.heard(A, load(slots=1))
    chooser.asked(A)
    assert chooser.is_full(A)
    with chooser.due(A):
        chooser.answered(A)
        assert not chooser.is_full(A)
        assert chooser.pick(0.0) is None
    assert chooser.pick(0.0) == A
    chooser.heard(A, load(slots=0))
    assert (chooser.is_full(A), chooser.pick(0.0)) == (False, None)


servers = st.sampled_from([A, B, C])


class Choosing(RuleBasedStateMachine):
    """Whatever happens in whatever order, only servers that are there and not shunned are picked."""

    def __init__(self) -> None:
        super().__init__()
        self.chooser = ServerChooser(random.Random(1))
        self.now_s = 0.0
        self.free_s: dict[NodeId, float] = {}
        self.room: dict[NodeId, list[int]] = {}
        """Slots, and requests that are not answered."""

    @rule(server=servers)
    def joins(self, server: NodeId) -> None:
        self.chooser.joined(server)
        self.free_s.setdefault(server, 0.0)
        self.room.setdefault(server, [UNKNOWN_SLOTS, 0])

    @rule(server=servers)
    def is_lost(self, server: NodeId) -> None:
        self.chooser.lost(server)
        self.free_s.pop(server, None)
        self.room.pop(server, None)

    @rule(server=servers, for_s=st.floats(0, 20))
    def refuses(self, server: NodeId, for_s: float) -> None:
        self.chooser.refused(server, self.now_s, for_s)
        if server in self.free_s:
            self.free_s[server] = self.now_s + min(for_s, MAX_SHUN_S)

    @rule(server=servers, service_s=st.floats(0, 10), slots=st.integers(0, 4), busy=st.integers(0, 9))
    def says(self, server: NodeId, service_s: float, slots: int, busy: int) -> None:
        self.chooser.heard(server, load(service_s, slots=slots, busy=busy))
        if server in self.room:
            self.room[server][0] = slots

    @rule(server=servers)
    def is_asked(self, server: NodeId) -> None:
        self.chooser.asked(server)
        if server in self.room:
            self.room[server][1] += 1

    @rule(server=servers)
    def answers(self, server: NodeId) -> None:
        self.chooser.answered(server)
        if server in self.room:
            self.room[server][1] = max(0, self.room[server][1] - 1)

    @rule(seconds=st.floats(0, 3))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def picks_well(self) -> None:
        room = {server: self.free_s[server] for server, (slots, asked) in self.room.items() if asked < slots}
        free = {server for server, free_s in room.items() if free_s <= self.now_s}
        picked = self.chooser.pick(self.now_s)
        assert picked in free if free else picked is None
        assert self.chooser.next_free_s() == min(room.values(), default=None)


TestChoosing = Choosing.TestCase
