"""Whoever stands by: what it takes itself to know of the run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from zsfl.aggregator.mirror import Mirror, Standing
from zsfl.aggregator.standby import StandbyRole
from zsfl.errors import NoPeer, Unavailable
from zsfl.ids import NodeId
from zsfl.settings import NodeSettings
from zsfl.wire.messages import CheckNeed, Request
from zsfl.wire.refusals import refusal, to_error
from zsfl.wire.succession import FileInfo, Follow, Following

ORIGIN = "b" * 12
LEDGER = FileInfo(name="ledger.jsonl", size_bytes=100, changed_us=1)


class Source:
    """An aggregator of the second epoch that names these files, and is killed before it hands over any."""

    def __init__(self, *files: FileInfo) -> None:
        self.following = Following(agrees=True, origin=ORIGIN, epoch=2, files=files)

    async def request(self, request: Request, deadline_s: float) -> Any:
        if not isinstance(request, Follow):
            raise Unavailable("killed")
        return SimpleNamespace(expect=lambda _: self.following)


def standby(folder: Path) -> Any:
    standing = Standing(holder="a" * 12, origin=ORIGIN, epoch=1, shared=True)
    standing.keep(folder)
    node = SimpleNamespace(settings=NodeSettings(), card=SimpleNamespace(id=NodeId("me")), name="me")
    mirror = Mirror(folder, 0, syncs=False)
    return StandbyRole(cast(Any, node), mirror, standing, shards=4, warm_up=lambda: None)


async def test_an_epoch_is_not_known_before_its_history_is_here(tmp_path: Path) -> None:
    """Else a copy that lacks versions would be taken for newer than a whole one of the epoch before."""
    with pytest.raises(Unavailable):
        await standby(tmp_path)._catch_up(Source(LEDGER))
    assert Standing.of(tmp_path).epoch == 1
    await standby(tmp_path)._catch_up(Source())
    assert Standing.of(tmp_path).epoch == 2


async def test_who_takes_it_for_an_aggregator_may_ask_again(tmp_path: Path) -> None:
    """It may have been one until now, at this very address: that is no fault of whoever asks."""
    with pytest.raises(NoPeer) as raised:
        await standby(tmp_path).control(CheckNeed(parts=()))
    assert isinstance(to_error(refusal(raised.value), "me"), Unavailable)
