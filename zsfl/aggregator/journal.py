"""What came for each version, kept on the disk.

Averaging reads what is large from there, so that memory does not grow with the number of spills. A restart makes again
from it what was committed since the last checkpoint, and an audit any version that it still has.

journal/v00000012.spills has the stored bytes of every contribution that was taken while version 12 was gathered, in the
format of `zsfl.spill.segments`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from zsfl.errors import SpillCorrupt, StorageError
from zsfl.ids import Cid, SpillKind, Version
from zsfl.learning.averaging import Contribution
from zsfl.learning.flat import FlatLayout, FlatTensors
from zsfl.spill.layout import Buffer, decode_contribution, decode_meta, flat_bytes, header_bytes
from zsfl.spill.segments import SUFFIX, Segment

IN_MEMORY_BYTES = 128 << 10
"""Gradients that are longer are read from the disk when they are summed; shorter ones stay in memory as well."""
Key = tuple[Cid, SpillKind]


class Journal:
    """A file for each version. Every call may block on the disk, and raise StorageError."""

    def __init__(self, folder: Path, *, syncs: bool = False) -> None:
        """With `syncs` it remembers what `sync` has to bring to the disk."""
        self._folder = folder
        self._syncs = syncs
        self._live: Segment | None = None
        self._unsynced: list[Segment] = []
        """Written to since they were last brought to the disk."""
        self._page = bytearray()
        """What was read last."""

    def begin(self, version: Version) -> None:
        """What comes from now on comes while this version is gathered."""
        path = self._path(version)
        if self._live is not None and self._live.path == path:
            return
        with self._storing():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._live = Segment(path, sealed=path.exists())
            self._live.repair()  # one that a killed process left may be torn at its end

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

    def close(self) -> None:
        """Keep no more; what is there stays."""
        for segment in (*self._unsynced, *([] if self._live is None else [self._live])):
            segment.close()
        self._unsynced.clear()
        self._live = None

    def drop_before(self, version: int) -> None:
        """Delete the files of earlier versions; what was taken from them can still be read."""
        for before, path in self._files():
            if before < version:
                with self._storing():
                    path.unlink(missing_ok=True)

    def sizes(self) -> dict[Version, int]:
        """Bytes of the file of each version, oldest first."""
        found: dict[Version, int] = {}
        for version, path in self._files():
            with suppress(FileNotFoundError):
                found[version] = path.stat().st_size
        return found

    def kept(self, since: int = 0) -> Kept:
        """What is there of the versions gathered since then."""
        found: dict[Key, tuple[Segment, int, int]] = {}
        with self._storing():
            for version, path in self._files():
                if version < since:
                    continue
                segment = Segment(path, sealed=True)
                for place, size in segment.frames():
                    with suppress(SpillCorrupt):
                        start = segment.read(place, 8)
                        meta = decode_meta(segment.read(place, min(size, header_bytes(start))))
                        found.setdefault((meta.cid, meta.kind), (segment, place, size))
        return Kept(found)

    def _files(self) -> Iterator[tuple[Version, Path]]:
        """Oldest first."""
        for path in sorted(self._folder.glob(f"v*{SUFFIX}")):
            if path.stem[1:].isdecimal() and path.stem.isascii():
                yield Version(int(path.stem[1:])), path

    def _path(self, version: Version) -> Path:
        return self._folder / f"v{version:012d}{SUFFIX}"

    def _read(self, segment: Segment, place: int, size: int) -> memoryview:
        """What is there, in memory that the next read uses again."""
        if len(self._page) < size:
            self._page = bytearray(size)
        page = memoryview(self._page)[:size]
        with self._storing():
            if segment.read_into(place, page) != size:
                raise StorageError(f"the contributions of a version in {self._folder} can no longer be read")
        return page

    @contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"cannot keep the contributions of a version in {self._folder}: {os.strerror(error.errno or 0)}; "
                "check that the disk has room for all of them"
            ) from error


class Kept:
    """Contributions in a journal, read when they are asked for."""

    def __init__(self, found: dict[Key, tuple[Segment, int, int]]) -> None:
        self._found = found

    def __contains__(self, key: Key) -> bool:
        return key in self._found

    def __iter__(self) -> Iterator[Key]:
        return iter(self._found)

    def read(self, key: Key) -> Contribution:
        """The contribution; SpillCorrupt when its bytes are not what they were, KeyError when it is not here."""
        segment, place, size = self._found[key]
        return decode_contribution(segment.read(place, size))


class _OnDisk(FlatTensors):
    """Gradients that are read whenever they are asked for."""

    __slots__ = ("_place", "_read", "_segment")

    def __init__(
        self,
        layout: FlatLayout,
        size_bytes: int,
        read: Callable[[Segment, int, int], memoryview],
        segment: Segment,
        place: int,
    ) -> None:
        super().__init__(layout, torch.empty(0, dtype=layout.dtype))
        self._read, self._segment, self._place, self.size_bytes = read, segment, place, size_bytes

    def numbers(self) -> Tensor:
        return torch.frombuffer(self._read(self._segment, self._place, self.size_bytes), dtype=self.layout.dtype)

    def __getitem__(self, name: str) -> Tensor:
        shape, start, count = self.layout.places[name]
        size = self.layout.dtype.itemsize
        if not count:
            return torch.empty(shape, dtype=self.layout.dtype)
        piece = self._read(self._segment, self._place + start * size, count * size)
        return torch.frombuffer(piece, dtype=self.layout.dtype).clone().view(shape)
