"""The compute thread."""

from __future__ import annotations

import pytest

from zsfl.lane import compute


async def test_results_and_errors_come_back_stop_iteration_too() -> None:
    assert await compute(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await compute(divmod, 7, 0)
    nothing: list[int] = []
    with pytest.raises(RuntimeError, match="StopIteration"):
        await compute(lambda: next(iter(nothing)))
