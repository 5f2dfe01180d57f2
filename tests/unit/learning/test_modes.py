"""How versions are made, and which ways of it are refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

import pytest

from zsfl.errors import ConfigError
from zsfl.learning.modes import Async, Elastic, Exact, Mode, ModeName, max_staleness, mode_name, mode_named


def test_every_mode_has_a_name_and_its_defaults() -> None:
    assert {name: mode_named(name) for name in get_args(ModeName)} == {
        "exact": Exact(),
        "elastic": Elastic(),
        "async": Async(),
    }
    for name in get_args(ModeName):
        assert mode_name(mode_named(name)) == name


@pytest.mark.parametrize("name", ["", "Exact", "sync", "exact "])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"mode is {name!r}: use 'exact', 'elastic', 'async'"):
        mode_named(name)


@pytest.mark.parametrize(
    ("mode", "bound"),
    [
        (Exact(), 0),
        (Elastic(), 16),
        (Elastic(max_staleness=3), 3),
        (Elastic(max_staleness=3, late="drop"), 0),
        (Async(max_staleness=0), 0),
        (Async(max_staleness=9), 9),
    ],
)
def test_how_late_a_step_may_be(mode: Mode, bound: int) -> None:
    assert max_staleness(mode) == bound


@pytest.mark.parametrize(
    ("kind", "field", "values"),
    [
        (Exact, "return_s", [0, -1.0, math.inf, math.nan, None, "30"]),
        (Elastic, "quorum", [0, -0.5, 1.01, math.nan, "0.8", True]),
        (Elastic, "grace", [-0.1, math.inf, math.nan, None]),
        (Elastic, "deadline_s", [0, -1.0, math.inf, math.nan, "1"]),
        (Elastic, "late", ["", "keep"]),
        (Elastic, "max_staleness", [-1, 1.5, True, 2**31]),
        (Async, "samples", [0, 1.0]),
        (Async, "seconds", [0, math.inf, math.nan]),
        (Async, "quota", [0, 2.5, 10**6]),
        (Async, "max_staleness", [-1]),
        (Async, "max_correction", [0.5, math.inf, math.nan, None]),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(kind: Any, field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=rf"^{field} is {value!r}: use"):
            kind(**{field: value})


@pytest.mark.parametrize(
    ("samples", "quota", "each"),
    [(None, 8, 1), (1, 8, 1), (40, 8, 1), (79, 8, 1), (80, 8, 2), (100, 8, 2), (10**6, 8, 8), (80, 1, 1)],
)
def test_how_many_steps_of_each_a_version_takes(samples: int | None, quota: int, each: int) -> None:
    assert Async(samples=samples, quota=quota).each(40) == each
    assert Async(samples=samples, quota=quota).each(120, 3) == each
    assert Async(samples=samples, quota=quota).each(0) == 1


def test_how_many_steps_is_not_a_matter_of_rounding() -> None:
    assert [Async(samples=100, quota=8).each(100, steps) for steps in (1, 2, 3, 7)] == [1, 2, 3, 7]


@pytest.mark.parametrize(
    "mode",
    [
        Exact(return_s=0.001),
        Elastic(quorum=1, grace=0, deadline_s=0.5, max_staleness=0),
        Async(samples=1, seconds=0.1, quota=1, max_staleness=0, max_correction=1),
    ],
)
def test_the_ends_of_each_range_will_do(mode: Mode) -> None:
    assert dataclasses.replace(mode) == mode
