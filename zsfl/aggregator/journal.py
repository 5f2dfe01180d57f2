"""What came for each version, kept on the disk.

Averaging reads what is large from there, so that memory does not grow with the number of spills. A restart makes again
from it what was committed since the last checkpoint, and an audit any version that it still has.

journal/v00000012.spills has the stored bytes of every contribution that was taken while version 12 was gathered, in the
format of `zsfl.spill.segments`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from zsfl.aggregator.run_folder import to_disk
from zsfl.errors import NO_DESCRIPTORS, SpillCorrupt, StorageError, lacks_descriptors
from zsfl.ids import Cid, SpillKind, Version
from zsfl.learning.averaging import Contribution
from zsfl.learning.flat import FlatLayout, FlatTensors
from zsfl.spill.layout import Buffer, decode_contribution, decode_meta, flat_bytes, header_bytes
from zsfl.spill.segments import SUFFIX, Segment, frames

IN_MEMORY_BYTES = 128 << 10
"""Gradients that are longer are read from the disk when they are summed; shorter ones stay in memory as well."""
Key = tuple[Cid, SpillKind]


def file_name(version: int) -> str:
    """Of what came while this version was gathered."""
    return f"v{version:012d}{SUFFIX}"


class Journal:
    """A file for each version. Every call may block on the disk, and raise StorageError."""

    def __init__(self, folder: Path, *, syncs: bool = False) -> None:
        """With `syncs` it remembers what `sync` has to bring to the disk."""
        self._folder = folder
        self._syncs = syncs
        self._live: Segment | None = None
        self._at = Version(0)
        """Whose file that is."""
        self._unsynced: list[Segment] = []
        """Written to since they were last brought to the disk."""
        self._has_new = False
        """Whether a file was made since then."""
        self._page = _Page()
        self._sizes: dict[Version, int] | None = None

    def begin(self, version: Version) -> None:
        """What comes from now on comes while this version is gathered."""
        path = self._path(version)
        if self._live is not None and self._live.path == path:
            return
        if self._live is not None:
            self._known()[self._at] = self._live.size_bytes
        with self._storing():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._has_new |= self._syncs and not path.exists()
            live = Segment(path, sealed=path.exists())
            live.repair()  # one that a killed process left may be torn at its end
            self._at, self._live = version, live

    def keep(self, one: Contribution, data: Buffer) -> Contribution:
        """Put the stored bytes of a contribution in place; the same contribution, not in memory if it is large."""
        live = self._live
        if live is None:
            raise TypeError("a version must have begun before its contributions are kept")
        with self._storing():
            (place,) = live.append([[data]])
        if self._syncs and live not in self._unsynced:
            self._unsynced.append(live)
        if not isinstance(one.grads, FlatTensors) or one.grads.size_bytes <= IN_MEMORY_BYTES:
            return one
        start = place + flat_bytes(data).start
        return replace(one, grads=_OnDisk(one.grads.layout, one.grads.size_bytes, self._read, live, start))

    def sync(self) -> None:
        """Returns when everything that was kept would outlast a loss of power."""
        with self._storing():
            for segment in self._unsynced:
                segment.sync()
            self._unsynced.clear()
            if self._has_new:
                for folder in (self._folder, self._folder.parent):
                    to_disk(folder)
                self._has_new = False

    def close(self) -> None:
        """Keep no more; what is there stays."""
        for segment in (*self._unsynced, *([] if self._live is None else [self._live])):
            segment.close()
        self._unsynced.clear()
        self._live = None

    def drop_before(self, version: int) -> None:
        """Delete the files of earlier versions; what was taken from them can still be read."""
        self._drop([one for one in self.sizes() if one < version])

    def drop_after(self, version: int) -> None:
        """Delete the files of later versions, and keep no more."""
        later = [one for one in self.sizes() if one > version]
        self.close()
        self._drop(later)

    def _drop(self, versions: Sequence[Version]) -> None:
        for version in versions:
            with self._storing():
                self._path(version).unlink(missing_ok=True)
            self._known().pop(version, None)

    def sizes(self) -> Mapping[Version, int]:
        """Bytes of the file of each version, oldest first."""
        known = self._known()
        if self._live is not None:
            known[self._at] = self._live.size_bytes
        return known

    def _known(self) -> dict[Version, int]:
        """Looked up once, since there may be thousands of them."""
        if self._sizes is None:
            self._sizes = {version: path.stat().st_size for version, path in self._files()}
        return self._sizes

    def kept(self, since: int = 0) -> Kept:
        """What is there of the versions gathered since then; of what came twice the copy that came last."""
        found: dict[Key, tuple[Path, int, int]] = {}
        for version, path in self._files():
            # One that a run in progress deletes meanwhile is no matter.
            with suppress(FileNotFoundError), self._storing("read"):
                if version >= since:
                    found |= found_in(path)
        return Kept(found)

    def _files(self) -> Iterator[tuple[Version, Path]]:
        """Oldest first."""
        for path in sorted(self._folder.iterdir()) if self._folder.is_dir() else ():
            if path.name[0] == "v" and path.suffix == SUFFIX and path.stem[1:].isdecimal() and path.stem.isascii():
                yield Version(int(path.stem[1:])), path

    def _path(self, version: Version) -> Path:
        return self._folder / file_name(version)

    def _read(self, segment: Segment, place: int, size: int) -> memoryview:
        """What is there, in memory that the next read uses again."""
        page = self._page.of(size)
        with self._storing("read"):
            if segment.read_into(place, page) != size:
                raise StorageError(f"the contributions of a version in {self._folder} can no longer be read")
        return page

    @contextmanager
    def _storing(self, does: str = "keep") -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(
                f"cannot {does} the contributions of a version in {self._folder}: {os.strerror(error.errno or 0)}; "
                "check that disk, and that it has room for all of them"
            ) from error


class _Page:
    """Memory for one read after another."""

    def __init__(self) -> None:
        self._memory = bytearray()

    def of(self, size: int) -> memoryview:
        if len(self._memory) < size:
            self._memory = bytearray(size)
        return memoryview(self._memory)[:size]


def found_in(path: Path) -> dict[Key, tuple[Path, int, int]]:
    """Where in a segment the spill of each key is; nothing is changed."""
    found: dict[Key, tuple[Path, int, int]] = {}
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for place, size in frames(file, os.fstat(file).st_size):
            with suppress(SpillCorrupt):
                head = os.pread(file, min(size, header_bytes(os.pread(file, 8, place))), place)
                meta = decode_meta(head)
                found[meta.cid, meta.kind] = path, place, size
    finally:
        os.close(file)
    return found


class Kept:
    """Contributions in a journal, read when they are asked for."""

    def __init__(self, found: Mapping[Key, tuple[Path, int, int]]) -> None:
        self._found = found
        self._page = _Page()

    def __contains__(self, key: Key) -> bool:
        return key in self._found

    def __iter__(self) -> Iterator[Key]:
        return iter(self._found)

    def read(self, key: Key) -> Contribution:
        """The contribution, not in memory if it is large; SpillCorrupt when its bytes are not what they were, KeyError
        when it is not here.
        """
        path, place, size = self._found[key]
        try:
            data = self._bytes(path, place, size)
        except FileNotFoundError:  # a run in progress has dropped it meanwhile
            raise KeyError(key) from None
        except OSError as error:
            if lacks_descriptors(error):
                raise StorageError(f"cannot read {path}: {NO_DESCRIPTORS}") from error
            raise SpillCorrupt(f"{path}: {error.strerror}") from error
        one = decode_contribution(data)
        if not isinstance(one.grads, FlatTensors) or one.grads.size_bytes <= IN_MEMORY_BYTES:
            return decode_contribution(bytes(data))  # the page is used again
        start = place + flat_bytes(data).start
        return replace(one, grads=_OnDisk(one.grads.layout, one.grads.size_bytes, self._bytes, path, start))

    def _bytes(self, path: Path, place: int, size: int) -> memoryview:
        page = self._page.of(size)
        with path.open("rb", buffering=0) as file:
            if os.preadv(file.fileno(), [page], place) != size:
                raise SpillCorrupt(f"{path} is shorter than it was")
        return page


_Home = TypeVar("_Home")


class _OnDisk(FlatTensors, Generic[_Home]):
    """Gradients that are read whenever they are asked for."""

    __slots__ = ("_home", "_place", "_read")

    def __init__(
        self,
        layout: FlatLayout,
        size_bytes: int,
        read: Callable[[_Home, int, int], memoryview],
        home: _Home,
        place: int,
    ) -> None:
        super().__init__(layout, torch.empty(0, dtype=layout.dtype))
        self._read, self._home, self._place, self.size_bytes = read, home, place, size_bytes

    def numbers(self) -> Tensor:
        return torch.frombuffer(self._read(self._home, self._place, self.size_bytes), dtype=self.layout.dtype)

    def __getitem__(self, name: str) -> Tensor:
        shape, _, count = self.layout.places[name]
        if not count:
            return torch.empty(shape, dtype=self.layout.dtype)
        return self.piece(name, 0, count).clone().view(shape)

    def piece(self, name: str, start: int, count: int) -> Tensor:
        size, first = self.layout.dtype.itemsize, self.layout.places[name][1] + start
        return torch.frombuffer(
            self._read(self._home, self._place + first * size, count * size), dtype=self.layout.dtype
        )
