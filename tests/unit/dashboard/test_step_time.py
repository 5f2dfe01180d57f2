"""Where the time of a step goes, by what nodes counted."""

from __future__ import annotations

import pytest

from zsfl.dashboard.step_time import PARTS, step_time

CLIENT = {
    "steps": 10.0, "step_s": 2.0, "head_s": 0.1, "pack_s": 0.2, "asked_s": 1.0, "tail_s": 0.1, "back_s": 0.1,
    "spill_s": 0.2, "bytes_sent": 9e9,
}  # fmt: skip
SERVER = {"steps": 20.0, "queue_s": 0.4, "body_s": 0.8}


def test_the_parts_are_means_of_the_clients_steps_and_add_up() -> None:
    found = step_time({"client-0": CLIENT, "client-1": CLIENT, "server": SERVER, "aggregator": {"steps": 3.0}})
    assert list(found) == list(PARTS)
    assert found == pytest.approx(
        {"head": 0.01, "pack": 0.02, "wire": 0.04, "queue": 0.02, "body": 0.04, "tail": 0.01, "back": 0.01}
        | {"spill": 0.02, "wait": 0.03}
    )
    assert sum(found.values()) == pytest.approx(CLIENT["step_s"] / CLIENT["steps"])


def test_a_server_that_has_counted_more_than_clients_makes_nothing_negative() -> None:
    found = step_time({"client-0": CLIENT | {"step_s": 0.1}, "server": SERVER | {"body_s": 50.0}})
    assert min(found.values()) == 0.0


def test_where_nothing_was_timed_nothing_is_said() -> None:
    assert step_time({}) == {}
    assert step_time({"client": {"steps": 3.0}, "server": SERVER}) == {}
    assert step_time({"client": CLIENT | {"steps": 0.0}}) == {}
