"""The same training with all parts on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.exact import Case, assert_close, in_process, in_processes, ordinary, spills_left

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("tail", [True, False], ids=["u-shaped", "label-sharing"])
@pytest.mark.parametrize("processes", [False, True], ids=["in process", "processes"])
async def test_equals_training_in_one_process(processes: bool, tail: bool, merge: bool, tmp_path: Path) -> None:
    case = Case(tail=tail, merge=merge, steps=2, sizes=(13, 7, 20))
    run = in_processes if processes else in_process
    ran = await run(case, tmp_path, servers=2, device="cuda")
    assert_close(ran.weights, ordinary(case), tolerance=1e-10)  # a GPU adds in an order of its own
    assert spills_left(tmp_path) == []
