"""What is left until steps were asked for is done once, in order."""

from __future__ import annotations

import pytest

from zsfl.aggregator.meanwhile import Meanwhile
from zsfl.errors import StorageError


async def test_what_is_left_is_done_once_and_in_order() -> None:
    meanwhile, done = Meanwhile(), list[str]()

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


async def test_what_it_raises_is_raised_where_it_is_done() -> None:
    meanwhile = Meanwhile()

    async def refuse() -> None:
        raise StorageError("the disk is full")

    await meanwhile.leave(refuse)
    with pytest.raises(StorageError, match="full"):
        await meanwhile.done()
    await meanwhile.done()
