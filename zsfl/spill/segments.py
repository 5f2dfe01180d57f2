"""Files that many small spills share: records are appended, and the file goes when none of them is held any more.

A record is the 8 bytes `zsflspil`, the length of the spill in 8 bytes (little-endian), and the spill, whose own
checksum says whether it is whole. A process that is killed while it appends leaves a last record that is not.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from zsfl.errors import SpillCorrupt
from zsfl.spill.layout import Buffer, SpillMeta, decode

SUFFIX = ".spills"
MAX_SEGMENT_BYTES = 4 << 20
"""A longer one is appended to no more: one spill that is never released keeps no more than this on the disk."""
_MAGIC = b"zsflspil"
_FRAME_BYTES = len(_MAGIC) + 8
_MOST_PIECES = 512
"""Handed to the operating system at once, which takes 1,024 at most."""


def frames(file: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """As `Segment.frames`, of an open file of this size."""
    end = 0
    while (frame := os.pread(file, _FRAME_BYTES, end)).startswith(_MAGIC) and len(frame) == _FRAME_BYTES:
        place, size = end + _FRAME_BYTES, int.from_bytes(frame[len(_MAGIC) :], "little")
        end = place + size
        if end > size_bytes:
            break
        yield place, size


def joined(records: Sequence[bytes]) -> tuple[bytes, list[int]]:
    """The bytes of a segment of these records, and where each begins."""
    places: list[int] = []
    pieces: list[bytes] = []
    end = 0
    for record in records:
        pieces += [_MAGIC + len(record).to_bytes(8, "little"), record]
        places.append(end + _FRAME_BYTES)
        end = places[-1] + len(record)
    return b"".join(pieces), places


def parted(data: bytes) -> Iterator[tuple[int, memoryview]]:
    """The records of such bytes, and where each begins; SpillCorrupt where they are no segment."""
    end = 0
    while end < len(data):
        place = end + _FRAME_BYTES
        end = place + int.from_bytes(data[place - 8 : place], "little")
        if end > len(data) or not data.startswith(_MAGIC, place - _FRAME_BYTES):
            raise SpillCorrupt(f"no spill begins at byte {place} of {len(data)}")
        yield place, memoryview(data)[place:end]


class Segment:
    """One such file. Every call may raise OSError."""

    def __init__(self, path: Path, *, sealed: bool = False) -> None:
        """A new file, or with `sealed` one that is there and is only read."""
        self.path = path
        self.sealed = sealed
        self.held = 0
        """Records that are not released, as far as somebody counts them."""
        flags = os.O_RDWR if sealed else os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._file = os.open(path, flags | os.O_CLOEXEC, 0o666)
        self._closing = weakref.finalize(self, os.close, self._file)
        self.size_bytes = os.fstat(self._file).st_size

    @property
    def is_full(self) -> bool:
        """Whether the next record goes to another segment."""
        return self.sealed or self.size_bytes >= MAX_SEGMENT_BYTES

    def append(self, records: Sequence[Sequence[Buffer]]) -> list[int]:
        """Append records, each given in pieces; where each begins. All of them are in place, or none."""
        places: list[int] = []
        queue: list[Buffer] = []
        end = self.size_bytes
        for record in records:
            size = sum(memoryview(piece).nbytes for piece in record)
            queue += [_MAGIC + size.to_bytes(8, "little"), *record]
            places.append(end + _FRAME_BYTES)
            end += _FRAME_BYTES + size
        try:
            self._write(queue, end - self.size_bytes)
        except OSError:
            self.sealed = True  # should cutting it off fail too, what is torn stays the last there is
            with suppress(OSError):
                os.ftruncate(self._file, self.size_bytes)
                self.sealed = False
            raise
        self.size_bytes = end
        return places

    def _write(self, queue: list[Buffer], size: int) -> None:
        at = self.size_bytes
        if len(queue) <= _MOST_PIECES and os.pwritev(self._file, queue, at) == size:
            return
        rest = memoryview(b"".join(queue))  # the disk is nearly full, or there are too many pieces
        while len(rest):
            written = os.pwrite(self._file, rest, at)
            rest, at = rest[written:], at + written

    def read(self, place: int, size: int) -> bytes:
        """The bytes of one spill."""
        return os.pread(self._file, size, place)

    def read_into(self, place: int, page: memoryview) -> int:
        """Fill `page` with what is there; how many bytes there were."""
        return os.preadv(self._file, [page], place)

    def frames(self) -> Iterator[tuple[int, int]]:
        """Where the spill of every record begins and how long it is, unverified; a torn end is passed over."""
        return frames(self._file, self.size_bytes)

    def repair(self) -> None:
        """Cut off what is torn at the end, so that more can be appended."""
        self._cut(max((place + size for place, size in self.frames()), default=0))

    def records(self) -> Iterator[tuple[SpillMeta, int, int]]:
        """Every whole record, with where its spill begins and how long it is; what is torn at the end is cut off.

        One that was altered is passed over, like a file of its own that cannot be read.
        """
        whole = 0
        for place, size in self.frames():
            try:
                meta = decode(self.read(place, size))[0]
            except SpillCorrupt:
                continue
            whole = place + size
            yield meta, place, size
        self._cut(whole)

    def _cut(self, size_bytes: int) -> None:
        if size_bytes < self.size_bytes:
            os.ftruncate(self._file, size_bytes)
            self.size_bytes = size_bytes

    def sync(self) -> None:
        """Returns when what was appended would outlast a loss of power."""
        os.fdatasync(self._file)

    def close(self) -> None:
        """Read no more; the file stays."""
        self._closing()

    def delete(self) -> None:
        """Close it, and remove the file."""
        self.close()
        self.path.unlink(missing_ok=True)
