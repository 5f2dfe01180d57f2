"""Whatever bytes come, readers raise the errors of zsfl and no others; `run.py` looks further, guided by coverage."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from fuzz.targets import TARGETS, Target
from hypothesis import given, settings
from hypothesis import strategies as st

EXAMPLES = {"checkpoint": 40, "segments": 60, "mirror": 60, "weights": 80}
MOST_BYTES = 64 << 20
"""That any reader takes for an input of some thousand bytes."""
CORPUS = Path(__file__).parent / "corpus"


def bounded(target: Target, make: Callable[[], bytes], count: int) -> None:
    """Reads many inputs, and takes no more memory at any time than one of them is worth."""
    for seed in target.seeds():  # what is imported and remembered once is no matter
        target.one(seed)
    tracemalloc.start()
    try:
        for _ in range(count):
            target.one(make())
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_nearly_right(name: str) -> None:
    target, rng = TARGETS[name], Random(7)
    bounded(target, lambda: target.wild(rng), EXAMPLES.get(name, 300))


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_found_before(name: str) -> None:
    for path in sorted((CORPUS / name).glob("*")):
        TARGETS[name].one(path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes(name: str) -> None:
    target = TARGETS[name]

    @settings(max_examples=min(100, EXAMPLES.get(name, 100)))
    @given(st.one_of(st.binary(max_size=300), st.integers(0, 1 << 32).map(lambda seed: target.wild(Random(seed)))))
    def look(data: bytes) -> None:
        target.one(data)

    look()
