"""A second copy of a run's folder, on the machine of whoever stands by.

It holds what a restart needs: the newest checkpoint, the contributions of the versions since, and the ledger, which is
extended last, by records whose contributions are there. So at any moment the copy is one that `--resume` goes on from.
All of this blocks on the disk.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from io import BufferedRandom, BufferedWriter
from pathlib import Path

from zsfl.aggregator.commit import read_chain, read_record
from zsfl.aggregator.journal import file_name
from zsfl.aggregator.progress import checkpoints, drop, place_of
from zsfl.aggregator.run_folder import CHECKPOINT, JOURNAL, LEDGER, to_disk
from zsfl.errors import RemoteProtocolError, StorageError
from zsfl.ids import NodeId, Version
from zsfl.reports import METRICS
from zsfl.spill.segments import SUFFIX
from zsfl.wire.framing import Buffer
from zsfl.wire.succession import MAX_FILES, PIECE_BYTES, FetchPiece, FileInfo, Follow, Following, Piece

_MODEL = "model.safetensors"
_WHOLE = (_MODEL, "best.safetensors")
SUPERSEDED = "superseded.jsonl"
"""Records that were cut off, the last one first."""
_CHECKPOINT_FILES = ("master.safetensors", "place.json")
"""The last makes a checkpoint of it."""
_KEPT_CHECKPOINTS = 2
KEPT_FREE_BYTES = 64 << 20
"""Of the disk, whatever is to be copied."""
MOST_LEDGER_BYTES = 1 << 30
"""Fetched at once."""
_TAIL_BYTES = 1 << 16
"""Of a ledger, read at once to find its last record."""


# --- where the run is made -----------------------------------------------------------------------------------


class Source:
    """Answers those who stand by."""

    def __init__(self, folder: Path, bound: int) -> None:
        """`bound`: how many versions a contribution may be late."""
        self._folder = folder
        self._bound = bound

    def follow(self, request: Follow, version: Version) -> Following:
        """What there is that the standby has not, at this version; `StorageError` if its files cannot be read."""
        if not self._agrees(request.ledger_bytes, request.last):
            return Following(agrees=False)
        found = checkpoints(self._folder / CHECKPOINT)
        if not found:
            return Following(agrees=True)  # the run has not begun
        # Earlier ones than its oldest checkpoint needs are not kept; who has none at all starts with the newest.
        oldest = place_of(found[-1] if request.checkpoint is None else found[0])
        since = max(request.since, oldest.version - self._bound)
        # By their names: to look for them among thousands at each version would take too long.
        paths = [self._folder / JOURNAL / file_name(one) for one in range(since, version)[:MAX_FILES]]
        paths.append(self._folder / LEDGER)
        paths += [found[-1] / name for name in _CHECKPOINT_FILES]
        paths += [self._folder / name for name in (*_WHOLE, METRICS)]
        # Where there are too many the rest is named in the next answer.
        return Following(agrees=True, files=tuple(_infos(self._folder, paths[:MAX_FILES])))

    def _agrees(self, size_bytes: int, last: str) -> bool:
        if not size_bytes:
            return True
        line = _last_line(self._folder / LEDGER, size_bytes)
        return line is not None and last == hashlib.sha256(line).hexdigest()

    def piece(self, request: FetchPiece) -> tuple[Piece, Sequence[bytes]]:
        """Bytes of a file; its name was checked when the request was decoded."""
        try:
            with (self._folder / request.name).open("rb") as file:
                return Piece(), [os.pread(file.fileno(), min(request.size_bytes, PIECE_BYTES), request.offset)]
        except FileNotFoundError:
            return Piece(), []


def _infos(folder: Path, paths: Sequence[Path]) -> list[FileInfo]:
    infos: list[FileInfo] = []
    for path in paths:
        with suppress(FileNotFoundError):
            found = path.stat()
            # A record that the disk refused half-way is written anew: nobody is told of what is there of it.
            size = _whole_bytes(path) if path.name == LEDGER else found.st_size
            name = path.relative_to(folder).as_posix()
            infos.append(FileInfo(name=name, size_bytes=size, changed_us=found.st_mtime_ns // 1000))
    return infos


def _round(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("round-"))


@contextmanager
def _reading(path: Path) -> Generator[int, None, None]:
    """An open file, for `os.pread`; `StorageError`, but for one that is not there, where the disk refuses it."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield file
        finally:
            os.close(file)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}; look what is there, and restore it") from error


def _whole_bytes(ledger: Path) -> int:
    """Where its last whole line ends; 0 where there is none."""
    try:
        with _reading(ledger) as file:
            end = os.fstat(file).st_size
            while end:
                start = max(0, end - _TAIL_BYTES)
                if (found := os.pread(file, end - start, start).rfind(b"\n")) >= 0:
                    return start + found + 1
                end = start
    except FileNotFoundError:
        pass
    return 0


