"""How many split servers there are to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsfl.cluster.on_ray.cluster import _bounds
from zsfl.cluster.scaling import FEW, FEWER_AFTER_S, MANY, MORE_AFTER_S, Scaling
from zsfl.errors import ConfigError

BEAT_S = 0.5


def after(scaling: Scaling, servers: int, loads: Sequence[int], begin_s: float = 0.0) -> tuple[str, float]:
    """The first thing to be done where they hold this, heartbeat by heartbeat, and when; else what it said last."""
    said, now_s = "stay", begin_s
    for beat, held in enumerate(loads):
        now_s = begin_s + beat * BEAT_S
        if (said := scaling.decide(servers, held, now_s)) != "stay":
            break
    return said, now_s


def test_work_that_lasts_brings_one_more_until_there_are_as_many_as_may_be() -> None:
    scaling, now_s = Scaling(1, 3), 0.0
    for servers in (1, 2):
        said, then_s = after(scaling, servers, [30] * 100, now_s)
        assert said == "more"
        assert MORE_AFTER_S * 0.9 <= then_s - now_s <= MORE_AFTER_S  # anew after each change
        now_s = then_s + BEAT_S
    assert after(scaling, 3, [30] * 400, now_s)[0] == "stay"


def test_a_burst_brings_none() -> None:
    assert after(Scaling(1, 3), 1, ([0] * 8 + [9] * 2) * 30)[0] == "stay"


def test_too_little_to_do_for_long_lets_one_go_down_to_the_least() -> None:
    scaling = Scaling(1, 3)
    said, then_s = after(scaling, 3, [0] * 400)
    assert said == "fewer"
    assert FEWER_AFTER_S * 0.9 <= then_s <= FEWER_AFTER_S
    assert after(scaling, 2, [0] * 400, then_s)[0] == "fewer"
    assert after(scaling, 1, [0] * 400, then_s + 100)[0] == "stay"


def test_what_was_lost_or_is_too_much_is_made_good_at_once() -> None:
    assert Scaling(2, 3).decide(1, 0, 0.0) == "more"
    assert Scaling(1, 3).decide(4, 99, 0.0) == "fewer"


@given(st.integers(1, 6), st.integers(0, 60))
def test_a_load_that_stays_brings_no_back_and_forth(servers: int, held: int) -> None:
    """Whatever a constant load makes of the number, it never makes it go one way and then the other."""
    scaling, now_s, said, turns = Scaling(1, 6), 0.0, "", list[str]()
    for _ in range(20):
        said, now_s = after(scaling, servers, [held] * 150, now_s)
        if said == "stay":
            break
        turns.append(said)
        servers += 1 if said == "more" else -1
        now_s += BEAT_S
    assert said == "stay"
    assert len(set(turns)) <= 1
    assert FEW < MANY


@pytest.mark.parametrize(
    ("given_", "means"),
    [
        ((None, None, None), (2, 2, 2)),
        ((None, 3, None), (3, 3, 3)),
        ((None, None, 4), (1, 1, 4)),
        ((2, None, None), (2, 2, 2)),
        ((1, 2, 4), (1, 2, 4)),
    ],
)
def test_bounds(given_: tuple[Any, Any, Any], means: tuple[int, int, int]) -> None:
    assert _bounds(*given_) == means


@pytest.mark.parametrize("given_", [(0, None, 2), (3, None, 2), (1, 5, 4), (3, 2, None)])
def test_bounds_that_cannot_be(given_: tuple[Any, Any, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be"):
        _bounds(*given_)
