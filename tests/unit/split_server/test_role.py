"""Merged batches at a split server that has far fewer slots than there are clients."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from helpers import reference
from helpers.exact import OPTIMIZERS, Case, assert_close, in_process, ordinary, spills_left

from zsfl.aggregator.holdup import HoldUp
from zsfl.client.driver import StepDriver
from zsfl.errors import RemoteProtocolError
from zsfl.ids import parse_cid, step_cid
from zsfl.split_server.role import SplitServerRole


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


async def test_one_that_holds_a_merged_batch_up_is_named_and_cannot_spoil_it_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins by asking for a step of nobody's shard, and for a batch of two steps; it sends its own one when it
    alone is waited for.
    """
    case = Case(norm=True, batch_norm="merged", rounds=1)
    spoiled, named = asyncio.Event(), asyncio.Event()
    make, answer, merging = StepDriver.make, SplitServerRole._answer_merged, HoldUp.merging
    spoilers: list[asyncio.Future[Any]] = []

    async def bad(self: StepDriver, cid: Any, state: Any, k: int, weights: Any, batch: Any, *args: Any, **named_: Any):
        if parse_cid(cid).shard == 2 and not named.is_set():
            x = self.local.begin(weights, cid, state.version, batch[0], batch[1], None).activations
            beyond = step_cid(state.run, 10**6, state.version)
            with pytest.raises(RemoteProtocolError, match="there is no shard 1000000: the job has 4"):
                await self._remote.forward(cid=beyond, version=state.version, seed=0, x=x)
            of_two = self._remote.forward(cid=cid, version=state.version, seed=0, x=x, at=state.merger, merged=2)
            spoilers.append(asyncio.ensure_future(of_two))
            await named.wait()
            spoilers.pop().cancel()
        else:
            await spoiled.wait()
        return await make(self, cid, state, k, weights, batch, *args, **named_)

    def answered(self: SplitServerRole, request: Any, parts: Any) -> Any:
        if request.merged == 2:
            spoiled.set()
        return answer(self, request, parts)

    def heard(self: HoldUp, shards: Iterable[int]) -> None:
        merging(self, shards)
        if self.names() == "client-2":
            named.set()

    monkeypatch.setattr(StepDriver, "make", bad)
    monkeypatch.setattr(SplitServerRole, "_answer_merged", answered)
    monkeypatch.setattr(HoldUp, "merging", heard)
    async with asyncio.timeout(30):
        ran = await in_process(case, tmp_path, beat_s=0.05)
    assert_close(ran.weights, ordinary(case))
