"""What test batches get of a split server while it trains: their share, each peer its own, and all of it when nobody
trains."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import pytest

from zsfl.errors import Busy
from zsfl.split_server.trying import MAX_TEST_BYTES, MAX_TESTS, RETRY_AFTER_S, HeldOutShare


@dataclass(frozen=True)
class Batch:
    peer: str


def served(seconds: float, step_s: float, every_s: float, tests_s: dict[str, float]) -> tuple[int, dict[str, float]]:
    """Steps that a client made, which asks for the next so long after each answer, and seconds of tests by peer."""
    tests, now_s, steps, asks_s, spent_s = HeldOutShare(192), 0.0, 0, 0.0, defaultdict[str, float](float)
    while now_s < seconds:
        if asks_s <= now_s:
            tests.stepped()
        if tests.due_s <= now_s:
            peer = tests.begun(Batch(peer) for peer in tests_s).peer
            if now_s < asks_s <= now_s + tests_s[peer]:
                tests.stepped()
            now_s += tests_s[peer]
            spent_s[peer] += tests_s[peer]
            tests.ended(peer, tests_s[peer], now_s)
        elif asks_s <= now_s:
            now_s += step_s
            steps, asks_s = steps + 1, now_s + every_s
        else:
            now_s = min(asks_s, tests.due_s)
    return steps, spent_s


@pytest.mark.parametrize("test_s", [0.001, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("every_s", [0.0, 0.005, 0.1])
def test_steps_keep_most_of_the_throughput_however_long_tests_are(test_s: float, every_s: float) -> None:
    alone = 60 / (0.01 + every_s)
    steps, spent_s = served(60, 0.01, every_s, {"eve": test_s})
    assert steps >= 0.6 * alone
    assert spent_s["eve"] > 0.9 * 60 * test_s / (3 * test_s + 0.01), "nor is a test kept waiting for longer"


def test_where_nobody_trains_tests_follow_one_another_at_once() -> None:
    _, spent_s = served(60, 0.01, 1e9, {"anna": 0.1})
    assert spent_s["anna"] > 59


def test_peers_have_the_same_time_whoever_asks_for_long_ones() -> None:
    _, spent_s = served(60, 0.01, 0.0, {"eve": 1.0, "anna": 0.01, "bob": 0.02})
    assert spent_s["anna"] == pytest.approx(spent_s["eve"], abs=1.1)
    assert spent_s["bob"] == pytest.approx(spent_s["eve"], abs=1.1)


def test_one_peer_leaves_places_and_room_to_others() -> None:
    tests = HeldOutShare(192)
    for peer, places in (("eve", MAX_TESTS // 2), ("mallory", MAX_TESTS // 4)):
        for _ in range(places):
            tests.enter(peer, 1)
        with pytest.raises(Busy, match=f"test batches wait here, {places} of them yours; ask another"):
            tests.enter(peer, 1)
    tests.enter("anna", MAX_TEST_BYTES // 2)
    with pytest.raises(Busy, match="bytes of test batches wait here, 134217728 of them yours"):
        tests.enter("anna", 1)
    for number in range(MAX_TESTS // 4 - 1):
        tests.enter(str(number), 1)
    with pytest.raises(Busy, match=f"{MAX_TESTS} test batches wait here, 0 of them yours") as caught:
        tests.enter("zoe", 1)
    assert caught.value.retry_after_s == RETRY_AFTER_S
    tests.ended("0", 0.01, 1.0)
    tests.leave("0", 1)
    tests.enter("zoe", 1)
    with pytest.raises(Busy) as caught:
        tests.enter("0", 1)
    assert caught.value.retry_after_s == 0.01 * MAX_TESTS, "as long as those that wait may take"


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_a_long_one_is_taken_where_there_is_no_other(slots: int) -> None:
    tests = HeldOutShare(slots)
    for _ in range(2):
        tests.enter("anna", 2 * MAX_TEST_BYTES)
        with pytest.raises(Busy):
            tests.enter("anna", 1)
        tests.leave("anna", 2 * MAX_TEST_BYTES)
    assert tests.count == 0
