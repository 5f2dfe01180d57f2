"""A run that a store has, too: whole or not at all, one of each version, and no more than is needed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from zsfl.aggregator import stored_run
from zsfl.aggregator.commit import Record, record_of
from zsfl.aggregator.journal import file_name
from zsfl.aggregator.progress import Place
from zsfl.aggregator.standing import Standing
from zsfl.aggregator.stored_layout import INLINE_BYTES, commit_name
from zsfl.aggregator.stored_restore import look, restore
from zsfl.aggregator.stored_run import StoredRun
from zsfl.errors import ConfigError, Fenced, StorageError, StoreAway
from zsfl.ids import Version
from zsfl.metrics import Counters
from zsfl.settings import NodeSettings
from zsfl.spill.shared import Shared, opened

Data = dict[str, bytes]


class Run:
    """A run in a folder, of which versions are made, and what is in a store of it."""

    def __init__(self, folder: Path, store: Path, bound: int = 0) -> None:
        self.folder, self.place, self.bound = folder, store, bound
        self.counters, self.notes, self.version = Counters(), list[str](), 0
        (folder / "journal").mkdir(parents=True, exist_ok=True)
        (folder / "ledger.jsonl").touch()
        files, root = opened(NodeSettings(spill=str(store)))
        self.store = Shared(files, root, "test://store", 30.0, "the run")
        self.node = cast(Any, SimpleNamespace(until_written=self._once, counters=self.counters, note=self._note))
        self.stored: StoredRun

    async def _once(self, write: Callable[[], Awaitable[Any]]) -> Any:
        return await write()

    def _note(self, message: str, level: str = "info") -> None:
        self.notes.append(message)

    async def begin(self) -> StoredRun:
        """As it is begun, or gone on with from what the store has."""
        if (there := await look(self.store)) is not None:
            await restore(self.store, there, self.folder, self.bound, lambda: None)
            self.version = there.version
        else:
            Standing(holder="0123456789ab", origin="0123456789ab", epoch=0).keep(self.folder)
            self.checkpoint(0)
        self.stored = StoredRun(self.store, self.node, self.folder, self.bound, there)
        await self.stored.settle()
        return self.stored

    @property
    def lines(self) -> list[bytes]:
        return (self.folder / "ledger.jsonl").read_bytes().split(b"\n")[:-1]

    def checkpoint(self, round_: int, run: str = "3fa9c1") -> None:
        folder = self.folder / "checkpoint" / f"round-{round_:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "master.safetensors").write_bytes(b"weights %d" % self.version * 100)
        last = hashlib.sha256(self.lines[self.version - 1]).hexdigest() if self.version else ""
        place = {"version": Version(self.version), "round": round_, "run": run, "commit": last}
        rest: dict[str, Any] = {"facts": {}, "samples": {}, "memory": {}, "untested": None}
        (folder / "place.json").write_bytes(msgspec.json.encode(Place(**place, **rest)))
        (self.folder / "model.safetensors").write_bytes(b"model %d" % self.version)

    def came(self, size: int = 50) -> None:
        """Contributions of the version that is gathered."""
        with (self.folder / "journal" / file_name(self.version)).open("ab") as file:
            file.write(bytes([self.version % 251]) * size)

    def record(self, weights: str = "w") -> tuple[Version, bytes]:
        before = hashlib.sha256(self.lines[-1]).hexdigest() if self.lines else ""
        record: Record = record_of(Version(self.version), [], {}, weights)
        return record.version, msgspec.json.encode(msgspec.structs.replace(record, predecessor=before))

    async def make(self, size: int = 50, weights: str = "w") -> None:
        self.came(size)
        version, line = self.record(weights)
        await self.stored.record(version, line)
        with (self.folder / "ledger.jsonl").open("ab") as file:
            file.write(line + b"\n")
        self.version = version

    async def end_round(self, round_: int) -> None:
        self.checkpoint(round_)
        await self.stored._copy("")  # as its loop does

    def left(self) -> list[str]:
        return sorted(path.name for path in self.place.iterdir())


def files(folder: Path) -> Data:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != "succession.json"}


async def test_a_run_goes_on_in_another_folder_from_what_the_store_has(tmp_path: Path) -> None:
    first = Run(tmp_path / "a", tmp_path / "store")
    await first.begin()
    for round_ in range(1, 6):
        for size in (50, 70, 3 * INLINE_BYTES) if round_ == 5 else (50,):
            await first.make(size)
        if round_ < 5:
            await first.end_round(round_)
    assert [name for name in first.left() if name.endswith(".commit")] == [commit_name(at) for at in range(3, 8)]
    heir = Run(tmp_path / "b", tmp_path / "store")
    await heir.begin()
    needed = {name: data for name, data in files(first.folder).items() if "round-00000" not in name or "04" in name}
    needed = {name: data for name, data in needed.items() if "journal" not in name or name[-8] in "456"}
    assert {name: data for name, data in files(heir.folder).items() if "v000000000003" not in name} == needed
    assert Standing.of(heir.folder).origin == "0123456789ab"
    assert Standing.of(heir.folder).holder != "0123456789ab"
    await heir.make()
    await heir.end_round(5)
    again = Run(tmp_path / "c", tmp_path / "store")
    await again.begin()
    assert again.lines == heir.lines
    await heir.stored.finish()
    assert [name.rpartition(".")[2] for name in heir.left() if "piece" not in name] == ["mark", "commit"]
    assert {name for name in heir.left() if "piece" in name} == {
        piece for pieces in heir.stored._marks[0][1].files.values() for piece in pieces
    }


async def test_of_each_version_there_is_one_whoever_records_it(tmp_path: Path) -> None:
    one, rival = (Run(tmp_path / name, tmp_path / "store") for name in "ab")
    await one.begin()
    await one.make()
    await rival.begin()
    await one.make(weights="mine")
    with pytest.raises(Fenced, match=r"another aggregator has recorded version 2 of this run in test://store"):
        await rival.make(weights="theirs")
    assert len(rival.lines) == 1
    # Nor does one that slept while others went on, and deleted what is not needed any more.
    asleep = Run(tmp_path / "c", tmp_path / "store")
    await asleep.begin()
    for round_ in range(1, 5):
        await one.make()
        await one.end_round(round_)
    assert commit_name(3) not in one.left()
    left = one.left()
    with pytest.raises(Fenced, match="another aggregator has recorded version 3"):
        await asleep.make(weights="late")
    assert one.left() == left
    await one.make()


async def test_of_two_that_begin_one_does(tmp_path: Path) -> None:
    one, rival = (Run(tmp_path / name, tmp_path / "store") for name in "ab")
    rival.checkpoint(0)
    late = StoredRun(rival.store, rival.node, rival.folder, 0, await look(rival.store))
    await one.begin()
    await one.make()
    with pytest.raises(ConfigError, match="has begun a run of this name in test://store meanwhile"):
        await late.settle()
    assert len([name for name in one.left() if name.endswith(".mark")]) == 1
    assert (await Run(tmp_path / "c", tmp_path / "store").begin())._version == 1
    shutil.rmtree(tmp_path / "c" / "checkpoint")
    (tmp_path / "c" / "ledger.jsonl").write_bytes(rival.record("other")[1] + b"\n")
    with pytest.raises(ConfigError, match="has another run than test://store has by that name"):
        await Run(tmp_path / "c", tmp_path / "store").begin()


async def test_versions_that_are_given_up_go_from_the_store_too(tmp_path: Path) -> None:
    run = Run(tmp_path / "a", tmp_path / "store", bound=1)
    await run.begin()
    for round_ in range(1, 4):
        await run.make()
        await run.make()
        await run.end_round(round_)
    shutil.rmtree(run.folder / "checkpoint" / "round-000003")
    (run.folder / "ledger.jsonl").write_bytes(b"".join(line + b"\n" for line in run.lines[:4]))
    run.version = 4
    run.checkpoint(2, run="")
    await run.stored.settle()
    there = await look(run.store)
    assert there is not None
    assert (there.version, there.mark.version) == (4, 4)
    await run.make(weights="otherwise")
    heir = Run(tmp_path / "b", tmp_path / "store", bound=1)
    await heir.begin()
    assert heir.lines == run.lines
    assert b'"run":""' in (heir.folder / "checkpoint" / "round-000002" / "place.json").read_bytes()
    # What the other one has made meanwhile is not this one's to give up.
    await heir.make()
    (run.folder / "ledger.jsonl").write_bytes(b"".join(line + b"\n" for line in run.lines[:4]))
    with pytest.raises(Fenced):
        await run.stored.settle()
    assert commit_name(6) in run.left()


async def test_what_is_altered_or_half_written_is_not_gone_on_from(tmp_path: Path) -> None:
    run = Run(tmp_path / "a", tmp_path / "store")
    await run.begin()
    for round_ in (1, 2):
        await run.make()
        await run.end_round(round_)
    await run.make()
    commit, *_ = [path for path in run.place.iterdir() if path.name == commit_name(3)]
    whole = commit.read_bytes()
    commit.write_bytes(whole[:-1] + b"?")
    with pytest.raises(StorageError, match=r"v000000000003.commit in test://store is no commit: it does not match"):
        await look(run.store)
    commit.write_bytes(whole)
    [*_, mark] = sorted(run.place.glob("*.mark"))
    mark.write_bytes(mark.read_bytes()[:-5])
    there = await look(run.store)
    assert there is not None
    assert (there.mark.version, there.version) == (1, 3)  # from the checkpoint before, to the same version
    master = there.mark.files["checkpoint/round-000001/master.safetensors"][0]
    (run.place / master).write_bytes(b"another")
    with pytest.raises(StorageError, match=r"was altered, and without it the run cannot go on"):
        await restore(run.store, there, tmp_path / "b", 0, lambda: None)
    for path in run.place.glob("*.mark"):
        path.unlink()
    with pytest.raises(StorageError, match="and no checkpoint to go on from"):
        await look(run.store)


async def test_an_answer_that_is_lost_is_no_record_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "a", tmp_path / "store")
    monkeypatch.setattr(stored_run, "INLINE_BYTES", 10)
    monkeypatch.setattr(stored_run, "PIECE_BYTES", 40)
    await run.begin()
    await run.make()
    create, write = run.store.create, run.store.write

    async def lost(name: str, data: bytes) -> bool:
        await create(name, data)
        raise StoreAway("no answer")

    async def away(name: str, data: bytes) -> None:
        raise StoreAway("away")

    for method, broken, usual in (("write", away, write), ("create", lost, create)):
        monkeypatch.setattr(run.store, method, broken)
        with pytest.raises(StoreAway):
            await run.make()
        assert len(run.lines) == 1
        monkeypatch.setattr(run.store, method, usual)
    assert run.counters.snapshot()["store_refusals"] == 2
    run.came()  # while it was away
    await run.make()
    await run.make()
    heir = Run(tmp_path / "b", tmp_path / "store")
    await heir.begin()
    assert heir.lines == run.lines
    name = f"journal/{file_name(1)}"
    assert files(heir.folder)[name] == files(run.folder)[name]


async def test_a_store_that_lost_what_it_had_is_away_and_no_rival(tmp_path: Path) -> None:
    run = Run(tmp_path / "a", tmp_path / "store")
    await run.begin()
    await run.make()
    run.place.rename(tmp_path / "unmounted")
    with pytest.raises(StoreAway, match=r"version 1 of the run, which was recorded in test://store, is not there any"):
        await run.make()
    shutil.rmtree(run.place)
    (tmp_path / "unmounted").rename(run.place)
    await run.make()
    assert [len(run.lines), run.version] == [2, 2]
