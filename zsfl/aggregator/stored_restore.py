"""What a store has of a run, and how it comes into a folder that has less: verified, as all that comes from outside.

What is read is put beside what is there, the ledger last, so that at any moment `--resume` can go on from the folder.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from zsfl.aggregator.commit import read_chain
from zsfl.aggregator.journal import file_name
from zsfl.aggregator.progress import checkpoints
from zsfl.aggregator.run_folder import CHECKPOINT, JOURNAL, LEDGER, to_disk, whole_lines
from zsfl.aggregator.standing import Standing
from zsfl.aggregator.stored_layout import (
    HEAD_BYTES,
    MOST_BYTES,
    Came,
    Commit,
    Mark,
    commit_name,
    commit_of,
    digest_of,
    mark_of,
    parse,
)
from zsfl.errors import ConfigError, RemoteProtocolError, StorageError
from zsfl.ids import Version
from zsfl.reports import METRICS
from zsfl.spill.shared import Shared

READ_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What there is."""

    version: Version
    """The last that is recorded."""
    head: bytes
    """Of its commit."""
    name: str
    mark: Mark
    """The newest that the run can go on from, and its name."""
    ledger: bytes
    serial: int
    """The highest of any name."""


async def look(store: Shared) -> Stored | None:
    """None where no run is begun; `StorageError` where one is damaged, or the store is away."""
    names = {name: said for name in await store.names() if (said := parse(name))}
    serial = max((said.serial for said in names.values()), default=0)
    commits = {said.version for said in names.values() if said.kind == "commit"}
    marks = [(said.version, said.serial, name) for name, said in names.items() if said.kind == "mark"]
    for _, _, name in sorted(marks, reverse=True):
        if (mark := mark_of(await _whole(store, name) or b"")) is None:
            continue
        base = await store.read(commit_name(mark.version), MOST_BYTES)
        if base is None or not _is_of(mark, commit_of(base, _place(store, mark.version))):
            continue  # of an aggregator that another was quicker than, or of versions that were given up
        ledger = b"".join([await _piece(store, piece) for piece in mark.files.get(LEDGER, ())])
        version, head, more = await _go_on(store, mark, ledger, commits)
        return Stored(
            version=version, head=head or base[:HEAD_BYTES], name=name, mark=mark, ledger=ledger + more, serial=serial
        )
    if commits:
        raise StorageError(
            f"the run in {store.url} has {len(commits)} commits, and no checkpoint to go on from: give the run another "
            "name with --run, or delete what is left of this one there"
        )
    return None


def _place(store: Shared, version: int) -> str:
    return f"{commit_name(version)} in {store.url}"


def _is_of(mark: Mark, base: Commit) -> bool:
    if not mark.version:
        return base.writer == mark.writer
    return hashlib.sha256(base.line).hexdigest() == mark.line


async def _go_on(store: Shared, mark: Mark, ledger: bytes, commits: set[int]) -> tuple[Version, bytes, bytes]:
    """The last version, its head (empty: that of the mark), and the lines that follow the ledger of a mark."""
    try:
        last, version = read_chain(ledger, "", Version(0)) if ledger else ("", Version(0))
        if (last, version) != (mark.line, mark.version):
            raise RemoteProtocolError(f"it ends with version {version}")
        head, more = b"", list[bytes]()
        async for at, commit, data in _commits(store, mark.version + 1, commits):
            last, version = read_chain(commit.line + b"\n", last, version)
            if version != at:
                raise RemoteProtocolError(f"it has a record of version {version}")
            head = data[:HEAD_BYTES]
            more.append(commit.line + b"\n")
    except RemoteProtocolError as error:
        raise StorageError(
            f"the ledger of the run in {store.url} goes on to version {mark.version} as it should not: {error}; give "
            "the run another name with --run, or restore what was there"
        ) from error
    return version, head, b"".join(more)


async def _commits(store: Shared, first: int, there: set[int]) -> AsyncIterator[tuple[int, Commit, bytes]]:
    """Those from this version on, as far as they follow one another."""
    while first in there:
        some = [at for at in range(first, first + READ_AT_ONCE) if at in there]
        found = await asyncio.gather(*(store.read(commit_name(at), MOST_BYTES) for at in some))
        for at, data in zip(some, found, strict=True):
            if data is None or at != first:
                return
            yield at, commit_of(data, _place(store, at)), data
            first += 1


async def _whole(store: Shared, name: str) -> bytes | None:
    """What is under a name that says what it is; None where that is not there, or something else is."""
    said = parse(name)
    if said is None or said.size_bytes > MOST_BYTES:
        return None
    data = await store.read(name, said.size_bytes + 1)
    if data is None or len(data) != said.size_bytes or await asyncio.to_thread(digest_of, data) != said.digest:
        return None
    return data


