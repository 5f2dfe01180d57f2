"""What is left until steps were asked for is done once, and nobody waits for anybody while it is."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
from helpers.waiting import HANG_S

from zsfl.aggregator.meanwhile import Meanwhile
from zsfl.aggregator.roster import Roster
from zsfl.errors import RunFailed, StorageError
from zsfl.ids import Role
from zsfl.latest import Latest


def new(patience_s: float = HANG_S) -> tuple[Meanwhile, list[str]]:
    done: list[str] = []
    node = SimpleNamespace(
        settings=SimpleNamespace(patience_s=patience_s),
        waiting=lambda *_: nullcontext(done.append("waits")),
        hints_of_gone=lambda _: ("",),
    )
    return Meanwhile(cast(Any, node), Latest(Roster(1, 0.0))), done


async def test_what_is_left_is_done_once_and_in_order() -> None:
    meanwhile, done = new()

    async def work(name: str) -> None:
        done.append(name)

    await meanwhile.done()
    await meanwhile.leave(lambda: work("first"))
    assert done == []
    await meanwhile.leave(lambda: work("second"))
    assert done == ["first"]
    await meanwhile.done()
    await meanwhile.done()
    assert done == ["first", "second"]


async def test_it_is_done_before_anybody_is_waited_for() -> None:
    meanwhile, done = new(patience_s=0.01)

    async def work() -> None:
        done.append("work")

    await meanwhile.leave(work)
    await meanwhile.until(Role.CLIENT, lambda _: True)
    assert done == ["waits"]
    with pytest.raises(RunFailed, match=r"for 0.01 s there was no split server; .* --resume"):
        await meanwhile.until(Role.SPLIT_SERVER, lambda _: False)
    assert done == ["waits", "work", "waits"]


async def test_what_it_raises_is_raised_where_it_is_done() -> None:
    meanwhile, _ = new()

    async def refuse() -> None:
        raise StorageError("the disk is full")

    await meanwhile.leave(refuse)
    with pytest.raises(StorageError, match="full"):
        await meanwhile.done()
    await meanwhile.done()
