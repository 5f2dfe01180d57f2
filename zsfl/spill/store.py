"""One folder of spills. All calls may block on the disk: make them in a thread."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from zsfl.errors import (
    NO_DESCRIPTORS,
    BadShape,
    SpillCorrupt,
    SpillFull,
    SpillTooLarge,
    StorageError,
    lacks_descriptors,
)
from zsfl.ids import Cid, RunId, parse_cid
from zsfl.spill.coded import SpillCoder
from zsfl.spill.index import Index, Key, offer_of
from zsfl.spill.layout import Buffer, SpillMeta, decode_contribution, decode_meta, header_bytes, pieces
from zsfl.spill.segments import SUFFIX as SEGMENT_SUFFIX
from zsfl.spill.segments import Segment
from zsfl.wire.messages import SpillOffer

LARGE_BYTES = 256 << 10
"""A longer spill has a file of its own."""
MOST_DAMAGED = 4
"""Files of what was set aside, the newest: enough to see what a disk does to files, and few enough where it does so to
all of them."""
_SUFFIX, _DAMAGED = ".safetensors", ".damaged"


@dataclass(slots=True)
class _File:
    """Of one large spill."""

    path: Path
    size_bytes: int
    held: int = 0


class SpillStore:
    """Puts spills in place whole or not at all, and keeps each until it is released.

    Small ones share segments, see `zsfl.spill.segments`; large ones are written aside and renamed. A spill that a
    former process left in the folder counts as held. A merged one is held until all its steps are released.
    """

    def __init__(self, folder: Path, coder: SpillCoder | None = None, limit_bytes: int = 0) -> None:
        """`coder` packs the gradients of what is put; without one they are stored as they are. With `limit_bytes` a
        spill that would make the folder longer finds no room; 0 is no limit.
        """
        self.folder = folder
        self._limit_bytes = limit_bytes
        self._coder = coder
        self._lock = threading.Lock()
        self._index: Index[Segment | _File] = Index()
        self._live: Segment | None = None
        self._segments = 0
        """The number of the newest."""
        self._left: set[Path] = set()
        """Files with nothing that is held, which the disk would not let go of yet."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = sorted(folder.iterdir())
            for path in found:
                if path.suffix == SEGMENT_SUFFIX:
                    self._adopt_segment(path)
            for path in found:  # after them: what a large spill replaced may still be in a segment
                if path.suffix != SEGMENT_SUFFIX:
                    self._adopt(path)
        except OSError as error:
            raise _storage_error(error, folder) from error

    def put(self, meta: SpillMeta, tensors: Mapping[str, torch.Tensor]) -> SpillOffer:
        """Write one spill; when this returns it is in place. A spill of the same cid and kind is replaced."""
        return self.put_all([(meta, tensors)])[0]

    def put_all(self, spills: Sequence[tuple[SpillMeta, Mapping[str, torch.Tensor]]]) -> list[SpillOffer]:
        """Write several spills, the small ones at once; when this returns all are in place, and if it fails none of
        these is.
        """
        offers: list[SpillOffer] = []
        small: list[tuple[SpillOffer, list[Buffer]]] = []
        for meta, tensors in spills:
            if self._coder is not None:
                tensors = self._coder.coded(meta, tensors)
            found = pieces(meta, tensors)
            size = sum(memoryview(piece).nbytes for piece in found)
            offers.append(offer_of(meta, size))
            if size <= LARGE_BYTES:
                small.append((offers[-1], found))
            else:
                self._put_large(offers[-1], found)
        if small:
            self._append(small)
        return offers

    def _check_room(self, more_bytes: int) -> None:
        if not self._limit_bytes:
            return
        if more_bytes > self._limit_bytes:
            raise SpillTooLarge(
                f"a spill of {more_bytes} bytes never has room in {self.folder}, which may take "
                f"{self._limit_bytes >> 20} MiB: allow more with --spill-mib"
            )
        used = sum(home.size_bytes for home in self._index.homes())
        if used + more_bytes > self._limit_bytes:
            raise SpillFull(
                f"no room for another spill in {self.folder}: the {self._limit_bytes >> 20} MiB that it may take are "
                "used up until the aggregator has fetched some; allow more with --spill-mib"
            )

    def _append(self, small: Sequence[tuple[SpillOffer, list[Buffer]]]) -> None:
        joined = [b"".join(record) for _, record in small]
        with self._lock:
            self._check_room(sum(map(len, joined)))
            try:
                if self._live is None or self._live.is_full:
                    self._segments += 1
                    self._live = Segment(self.folder / f"{self._segments:08d}{SEGMENT_SUFFIX}")
                segment = self._live
                places = segment.append([[data] for data in joined])
                for (offer, _), data, place in zip(small, joined, places, strict=True):
                    self._drop(self._index.hold(offer, segment, place))
                    self._index.keep_fresh((offer.cid, offer.kind), data)
            except OSError as error:
                if self._live is not None and not self._live.held:
                    self._live.close()
                    self._delete(self._live.path)
                    self._live = None
                raise _storage_error(error, self.folder) from error

    def _put_large(self, offer: SpillOffer, found: Sequence[Buffer]) -> None:
        path = self._path((offer.cid, offer.kind))
        aside = path.with_suffix(".tmp")
        with self._lock:
            self._check_room(offer.size_bytes)
        try:
            with aside.open("wb") as file:
                for piece in found:
                    file.write(piece)
            with self._lock:
                aside.rename(path)
                self._left.discard(path)
                self._drop(self._index.hold(offer, self._file(offer)))
        except OSError as error:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            raise _storage_error(error, self.folder) from error

    def _file(self, offer: SpillOffer) -> _File:
        """The file of a large spill, which one of the same key may have been in before."""
        key = offer.cid, offer.kind
        before = self._index.get(key)
        file = before.home if before and isinstance(before.home, _File) else _File(self._path(key), 0)
        file.size_bytes = offer.size_bytes
        return file

    def fresh(self, key: Key) -> bytes | None:
        """The bytes of a small spill that was just put, the first time that they are asked for; never blocks."""
        with self._lock:
            return self._index.fresh(key)

    def placing(self, offer: SpillOffer) -> None:
        """What to wait for until a spill that was put is in place: it is."""

    def as_held(self, offer: SpillOffer) -> SpillOffer:
        """What a spill that was put is to be offered as."""
        return offer

    def is_behind(self) -> None:
        """What to wait for before more is put: nothing."""

    def holds(self, cid: Cid) -> bool:
        """Whether anything of this step is held."""
        return self._index.holds(cid)

    def read(self, key: Key) -> bytes | None:
        """The stored bytes; None when no such spill is held."""
        try:
            with self._lock:
                held = self._index.get(key)
                if held is None:
                    return None
                if isinstance(held.home, Segment):
                    return held.home.read(held.place, held.offer.size_bytes)
            return self._path(key).read_bytes()
        except FileNotFoundError:
            with self._lock:
                self._drop(self._index.forget(key))
            return None
        except OSError as error:
            raise StorageError(f"cannot read {self._path(key)}: {error.strerror}; check that disk") from error

    def read_all(self, keys: Sequence[Key]) -> list[tuple[Key, bytes]]:
        """The same of those of several that are held."""
        return [(key, data) for key in keys if (data := self.read(key)) is not None]

    def set_aside_all(self, keys: Sequence[Key]) -> list[Key]:
        """The same of several; which these are."""
        return [key for key in keys if self.set_aside(key)]

    def set_aside(self, key: Key) -> bool:
        """Hold a spill no more that is not there, or not as it was written; whether it is held no more.

        The bytes of a damaged one are kept beside the others, as `CID.KIND.damaged`; of those the newest.
        """
        data = self.read(key)
        if data is not None:
            try:
                decode_contribution(data)
            except SpillCorrupt:
                with suppress(OSError):
                    self._keep_damaged(self._path(key).with_suffix(_DAMAGED), data)
            else:
                return False
        try:
            with self._lock:
                self._drop(self._index.forget(key))
        except OSError as error:
            raise _storage_error(error, self.folder) from error
        return True

    def _keep_damaged(self, path: Path, data: bytes) -> None:
        others = [(one.stat().st_mtime_ns, one) for one in self.folder.glob(f"*{_DAMAGED}") if one != path]
        for _, old in sorted(others)[: max(0, len(others) - MOST_DAMAGED + 1)]:
            old.unlink()
        path.write_bytes(data)

    def release(self, cids: Iterable[Cid]) -> None:
        """Delete the spills of cids that a committed version names; others are not touched.

        StorageError where the disk does not let go of them: they are held no more, and deleted with those that follow.
        """
        try:
            with self._lock:
                self._drop(self._index.release(cids))
                self._sweep()
        except OSError as error:
            raise _storage_error(error, self.folder) from error

    def _drop(self, homes: Iterable[Segment | _File]) -> None:
        """Delete what nothing is held in."""
        for home in homes:
            if isinstance(home, Segment):
                if home is self._live:
                    self._live = None
                home.close()
            self._delete(home.path)

    def _delete(self, path: Path) -> None:
        """Delete a file, now or as soon as the disk lets go of it."""
        self._left.add(path)
        with suppress(OSError):
            self._sweep()

    def _sweep(self) -> None:
        for path in tuple(self._left):
            path.unlink(missing_ok=True)
            self._left.remove(path)

    def keep_only(self, run: RunId) -> int:
        """Delete the spills of every other run; how many there were."""
        with self._lock:
            count, cids = self._index.of_others(run)
        self.release(cids)
        return count

    def offers(self, run: RunId) -> list[SpillOffer]:
        """What is held of one run, oldest version first."""
        # Without the lock, which is held while the disk is written to: heartbeats ask, and must not wait for that.
        return self._index.offers(run)

    async def aclose(self) -> None:
        """The same as `close`."""
        self.close()

    def close(self) -> None:
        """Let go of the folder; what is held stays there."""
        with self._lock:
            for home in self._index.homes():
                if isinstance(home, Segment):
                    home.close()
            self._index.clear()
            self._live = None

    def _path(self, key: Key) -> Path:
        cid, kind = key
        parse_cid(cid)  # nothing else may become a file name
        return self.folder / f"{cid}.{kind}{_SUFFIX}"

    # --- what a former process left ---------------------------------------------------------------------

    def _adopt(self, path: Path) -> None:
        if path.suffix == ".tmp":
            path.unlink(missing_ok=True)
            return
        if path.suffix != _SUFFIX or not path.is_file():
            return
        cid, _, kind = path.name.removesuffix(_SUFFIX).partition(".")
        with path.open("rb") as file:
            start = file.read(8)
            try:
                meta = decode_meta(start + file.read(min(header_bytes(start), os.stat(path).st_size)))
            except (BadShape, SpillCorrupt):
                return
        if (meta.cid, meta.kind) == (cid, kind):
            offer = offer_of(meta, os.stat(path).st_size)
            self._drop(self._index.hold(offer, self._file(offer)))

    def _adopt_segment(self, path: Path) -> None:
        if not (path.stem.isdecimal() and path.stem.isascii() and path.is_file()):
            return
        self._segments = max(self._segments, int(path.stem))
        segment = Segment(path, sealed=True)
        segment.held = 1  # while it is looked through
        for meta, place, size in segment.records():
            self._drop(self._index.hold(offer_of(meta, size), segment, place))
        segment.held -= 1
        if not segment.held:
            segment.delete()


def _storage_error(error: OSError, folder: Path) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SpillFull(f"no room for another spill in {folder}: {error.strerror}; free some space on that disk")
    advice = NO_DESCRIPTORS if lacks_descriptors(error) else "check that it exists and is writable"
    return StorageError(f"cannot write spills in {folder}: {error.strerror}; {advice}")