async def _piece(store: Shared, name: str) -> bytes:
    if (data := await _whole(store, name)) is None:
        raise StorageError(
            f"{name} is not in {store.url} any more, or was altered, and without it the run cannot go on: restore it, "
            "or give the run another name with --run"
        )
    return data


async def restore(store: Shared, there: Stored, folder: Path, bound: int, model_came: Callable[[], None]) -> str:
    """Bring into a folder what it lacks; what was done, for people, empty where that was nothing.

    ConfigError when the run there is another one. `model_came` writes the code that loads a model.
    """
    mine = b"".join(line + b"\n" for line in whole_lines(folder / LEDGER))
    has_begun = bool(checkpoints(folder / CHECKPOINT))
    if has_begun and mine.startswith(there.ledger):
        return ""
    if not there.ledger.startswith(mine):
        raise ConfigError(
            f"{folder} has another run than {store.url} has by that name: move that folder away to go on with the one "
            "in the store, or give this run another name with --run"
        )
    with _storing(folder):
        for name in ("partial", "dropped"):
            shutil.rmtree(folder / CHECKPOINT / name, ignore_errors=True)
        await _bring_journal(store, there, folder, bound)
        await _bring_checkpoint(store, there.mark, folder)
        for name in (METRICS, "best.safetensors", "model.safetensors"):
            if name in there.mark.files:
                if name == "model.safetensors":
                    model_came()
                await _bring(store, there.mark.files[name], folder / name)
        _stand(there, folder)
        with _replacing(folder / LEDGER) as file:
            file.write(there.ledger)
    return f"version {there.version} of the run came from {store.url}"


def _stand(there: Stored, folder: Path) -> None:
    """Remember who may have taken over; nobody has led in this folder since."""
    mark = there.mark
    standing = msgspec.structs.replace(Standing.of(folder), led=False, origin=mark.origin, rounds=mark.rounds)
    epoch = max(standing.epoch, mark.epoch)
    holders = standing.holders if standing.epoch > mark.epoch else mark.holders
    shared = standing.shared or mark.shared
    msgspec.structs.replace(standing, epoch=epoch, shared=shared, holders=holders).keep(folder)


async def _bring_journal(store: Shared, there: Stored, folder: Path, bound: int) -> None:
    """The contributions of the versions since the checkpoint, late ones among them."""
    (folder / JOURNAL).mkdir(parents=True, exist_ok=True)
    commits = {said.version for name in await store.names() if (said := parse(name)) and said.kind == "commit"}
    first = min((at for at in commits if at > there.mark.version - bound), default=0)
    with ExitStack() as opened:
        files: dict[int, BinaryIO] = {}
        async for at, commit, _ in _commits(store, first, commits):
            for came in commit.came:
                if came.version not in files:
                    path = folder / JOURNAL / file_name(came.version)
                    files[came.version] = opened.enter_context(_replacing(path))
                try:
                    await _write(store, came, files[came.version])
                except StorageError:
                    if at > there.mark.version:
                        raise


async def _write(store: Shared, came: Came, file: BinaryIO) -> None:
    """All of it, or nothing."""
    file.write(came.data)
    start = file.tell()
    try:
        for piece in came.pieces:
            file.write(await _piece(store, piece))
    except StorageError:
        file.seek(start)
        file.truncate()
        raise


async def _bring_checkpoint(store: Shared, mark: Mark, folder: Path) -> None:
    inside = {name: pieces for name, pieces in mark.files.items() if name.startswith(CHECKPOINT)}
    aside = folder / CHECKPOINT / "partial"
    aside.mkdir(parents=True)
    for name, pieces in inside.items():
        await _bring(store, pieces, aside / Path(name).name)
    for name in {Path(name).parent.name for name in inside}:
        shutil.rmtree(folder / CHECKPOINT / name, ignore_errors=True)
        aside.rename(folder / CHECKPOINT / name)
    to_disk(folder / CHECKPOINT)


async def _bring(store: Shared, pieces: Sequence[str], path: Path) -> None:
    with _replacing(path) as file:
        for piece in pieces:
            file.write(await _piece(store, piece))


@contextmanager
def _replacing(path: Path) -> Generator[BinaryIO, None, None]:
    """A file to write to, which is in place at the end, and outlasts a loss of power then."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    to_disk(path.parent)


@contextmanager
def _storing(folder: Path) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {folder}: {error.strerror}; make room there, or choose another --runs"
        ) from error
