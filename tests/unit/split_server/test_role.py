"""Merged batches at a split server that has far fewer slots than there are clients."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from helpers import reference
from helpers.exact import OPTIMIZERS, Case, assert_close, in_process, spills_left


async def test_twenty_clients_are_merged_by_a_server_of_two_slots(tmp_path: Path) -> None:
    case = Case(norm=True, batch_norm="merged", optimizer="sgd", sizes=(6,), copies=20, rounds=1, tested=1)
    ran = await in_process(case, tmp_path, slots=2)
    assert [report.steps for report in ran.reports] == [40]
    expected = reference.train(
        case.parts,
        [case.samples(shard) for shard in range(case.clients)],
        F.cross_entropy,
        OPTIMIZERS["sgd"],
        seed=case.seed,
        rounds=case.rounds,
        batch_size=case.batch_size,
        shuffle=case.shuffle,
    )
    assert_close(ran.weights, expected)
    assert spills_left(tmp_path) == []