def _last_line(ledger: Path, size_bytes: int) -> bytes | None:
    """The line that ends at this place; None when none does."""
    try:
        with _reading(ledger) as file:
            length = _TAIL_BYTES
            while True:
                start = max(0, size_bytes - length)
                tail = os.pread(file, size_bytes - start, start)
                if len(tail) != size_bytes - start or not tail.endswith(b"\n"):
                    return None
                *before, line = tail[:-1].split(b"\n")
                if before or start == 0:
                    return line
                length *= 2
    except FileNotFoundError:
        return None


# --- where the copy is ---------------------------------------------------------------------------------------


class Mirror:
    """The copy. What is told of it is what is there, so that it goes on wherever its process was ended."""

    def __init__(self, folder: Path, bound: int, *, syncs: bool, model_came: Callable[[], None] = lambda: None) -> None:
        """With `syncs` a record outlasts a loss of power once it is there. `model_came`, called before a model that has
        come is put in place, writes the code that loads it: nobody runs what another machine wrote.
        """
        self.folder = folder
        self._model_came = model_came
        self._bound = bound
        self._syncs = syncs
        self.version: Version
        """Of the last record."""
        self._fetched: dict[str, FileInfo] = {}
        """By name, what the source told of the files that were fetched last."""
        self._look(_whole_bytes(folder / LEDGER))

    def _look(self, ledger_bytes: int) -> None:
        """Find out what is there, of a ledger as much as this."""
        ledger, last, version = self.folder / LEDGER, "", Version(0)
        if ledger_bytes:
            record, last = read_record(_last_line(ledger, ledger_bytes) or b"", f"the last line of {ledger}")
            version = record.version
        self.tidy()
        with self._looking():
            found = checkpoints(self.folder / CHECKPOINT)
        self._bytes, self._last, self.version = ledger_bytes, last, version
        self._checkpoint = _round(found[-1]) if found else None
        self._complete = _last_grown(version)
        """Contributions of earlier versions are all there."""

    def tidy(self) -> None:
        """Remove a checkpoint that has not come whole."""
        with self._looking():
            for path in checkpoints(self.folder / CHECKPOINT):
                if not (path / _CHECKPOINT_FILES[-1]).exists():
                    shutil.rmtree(path)

    @property
    def is_usable(self) -> bool:
        """Whether a run can go on from it."""
        return self._checkpoint is not None

    def wish(self, node: NodeId) -> Follow:
        """What to ask a source for."""
        return Follow(
            node=node,
            version=self.version,
            ledger_bytes=self._bytes,
            last=self._last,
            since=self._complete,
            checkpoint=self._checkpoint,
        )

    def go_back(self) -> None:
        """The source does not know the last record: who made it had been succeeded. It is kept in superseded.jsonl.

        Killed anywhere in between, it leaves a ledger of whose versions everything is there: first goes what the last
        record does not need, and what it does need after it.
        """
        ledger = self.folder / LEDGER
        if (there := _whole_bytes(ledger)) < self._bytes:  # an earlier try was stopped by the disk after it was cut
            return self._look(there)
        last = _last_line(ledger, self._bytes) or b""
        left = max(0, self._bytes - len(last) - 1)
        before = _last_line(ledger, left) if left else None
        version = read_record(before, f"a line of {ledger}").record.version if before is not None else 0
        self._fetched.clear()
        with self._storing():
            for path in checkpoints(self.folder / CHECKPOINT):
                if place_of(path).version > version:
                    drop(path)
            for path in _journal(self.folder, since=version + 1):
                path.unlink()
            self._set_aside(last)
            os.truncate(ledger, left)
            for path in _journal(self.folder, since=version):
                path.unlink()
            (self.folder / METRICS).unlink(missing_ok=True)
        self._look(left)

    def _set_aside(self, record: bytes) -> None:
        """Keep a record that is to be cut off, once."""
        path = self.folder / SUPERSEDED
        there = _whole_bytes(path)
        if there and _last_line(path, there) == record:
            return
        with path.open("ab") as file:
            file.truncate(there)  # what a killed process was writing
            file.write(record + b"\n")
            self._sync(file)

    def lacks(self, info: FileInfo) -> bool:
        """Whether this file is to be fetched.

        One of the same size may be another one, of a process that made other versions: then it was not changed in the
        same moment.
        """
        if self._fetched.get(info.name) == info:
            return False
        if info.name == LEDGER:
            return info.size_bytes > self._bytes
        with self._looking():
            try:
                found = (self.folder / info.name).stat()
            except FileNotFoundError:
                return True
            if (found.st_size, found.st_mtime_ns // 1000) != (info.size_bytes, info.changed_us):
                return True
            self._has(info)
        return False

    def begins_at(self, info: FileInfo) -> int:
        """From where on it is to be fetched."""
        return self._bytes if info.name == LEDGER else 0

    @contextmanager
    def receiving(self, info: FileInfo) -> Generator[Callable[[Buffer], object], None, None]:
        """Takes the pieces of a file, which is in place at the end; StorageError when the disk has no room.

        RemoteProtocolError for a ledger that does not go on from the one here.
        """
        path = self.folder / info.name
        aside = path.with_name(f".{path.name}.tmp")
        with self._storing():
            self._make_folder(path.parent)
            self._check_room(info)
            with aside.open("wb") as file:
                yield file.write
                self._sync(file)
            if info.name == LEDGER:
                self._extend(path, aside.read_bytes())
            else:
                if info.name == _MODEL:
                    self._model_came()
                os.utime(aside, ns=(info.changed_us * 1000, info.changed_us * 1000))
                aside.rename(path)
                self._sync_names(path.parent)
            self._has(info)

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            self._make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
            self._sync_names(folder.parent)

    def _sync_names(self, folder: Path) -> None:
        if self._syncs:
            to_disk(folder)

    def _check_room(self, info: FileInfo) -> None:
        """Whatever size is claimed, it fills no disk, and no ledger is read into memory that is none."""
        free = shutil.disk_usage(self.folder).free
        more = info.size_bytes - self.begins_at(info)
        if more > free - KEPT_FREE_BYTES:
            raise StorageError(
                f"{info.name} takes {more} bytes, and {free} are free in {self.folder}, of which {KEPT_FREE_BYTES} are "
                "kept free; make room there"
            )
        if info.name == LEDGER and more > MOST_LEDGER_BYTES:
            raise RemoteProtocolError(f"{more} bytes of a ledger at once, at most {MOST_LEDGER_BYTES} are taken")

    @contextmanager
    def _storing(self, what: str = "written", advice: str = "make room there") -> Generator[None, None, None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"the copy of the run in {self.folder} cannot be {what}: {error.strerror}; {advice}"
            ) from error

    def _looking(self) -> AbstractContextManager[None]:
        return self._storing("read", "see to that disk")

    def _has(self, info: FileInfo) -> None:
        """A file is there."""
        name = info.name
        if name.startswith(JOURNAL):
            self._complete = max(self._complete, Version(int(Path(name).stem[1:])))
        elif name.endswith(_CHECKPOINT_FILES[-1]):
            self._drop_old()
        self._fetched[name] = info

    def _extend(self, path: Path, data: bytes) -> None:
        """Append whole lines."""
        data = data[: data.rfind(b"\n") + 1]
        if not data:
            return
        last, version = read_chain(data, self._last, self.version)
        is_new = not path.exists()
        with path.open("w+b" if is_new else "r+b") as file:
            file.seek(self._bytes)
            file.truncate()
            file.write(data)
            self._sync(file)
        if is_new:
            self._sync_names(path.parent)
        self._bytes, self._last = self._bytes + len(data), last
        self.version = version
        self._complete = max(self._complete, _last_grown(version))

    def _sync(self, file: BufferedWriter | BufferedRandom) -> None:
        file.flush()
        if self._syncs:
            os.fdatasync(file.fileno())

    def _drop_old(self) -> None:
        """What an older checkpoint than the last two needs."""
        found = checkpoints(self.folder / CHECKPOINT)
        if _round(found[-1]) == self._checkpoint:
            return
        self._checkpoint = _round(found[-1])
        for path in found[:-_KEPT_CHECKPOINTS]:
            drop(path)
        first = place_of(found[-_KEPT_CHECKPOINTS:][0]).version - self._bound
        for path in _journal(self.folder, before=first):
            path.unlink()
        self._fetched = {name: info for name, info in self._fetched.items() if (self.folder / name).exists()}


def _last_grown(version: Version) -> Version:
    """Whose contributions may still become more once this one is recorded: late ones, until the next is begun."""
    return Version(max(0, version - 1))


def _journal(folder: Path, since: float = 0, before: float = math.inf) -> Iterator[Path]:
    """Files of the contributions that came for versions, oldest first."""
    found: list[Path] = []
    with suppress(FileNotFoundError):  # not by `glob`, which finds nothing where the folder cannot be read
        found += (folder / JOURNAL).iterdir()
    for path in sorted(path for path in found if path.name.startswith("v") and path.suffix == SUFFIX):
        if path.stem[1:].isdecimal() and since <= int(path.stem[1:]) < before:
            yield path
