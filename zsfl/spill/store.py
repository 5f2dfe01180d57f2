"""One folder of spills. All calls may block on the disk: make them in a thread."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import cast

import torch

from zsfl.errors import BadShape, SpillFull, StorageError
from zsfl.ids import Cid, PartName, RunId, parse_cid
from zsfl.spill.layout import SpillMeta, encode
from zsfl.wire.messages import SpillOffer

Key = tuple[Cid, PartName]
_SUFFIX = ".safetensors"


class SpillStore:
    """Puts spills in place whole or not at all, and keeps each until it is released.

    A spill that a former process left in the folder counts as held.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._held: dict[Key, SpillOffer] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.iterdir()):
                self._adopt(path)
        except OSError as error:
            raise _storage_error(error, folder) from error

    def put(self, meta: SpillMeta, tensors: Mapping[str, torch.Tensor]) -> SpillOffer:
        """Write one spill; when this returns it is in place. A spill of the same cid and part is replaced."""
        version = parse_cid(meta.cid).version
        part = cast("PartName", meta.part)
        data = encode(meta, tensors)
        path = self._path((meta.cid, part))
        aside = path.with_suffix(".tmp")
        try:
            aside.write_bytes(data)
            aside.rename(path)
        except OSError as error:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            raise _storage_error(error, self.folder) from error
        offer = SpillOffer(cid=meta.cid, part=part, version=version, size_bytes=len(data))
        with self._lock:
            self._held[meta.cid, part] = offer
        return offer

    def holds(self, cid: Cid) -> bool:
        """Whether any part of this step is held."""
        return (cid, "body") in self._held or (cid, "client") in self._held

    def read(self, key: Key) -> bytes | None:
        """The stored bytes; None when no such spill is held."""
        with self._lock:
            if key not in self._held:
                return None
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            with self._lock:
                self._held.pop(key, None)
            return None
        except OSError as error:
            raise StorageError(f"cannot read {self._path(key)}: {error.strerror}; check that disk") from error

    def release(self, cids: Iterable[Cid]) -> None:
        """Delete the spills of cids that a committed version names; others are not touched."""
        with self._lock:
            released = set(cids)
            keys = [key for key in self._held if key[0] in released]
            for key in keys:
                del self._held[key]
        try:
            for key in keys:
                self._path(key).unlink(missing_ok=True)
        except OSError as error:
            raise _storage_error(error, self.folder) from error

    def keep_only(self, run: RunId) -> int:
        """Delete the spills of every other run; how many there were."""
        with self._lock:
            others = [cid for cid, _ in self._held if parse_cid(cid).run != run]
        self.release(others)
        return len(others)

    def offers(self, run: RunId) -> list[SpillOffer]:
        """What is held of one run, oldest version first."""
        with self._lock:
            held = [offer for offer in self._held.values() if offer.cid.startswith(f"{run}-")]
        return sorted(held, key=lambda offer: (offer.version, offer.cid))

    def _path(self, key: Key) -> Path:
        cid, part = key
        parse_cid(cid)  # nothing else may become a file name
        return self.folder / f"{cid}.{part}{_SUFFIX}"

    def _adopt(self, path: Path) -> None:
        if path.suffix == ".tmp":
            path.unlink(missing_ok=True)
            return
        cid, _, part = path.name.removesuffix(_SUFFIX).partition(".")
        try:
            version = parse_cid(cid).version
        except BadShape:
            return
        if path.suffix == _SUFFIX and path.is_file() and part in ("body", "client"):
            offer = SpillOffer(cid=Cid(cid), part=part, version=version, size_bytes=os.stat(path).st_size)
            self._held[offer.cid, offer.part] = offer


def _storage_error(error: OSError, folder: Path) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SpillFull(f"no room for another spill in {folder}: {error.strerror}; free some space on that disk")
    return StorageError(f"cannot write spills in {folder}: {error.strerror}; check that it exists and is writable")
