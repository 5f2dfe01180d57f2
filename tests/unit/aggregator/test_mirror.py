"""The copy of a run: at any moment one that a restart can go on from."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers.exact import Case, Ran, assert_equal, in_process
from helpers.ledger import ledger

from zsfl.aggregator.audit import audit
from zsfl.aggregator.mirror import Mirror, Source
from zsfl.aggregator.standing import Standing
from zsfl.errors import StorageError
from zsfl.ids import NodeId, Version, parse_cid
from zsfl.wire.succession import PIECE_BYTES, FetchPiece, FileInfo

CASE = Case(optimizer="adam", sizes=(7, 9), rounds=3)
ME = NodeId("me")


class Ended(Exception):
    """The process of the copy is ended."""


def copy_once(source: Source, mirror: Mirror, version: Version, most: int = 1 << 30) -> int:
    """Ask once and fetch what there is, at most so many files; how many there were."""
    request = mirror.wish(ME)
    following = source.follow(request, version)
    while not following.agrees:
        mirror.go_back()
        following = source.follow(mirror.wish(ME), version)
    fetched = 0
    for info in following.files:
        if not mirror.lacks(info):
            continue
        if fetched == most:
            raise Ended
        offset = mirror.begins_at(info)
        with mirror.receiving(info) as write:
            while offset < info.size_bytes:
                piece = FetchPiece(name=info.name, offset=offset, size_bytes=min(PIECE_BYTES, info.size_bytes - offset))
                _, parts = source.piece(piece)
                write(parts[0])
                offset += len(parts[0])
        fetched += 1
    return fetched


def copied(source: Source, mirror: Mirror, version: Version) -> None:
    while copy_once(source, mirror, version):
        pass


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return asyncio.run(in_process(CASE, tmp_path_factory.mktemp("runs"), run="mine"))


def cut(ran: Ran, folder: Path, version: int) -> Path:
    """The run's folder as it was at an earlier version."""
    shutil.copytree(ran.folder, folder)
    lines = (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_bytes(b"".join(lines[:version]))
    for path in (folder / "checkpoint").glob("round-*"):
        if int(path.name[-6:]) * len(lines) > version * CASE.rounds:
            shutil.rmtree(path)
    for path in (folder / "journal").iterdir():
        if int(path.stem[1:]) >= version:
            path.unlink()
    return folder


def versions(ran: Ran) -> Version:
    return Version(len(ledger(ran.folder)))


def test_it_grows_with_the_run_and_is_the_same_in_the_end(ran: Ran, tmp_path: Path) -> None:
    mirror = Mirror(tmp_path / "copy", 0, syncs=False)
    assert not mirror.is_usable
    for version in range(1, versions(ran) + 1):
        copied(Source(cut(ran, tmp_path / f"at-{version}", version), 0), mirror, Version(version))
        assert mirror.version == version
        assert mirror.is_usable
    assert ledger(tmp_path / "copy") == ledger(ran.folder)
    assert Mirror(tmp_path / "copy", 0, syncs=False).wish(ME) == mirror.wish(ME)


def test_no_code_is_copied_but_made_here_when_the_model_comes(ran: Ran, tmp_path: Path) -> None:
    came: list[bool] = []

    def model_came() -> None:
        came.append((tmp_path / "copy" / "model.safetensors").exists())
        if len(came) == 1:
            raise StorageError("the disk is full")

    mirror = Mirror(tmp_path / "copy", 0, syncs=False, model_came=model_came)
    with pytest.raises(StorageError, match="the disk is full"):
        copied(Source(ran.folder, 0), mirror, versions(ran))
    copied(Source(ran.folder, 0), mirror, versions(ran))
    assert {path.name for path in ran.folder.glob("*.py")} == {"load_model.py"}
    assert list((tmp_path / "copy").rglob("*.py")) == []
    assert (tmp_path / "copy" / "model.safetensors").exists()
    assert came == [False, False], "a model is in place only with what loads it"
    for name in ("load_model.py", "journal/evil.py"):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({"t": "fetch-piece", "name": name, "offset": 0, "size_bytes": 1}, FetchPiece)


@pytest.mark.parametrize("restarts", [False, True])
def test_what_came_after_a_version_was_recorded_comes_with_the_next(ran: Ran, restarts: bool, tmp_path: Path) -> None:
    folder = cut(ran, tmp_path / "at-3", 3)
    mirror = Mirror(tmp_path / "copy", 2, syncs=False)
    copied(Source(folder, 2), mirror, Version(3))
    after = cut(ran, tmp_path / "at-4", 4)
    name = "journal/v000000000002.spills"  # which the aggregator adds to until it asks for the steps of the next one
    with (after / name).open("ab") as file:
        file.write(b"a step that is late, and counted by version 4")
    if restarts:
        mirror = Mirror(tmp_path / "copy", 2, syncs=False)
    copied(Source(after, 2), mirror, Version(4))
    assert (tmp_path / "copy" / name).read_bytes() == (after / name).read_bytes()


@pytest.mark.parametrize("most", range(12))
async def test_wherever_it_is_ended_a_restart_goes_on_from_it(ran: Ran, most: int, tmp_path: Path) -> None:
    at = len(ledger(ran.folder)) // 2 + 1
    early, late = Source(cut(ran, tmp_path / "early", at), 0), Source(ran.folder, 0)
    folder = tmp_path / "copies" / "mine"
    copied(early, Mirror(folder, 0, syncs=True), Version(at))
    try:
        copy_once(late, Mirror(folder, 0, syncs=True), versions(ran), most)
    except Ended:
        assert len(ledger(folder)) in (at, versions(ran))
    Mirror(folder, 0, syncs=True)  # as whoever is elected does first
    again = await in_process(CASE, tmp_path / "copies", run="mine", resume=True)
    assert_equal(again.weights, ran.weights)
    assert [record["weights"] for record in ledger(folder)] == [record["weights"] for record in ledger(ran.folder)]


async def test_what_was_never_published_is_cut_off(ran: Ran, tmp_path: Path) -> None:
    other = await in_process(replace(CASE, seed=7), tmp_path / "other", run="mine")
    at = 3
    mixed = cut(ran, tmp_path / "mixed", at)
    alien = (other.folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)[at : at + 2]
    with (mixed / "ledger.jsonl").open("ab") as file:
        file.writelines(alien)
    mirror = Mirror(mixed, 0, syncs=False)
    assert mirror.version == at + 2
    copied(Source(ran.folder, 0), mirror, versions(ran))
    assert ledger(mixed) == ledger(ran.folder)
    assert (mixed / "superseded.jsonl").read_bytes().splitlines(keepends=True) == alien[::-1]


CHANGES = frozenset({"os.truncate", "os.remove", "os.rmdir", "os.rename"})


def killed_at(step: int, go_back: Callable[[], object]) -> bool:
    """Have another process do it, and killed before it changes a name or a length for the so-many-th time; whether it
    had come to its end before.
    """
    if not (child := os.fork()):
        changes = itertools.count()

        def seen(event: str, args: tuple[Any, ...]) -> None:
            changing = event in CHANGES or (event == "open" and isinstance(args[1], str) and args[1][0] in "wa+")
            if changing and next(changes) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(seen)
        try:
            go_back()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == 0


def test_killed_at_any_step_of_going_back_it_is_one_to_go_on_from(ran: Ran, tmp_path: Path) -> None:
    """Two versions were made that nobody was told of, by as many rounds with checkpoints of their own."""
    mixed, end = tmp_path / "mixed", versions(ran)
    shutil.copytree(ran.folder, mixed)
    before = audit(mixed)
    assert before.faults == []
    step, ended = 0, False
    while not ended:
        folder = tmp_path / f"killed-{step}"
        shutil.copytree(mixed, folder)
        ended = killed_at(step, Mirror(folder, 0, syncs=True).go_back)
        found = audit(folder)
        assert found.faults == [], step
        assert found.versions - found.verified == before.versions - before.verified, step
        mirror = Mirror(folder, 0, syncs=False)
        while mirror.version > end - 2:
            mirror.go_back()
        assert audit(folder).faults == [], step
        copied(Source(ran.folder, 0), mirror, end)
        assert ledger(folder) == ledger(ran.folder)
        assert len((folder / "superseded.jsonl").read_bytes().splitlines()) == 2
        step += 1
    assert step > 5


@pytest.mark.parametrize("good", range(8))
async def test_a_disk_that_cannot_be_looked_at_for_a_while_is_told_of_and_nothing_is_lost_by_it(
    good: int, ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the copy goes back and on again, it cannot list a folder, or look at a file, after so many looks that
    it could.
    """
    mixed = cut(ran, tmp_path / "mixed", 3)
    last = json.dumps(ledger(ran.folder)[3] | {"weights": "0" * 64}).encode() + b"\n"
    with (mixed / "ledger.jsonl").open("ab") as file:
        file.write(last)
    mirror, looks = Mirror(mixed, 0, syncs=False), 0

    def failing(look: Any) -> Any:
        def looked(path: Path, *args: Any, **named: Any) -> Any:
            nonlocal looks
            if mixed in path.parents:
                looks += 1
                if good < looks <= good + 3:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
            return look(path, *args, **named)

        return looked

    monkeypatch.setattr(Path, "iterdir", failing(Path.iterdir))
    monkeypatch.setattr(Path, "stat", failing(Path.stat))
    for _ in range(3):
        with pytest.raises(StorageError, match="Input/output error"):
            copied(Source(ran.folder, 0), mirror, versions(ran))
    copied(Source(ran.folder, 0), mirror, versions(ran))
    monkeypatch.undo()
    assert ledger(mixed) == ledger(ran.folder)
    assert (mixed / "superseded.jsonl").read_bytes().splitlines(keepends=True) == [last]
    assert mirror.wish(ME) == Mirror(mixed, 0, syncs=False).wish(ME)


def test_to_go_back_far_reads_no_ledger_as_a_whole(ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = cut(ran, tmp_path / "mixed", 3)
    record = ledger(ran.folder)[2]
    with (mixed / "ledger.jsonl").open("a") as file:
        file.writelines(json.dumps(record | {"version": version}) + "\n" for version in range(4, 1_000))
    size, read = (mixed / "ledger.jsonl").stat().st_size, 0
    pread = os.pread

    def counted(file: int, length: int, offset: int) -> bytes:
        nonlocal read
        read += length
        return pread(file, length, offset)

    mirror = Mirror(mixed, 0, syncs=False)
    monkeypatch.setattr("zsfl.aggregator.mirror.os.pread", counted)
    monkeypatch.setattr("zsfl.aggregator.mirror._TAIL_BYTES", 1 << 10)
    for version in range(998, 2, -1):
        mirror.go_back()
        assert mirror.version == version
    assert read < 20 * size
    assert mirror.wish(ME) == Mirror(cut(ran, tmp_path / "at-3", 3), 0, syncs=False).wish(ME)


def test_files_of_the_same_size_of_another_process_are_not_taken_for_the_same(ran: Ran, tmp_path: Path) -> None:
    """As after a restart that gave the run another id: it is in a checkpoint, and in the names of contributions."""
    folder, copy = cut(ran, tmp_path / "at-5", 5), tmp_path / "copy"
    copied(Source(folder, 0), Mirror(copy, 0, syncs=False), Version(5))
    names = ("checkpoint/round-000002/place.json", "journal/v000000000004.spills")
    run = parse_cid(ledger(ran.folder)[0]["counted"][0]).run.encode()
    for name in names:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data.replace(run, b"abcdef"))
        assert (folder / name).read_bytes() != data
    copied(Source(folder, 0), Mirror(copy, 0, syncs=False), Version(5))
    assert [(copy / name).read_bytes() for name in names] == [(folder / name).read_bytes() for name in names]
    assert copy_once(Source(folder, 0), Mirror(copy, 0, syncs=False), Version(5)) == 0, "nothing is fetched twice"


def test_a_record_that_the_disk_refused_half_way_is_told_to_nobody(ran: Ran, tmp_path: Path) -> None:
    folder, copy = cut(ran, tmp_path / "at-4", 4), tmp_path / "copy"
    with (folder / "ledger.jsonl").open("ab") as file:
        file.write(b'{"version": 5, "prede')
    mirror = Mirror(copy, 0, syncs=False)
    copied(Source(folder, 0), mirror, Version(4))
    assert (copy / "ledger.jsonl").read_bytes().endswith(b"\n")
    assert mirror.version == 4
    torn = FileInfo(name="ledger.jsonl", size_bytes=(folder / "ledger.jsonl").stat().st_size, changed_us=7)
    assert mirror.lacks(torn)
    with mirror.receiving(torn) as write:
        write(b'{"version": 5, "prede')
    assert not mirror.lacks(torn), "of one that is told, what there is was fetched"
    assert mirror.version == 4


def test_a_ledger_that_is_none_is_told_of_with_what_to_do(ran: Ran, tmp_path: Path) -> None:
    folder = cut(ran, tmp_path / "at-4", 4)
    wish = Mirror(cut(ran, tmp_path / "copy", 3), 0, syncs=False).wish(ME)
    (folder / "ledger.jsonl").unlink()
    (folder / "ledger.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"ledger\.jsonl cannot be read: Is a directory; .*restore it"):
        Source(folder, 0).follow(wish, Version(4))
    with pytest.raises(StorageError, match="restore it"):
        Mirror(folder, 0, syncs=False)


def test_what_outlasts_a_loss_of_power_has_its_name_on_the_disk_too(
    ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("zsfl.aggregator.mirror.to_disk", synced.append)
    copy = tmp_path / "copy"
    copied(Source(cut(ran, tmp_path / "at-5", 5), 0), Mirror(copy, 0, syncs=True), Version(5))
    assert {path for path in copy.rglob("*") if path.is_dir()} | {copy, tmp_path} == set(synced)


def test_a_file_that_is_gone_meanwhile_is_told_of(ran: Ran, tmp_path: Path) -> None:
    source = Source(tmp_path, 0)
    assert source.piece(FetchPiece(name="ledger.jsonl", offset=0, size_bytes=10))[1] == []


def test_a_full_disk_is_told_of_with_what_to_do(ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = Mirror(tmp_path / "copy", 0, syncs=False)
    info = FileInfo(name="metrics.jsonl", size_bytes=3, changed_us=1)
    (tmp_path / "copy").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="make room there"), mirror.receiving(info) as write:
        write(b"abc")


def test_a_folder_keeps_its_identity(tmp_path: Path) -> None:
    standing = Standing.of(tmp_path)
    standing.keep(tmp_path)
    assert Standing.of(tmp_path) == standing
    assert Standing.of(tmp_path / "other").holder != standing.holder
    (tmp_path / "succession.json").write_bytes(b'{"holder": 3}')
    with pytest.raises(StorageError, match="restore it"):
        Standing.of(tmp_path)
