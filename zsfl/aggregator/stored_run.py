"""Keeps a run in the store that nodes share, as well as in its folder: so it outlasts the aggregator's machine.

A version stands once its commit is in the store, which takes one commit of each version, so that of two aggregators
only one records it. Checkpoints follow while the next round trains. What the store has and lacks is known from what was
put and read: nothing is looked up but whether the commit before is still there.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TypeVar

import msgspec

from zsfl.aggregator.journal import file_name
from zsfl.aggregator.progress import checkpoints, place_of
from zsfl.aggregator.run_folder import CHECKPOINT, JOURNAL, LEDGER, whole_lines
from zsfl.aggregator.standing import Standing
from zsfl.aggregator.stored_layout import (
    HEAD_BYTES,
    INLINE_BYTES,
    PIECE_BYTES,
    Came,
    Commit,
    Mark,
    commit_name,
    digest_of,
    name_of,
    packed,
    parse,
)
from zsfl.aggregator.stored_restore import Stored
from zsfl.errors import ConfigError, Fenced, StorageError, StoreAway
from zsfl.ids import Version
from zsfl.node import Node
from zsfl.reports import METRICS
from zsfl.spill.shared import Shared

PUTS_AT_ONCE = 4
MOST_PIECES = 64
"""Of a file that only grows, beyond those that are full: then it is put anew."""
_Result = TypeVar("_Result")


class StoredRun:
    """The run in one folder, to be used by the node that aggregates it. Its calls may raise StoreAway."""

    def __init__(self, store: Shared, node: Node, folder: Path, bound: int, there: Stored | None) -> None:
        """`bound`: how many versions a contribution may be late; `there` is what was found of the run."""
        self._store = store
        self._folder = folder
        self._bound = bound
        self._writer = secrets.token_hex(4)
        self._node = node
        self._version = None if there is None else there.version
        """The last that is recorded there; None: the run is not there."""
        self._head = b"" if there is None else there.head
        """Of that commit."""
        self._serial = 0 if there is None else there.serial
        self._marks = [] if there is None else [(there.name, there.mark)]
        """Those that are whole, oldest first, and needed."""
        self._since = 0
        """Of which version on the journal may have what is not there."""
        self._sent: dict[int, int] = {}
        """By version, how much of its file of the journal is there."""
        self._tails: dict[tuple[int, int, int], str] = {}
        """Pieces of what is to be recorded next, by version, place and size."""
        self._next: tuple[int, bytes] | None = None
        """What is to be recorded next, the same however often it is tried."""
        self._due = asyncio.Event()
        self._lock = asyncio.Lock()
        self._trouble = False

    def close(self) -> None:
        """No more calls."""
        self._store.close()

    # --- versions ---------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Bring the store to what the folder has: the run begins, or goes on, or versions were given up.

        ConfigError when somebody else has begun a run of this name there meanwhile.
        """
        async with self._lock:
            lines = whole_lines(self._folder / LEDGER)
            if self._version is not None and self._version > len(lines):
                await self._persist(lambda: self._cut(Version(len(lines))))
            newest = checkpoints(self._folder / CHECKPOINT)[-1]
            first = place_of(newest).version
            if self._version is None:
                await self._put_mark(newest)
                self._since = max(0, first - self._bound)
                await self._claim(first, lines[first - 1] if first else b"")
            elif self._version < len(lines):
                self._since = max(0, self._version - self._bound)
            else:  # what came and was not recorded is handed over again
                self._since = len(lines)
                self._sent = {at: self._size(at) for at in (len(lines) - 1, len(lines))}
            for version in range((self._version or 0) + 1, len(lines) + 1):
                await self._node.until_written(lambda at=version: self.record(Version(at), lines[at - 1]))
            place = f"{CHECKPOINT}/{newest.name}/place.json"
            known = self._marks[-1][1].files.get(place, ()) if self._marks else ()
            if [digest_of((self._folder / place).read_bytes())] != [digest for _, digest in map(_said, known)]:
                await self._put_mark(newest)

    async def _claim(self, first: Version, line: bytes) -> None:
        """Record the version that the run begins with there; ConfigError where somebody else has begun it."""

        mine = [self._marks[-1][0]]
        try:
            await self._node.until_written(lambda: self.record(first, line))
            mine.append(commit_name(first))
            # Of one who did and went on, what begins it may be deleted by now, and what is later is not.
            is_begun = set(await self._node.until_written(self._commits)) != {first}
        except Fenced:
            is_begun = True
        if is_begun:
            with suppress(StorageError):
                await self._store.remove(mine)
            self._version = None
            self._marks.clear()
            raise ConfigError(
                f"another aggregator has begun a run of this name in {self._store.url} meanwhile: stop one of both, or "
                "give this run another name with --run"
            )

    async def record(self, version: Version, line: bytes) -> None:
        """Returns once this record of a version, and all that came until now, is there; Fenced where another is."""
        if self._version is not None and version <= self._version:
            return
        try:
            if self._next is None or self._next[0] != version:
                came = await self._came(version - 1)
                self._next = version, packed(Commit(self._writer, line, came))
            name, data = commit_name(version), self._next[1]
            if (
                not await self._store.create(name, data)
                and (there := await self._read_head(version)) != data[:HEAD_BYTES]
            ):
                if there is None:
                    self._not_there(version)
                self._fenced(version)
            # Commits are deleted in their order: where this one could be made again, the one before is gone, too.
            if self._version is not None and (there := await self._read_head(self._version)) != self._head:
                if there is None and max(await self._commits()) <= version:
                    self._not_there(self._version)
                await self._store.remove([name])
                self._fenced(version)
        except StoreAway:
            self._node.counters.add("store_refusals")
            raise
        self._version, self._head, self._next = version, data[:HEAD_BYTES], None
        self._tails.clear()

    def _fenced(self, version: int) -> NoReturn:
        raise Fenced(
            f"another aggregator has recorded version {version} of this run in {self._store.url}, and goes on from "
            "there: this one stops, and what it had not recorded counts there. Of two that go on with one run, stop one"
        )

    def _not_there(self, version: int) -> NoReturn:
        raise StoreAway(
            f"version {version} of the run, which was recorded in {self._store.url}, is not there any more, nor any "
            "later one: is it mounted, and the same as before? Restore what was there"
        )

    async def _commits(self) -> list[int]:
        """Versions that are recorded there, as far as they are needed."""
        found = (parse(name) for name in await self._store.names())
        return [said.version for said in found if said and said.kind == "commit"] or [0]

    async def _read_head(self, version: int) -> bytes | None:
        return await self._store.read(commit_name(version), HEAD_BYTES)

    async def _came(self, at: int) -> list[Came]:
        """What came since it was asked last, until this version was made."""
        ends = {version: self._size(version) for version in range(self._since, at + 1)}
        tails = [(v, self._sent.get(v, 0), end) for v, end in ends.items() if end > self._sent.get(v, 0)]
        if sum(end - start for _, start, end in tails) <= INLINE_BYTES:
            came = [Came(Version(v), self._read(v, start, end - start)) for v, start, end in tails]
        else:
            came = [Came(Version(v), pieces=await self._put_tail(v, start, end, at + 1)) for v, start, end in tails]
        self._since, self._sent = max(0, at), {version: end for version, end in ends.items() if version >= at - 1}
        return came

    async def _put_tail(self, version: int, start: int, end: int, of: int) -> list[str]:
        """What came for a version, in pieces, of which some may be there from a try before."""
        limit = asyncio.Semaphore(PUTS_AT_ONCE)

        async def put(place: int) -> str:
            at = version, place, min(PIECE_BYTES, end - place)
            async with limit:
                if at not in self._tails:
                    data = await asyncio.to_thread(self._read, *at)
                    self._tails[at] = await self._put(of, data, "piece")
                return self._tails[at]

        return list(await asyncio.gather(*(put(place) for place in range(start, end, PIECE_BYTES))))

    def _path(self, version: int) -> Path:
        return self._folder / JOURNAL / file_name(version)

    def _size(self, version: int) -> int:
        with suppress(FileNotFoundError):
            return self._path(version).stat().st_size
        return 0

    def _read(self, version: int, start: int, size: int) -> bytes:
        with self._path(version).open("rb") as file:
            return os.pread(file.fileno(), size, start)

    async def _cut(self, version: Version) -> None:
        """Later versions are no good: the last one goes first."""
        there = [(said.version, name, said.kind) for name in await self._store.names() if (said := parse(name))]
        if (newest := max(await self._commits())) > (self._version or 0):
            self._fenced(newest)  # it is not for this one to say what they are good for
        later = sorted((one for one in there if one[0] > version and one[2] != "piece"), reverse=True)
        await self._store.remove([name for _, name, kind in later if kind == "mark"])
        await self._store.remove([name for _, name, kind in later if kind == "commit"])
        self._marks = [one for one in self._marks if one[1].version <= version]
        head = await self._read_head(version)
        self._version, self._head = (None, b"") if head is None else (version, head)
        self._next = None

    # --- checkpoints ------------------------------------------------------------------------------------

    def checkpointed(self) -> None:
        """There is a new checkpoint."""
        self._due.set()

    async def run(self) -> None:
        """Put each new checkpoint there, and delete what is not needed any more."""
        while True:
            await self._due.wait()
            self._due.clear()
            await self._copy("for the moment")

    async def finish(self) -> None:
        """Put what the run has left by now, and delete all that only a run in progress needs."""
        self._due.clear()
        self._trouble = False
        await self._copy("its end is missing there", is_last=True)

    async def _copy(self, how: str, *, is_last: bool = False) -> None:
        async with self._lock:
            try:
                with suppress(FileNotFoundError):  # it was dropped: a newer one is due
                    await self._put_mark(checkpoints(self._folder / CHECKPOINT)[-1])
            except StorageError as error:
                self._due.set()
                return self._cannot(f"versions are recorded, but no checkpoint can be kept, {how}", error)
            try:
                await self._tidy(is_last=is_last)
            except StorageError as error:  # with the next checkpoint it is tried again
                return self._cannot("what the run does not need any more cannot be deleted", error)
        self._trouble = False

    def _cannot(self, what: str, error: StorageError) -> None:
        if not self._trouble:
            self._node.note(f"{what}: {error}", "warning")
        self._trouble = True

    async def _put_mark(self, checkpoint: Path) -> None:
        place, standing = place_of(checkpoint), Standing.of(self._folder)
        inside = [f"{CHECKPOINT}/{checkpoint.name}/{name}" for name in ("master.safetensors", "place.json")]
        before = self._marks[-1][1].files if self._marks else {}
        files: dict[str, list[str]] = {}
        for name in (*inside, "model.safetensors", "best.safetensors", METRICS, LEDGER):
            with suppress(FileNotFoundError):
                files[name] = await self._put_file(name, place.version, before.get(name, []), place.commit)
        if not all(name in files for name in inside):
            raise FileNotFoundError(checkpoint)
        mark = Mark(
            version=place.version,
            writer=self._writer,
            line=place.commit,
            epoch=standing.epoch,
            shared=standing.shared,
            origin=standing.origin,
            rounds=standing.rounds,
            holders=standing.holders,
            files=files,
        )
        data = msgspec.json.encode(mark)
        name = await self._persist(lambda: self._put(place.version, data, "mark"))
        kept = [one for one in self._marks if one[1].version < place.version]
        self._marks = [*kept[-1:], (name, mark)]

    async def _put_file(self, name: str, version: int, before: list[str], last: str) -> list[str]:
        """Pieces of a file as it is now; of a ledger, as far as the record with that digest."""
        with (self._folder / name).open("rb") as file:
            at = file.fileno()
            end = await asyncio.to_thread(_end_of, at, last if name == LEDGER else None)
            pieces, start = await asyncio.to_thread(_same, at, before, end)
            if len(pieces) >= MOST_PIECES + start // PIECE_BYTES:
                pieces, start = [], 0
            while start < end:
                data = await asyncio.to_thread(os.pread, at, min(PIECE_BYTES, end - start), start)
                pieces.append(await self._persist(lambda data=data: self._put(version, data, "piece")))
                start += len(data)
        return pieces

    async def _tidy(self, *, is_last: bool) -> None:
        """Delete what is older than the checkpoints that are needed."""
        self._marks = self._marks[-1:] if is_last else self._marks
        first, last = self._marks[0][1].version - self._bound, self._marks[-1][1].version
        kept = {name for name, _ in self._marks}
        kept |= {piece for _, mark in self._marks for pieces in mark.files.values() for piece in pieces}
        gone: list[str] = []
        for name in await self._store.names():
            said = parse(name)
            if said is not None and name not in kept:
                # Of the last version there may be marks and pieces that are under way.
                is_old = said.version < (last if said.kind == "mark" else first)
                if is_old or (is_last and said.kind != "commit" and said.version <= last):
                    gone.append(name)
        await self._store.remove(gone)

    # --- the store --------------------------------------------------------------------------------------

    async def _put(self, version: int, data: bytes, kind: str) -> str:
        """The name of what was put: another one each time, as a call that was given up may still write."""
        self._serial += 1
        name = await asyncio.to_thread(name_of, version, self._serial, self._writer, data, kind)
        await self._store.write(name, data)
        return name

    async def _persist(self, call: Callable[[], Awaitable[_Result]]) -> _Result:
        async def counted() -> _Result:
            try:
                return await call()
            except StoreAway:
                self._node.counters.add("store_refusals")
                raise

        return await self._node.until_written(counted)


def _said(name: str) -> tuple[int, str]:
    """Size and digest of a piece."""
    said = parse(name)
    return (said.size_bytes, said.digest) if said else (0, "")


def _end_of(file: int, last: str | None) -> int:
    """Where a file ends, or its line with this digest, or where that is empty its begin."""
    size = os.fstat(file).st_size
    if last is None or not last:
        return size if last is None else 0
    end = 0
    with os.fdopen(os.dup(file), "rb") as lines:
        lines.seek(0)
        for line in lines:
            end += len(line)
            if hashlib.sha256(line[:-1]).hexdigest() == last:
                return end
    return end


def _same(file: int, pieces: list[str], end: int) -> tuple[list[str], int]:
    """The first of these that a file still begins with, and where they end."""
    start, same = 0, list[str]()
    for piece in pieces:
        size, digest = _said(piece)
        if start + size > end or digest_of(os.pread(file, size, start)) != digest:
            break
        same.append(piece)
        start += size
    return same, start
