"""Objects in a store that nodes share: whole or none, whatever the store can or cannot do."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from helpers.waiting import HANG_S

from zsfl.errors import ConfigError, SpillCorrupt, StoreAway
from zsfl.ids import NodeId, RunId
from zsfl.settings import NodeSettings
from zsfl.spill.objects import ObjectStore, Place, name_of, store_for
from zsfl.spill.shared import AT_ONCE, DELETED_AT_ONCE, Shared
from zsfl.spill.shared import opened as opened_at

RUN = RunId("3fa9c1")
NODE = NodeId("00112233aabb")
DATA = b"some bytes" * 100


def at(data: bytes = DATA, serial: int = 1, node: str = NODE) -> Place:
    return Place(RUN, NodeId(node), name_of(serial, data))


def opened(url: str, **settings: Any) -> ObjectStore:
    store = store_for(NodeSettings(spill=url, **settings), "job")
    assert store is not None
    return store


async def test_what_is_put_is_found_and_read_until_it_is_deleted(tmp_path: Path) -> None:
    for url in (f"file://{tmp_path}/shared", f"{tmp_path}/plain", "memory://objects/put"):
        store, other = opened(url), opened(url)
        keyed = at(serial=2, node=f"{NODE}-0123456789abcdef")
        assert await other.found(RUN) == []
        await store.put(at(), DATA)
        await store.put(keyed, DATA)
        assert sorted(await other.found(RUN)) == [at(), keyed]
        assert await other.found(RunId("000000")) == []
        assert await other.get(at()) == DATA
        await store.delete([at(), keyed, at(serial=9)])
        assert await other.get(at()) is None
        assert await other.found(RUN) == []
        await store.tidy(RUN, NODE)
        await other.tidy_all(RUN)  # the other node was ended before it could
        assert list((tmp_path / "shared").rglob("*")) == []


async def test_what_is_not_what_its_name_says_is_no_object(tmp_path: Path) -> None:
    store = opened(str(tmp_path))
    await store.put(at(), DATA)
    [path] = tmp_path.rglob("*.spills")
    for harmed in (DATA[:-1], b"", DATA + b"x", b"X" + DATA[1:]):
        path.write_bytes(harmed)
        with pytest.raises(SpillCorrupt, match="is not what its name says, or not yet"):
            await store.get(at())
    for name in ("README.txt", f"{at().name}.tmp", "1-2-3.spills"):
        (path.parent / name).write_bytes(b"no object")
    assert await store.found(RUN) == [at()]


async def test_nothing_but_a_name_of_ours_becomes_a_path(tmp_path: Path) -> None:
    store = opened(str(tmp_path / "store"))
    for node, name in ((NODE, "../../x"), ("..", at().name), (NODE, f"{at().name}\n"), ("a/b", at().name)):
        with pytest.raises(SpillCorrupt, match="no object of a store"):
            await store.put(Place(RUN, NodeId(node), name), DATA)
    assert list(tmp_path.iterdir()) == []


class Refusing:
    """A file system that refuses, or does not answer until it is let go."""

    async_impl = False

    def __init__(self, error: Exception | None) -> None:
        self.error = error
        self.let_go = threading.Event()

    def makedirs(self, *_: object, **__: object) -> None:
        if self.error is None:
            self.let_go.wait(60)
        else:
            raise self.error

    def rm_file(self, path: str) -> None:
        raise PermissionError(path)


async def test_a_store_that_refuses_or_does_not_answer_is_an_error_that_says_what_to_do() -> None:
    for error, why in ((PermissionError("not yours"), "PermissionError: not yours"), (None, "no answer within 0.05 s")):
        files = Refusing(error)
        store = ObjectStore(files, "/x", "s3://bucket/x", "job", 0.05 if error is None else 30.0)
        with pytest.raises(StoreAway, match=f"cannot write spills in s3://bucket/x: {why}; check that it can be"):
            await store.put(at(), DATA)
        if error is not None:
            with pytest.raises(StoreAway, match="cannot delete spills in s3://bucket/x: PermissionError"):
                await store.delete([at()])
        files.let_go.set()
        store.close()


def test_a_store_that_cannot_be_opened_says_what_to_install_or_correct(monkeypatch: pytest.MonkeyPatch) -> None:
    assert store_for(NodeSettings(), "job") is None
    with pytest.raises(ConfigError, match=r"spills cannot go to nonsense://x: .*correct --spill"):
        store_for(NodeSettings(spill="nonsense://x"), "job")
    for wrong in ("x/y", "s3://me:secret@bucket/x", "simplecache::s3://bucket/x", "s3://a b"):
        with pytest.raises(ConfigError, match="expected a URL such as s3://bucket/folder"):
            NodeSettings(spill=wrong)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"install it with: pip install 'zsfl\[store\]'"):
        store_for(NodeSettings(spill="s3://bucket/x"), "job")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ConfigError, match=r"install it with: pip install 'zsfl\[store\]'"):
        store_for(NodeSettings(spill="/mnt/x"), "job")


async def test_the_loop_goes_on_while_a_store_takes_its_time() -> None:
    files = Refusing(None)
    store = ObjectStore(files, "/x", "slow://x", "job", 60.0)
    putting = asyncio.ensure_future(store.put(at(), DATA))
    await asyncio.sleep(0)
    assert not putting.done()
    putting.cancel()
    files.let_go.set()
    store.close()


async def test_digests_do_not_wait_for_a_store_that_answers_nobody() -> None:
    files = Refusing(None)
    store = ObjectStore(files, "/x", "slow://x", "job", 0.01)
    for _ in range(AT_ONCE):
        with pytest.raises(StoreAway):
            await store.put(at(), DATA)
    async with asyncio.timeout(HANG_S):
        assert await store.named(1, DATA) == at().name
    files.let_go.set()
    store.close()


async def test_much_is_deleted_in_calls_that_each_have_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, calls = opened(str(tmp_path)), list[int]()
    monkeypatch.setattr(store, "_delete", lambda paths: calls.append(len(paths)))
    await store.delete(at(serial=number) for number in range(DELETED_AT_ONCE + 1))
    assert calls == [DELETED_AT_ONCE, 1]


async def test_whether_a_store_keeps_two_from_writing_the_same_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", AbstractFileSystem.pipe_file)  # which looks, and then writes
    for url, once in ((f"file://{tmp_path}/shared", True), ("memory://objects/once", False)):
        files, root = opened_at(NodeSettings(spill=url))
        store = Shared(files, root, url, 30.0, "the run")
        assert await store.creates_once() == once
        assert await store.names() == []
        assert once is False or not (tmp_path / "shared").exists()
        assert [await store.create("one", b"mine"), await store.create("one", b"other")] == [True, False]
        assert (await store.read("one", 100), await store.names()) == (b"mine", ["one"])
    files, root = opened_at(NodeSettings(spill=str(tmp_path / "linkless")))

    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(files, "link", refuse)
    store = Shared(files, root, "linkless", 30.0, "the run")
    assert not await store.creates_once()
    assert [await store.create("one", b"mine"), await store.create("one", b"other")] == [True, False]
