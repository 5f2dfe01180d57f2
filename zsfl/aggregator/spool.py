"""Where large contributions wait for their version: on the disk, so that memory does not grow with their number.

Nothing here outlives the process: what a killed aggregator had is fetched anew from those who hold it.
"""

from __future__ import annotations

import os
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from zsfl.errors import StorageError
from zsfl.learning.averaging import Contribution
from zsfl.learning.flat import FlatLayout, FlatTensors

SPOOLED_BYTES = 128 << 10
"""Gradients that are longer go to the disk; shorter ones come with their offers, and stay in memory."""


class Spool:
    """One file without a name, in pieces that are used again once what was in them is counted or dropped.

    Every call may block on the disk.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: int | None = None
        self.size_bytes = 0
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        """Where pieces begin that are free, by their size: the parts of a model have few."""
        self._page = bytearray()
        """What was read last."""

    def keep(self, one: Contribution) -> Contribution:
        """The same contribution, its gradients on the disk if they are large and of one dtype."""
        grads = one.grads
        if not isinstance(grads, FlatTensors) or grads.size_bytes <= SPOOLED_BYTES:
            return one
        data = grads.numbers().view(torch.uint8).numpy().data
        try:
            place = self._write(data)
        except OSError as error:
            raise StorageError(
                f"cannot keep the contributions of a version in {self._folder}: {error.strerror}; "
                "check that the disk has room for all of them"
            ) from error
        return replace(one, grads=_Spooled(grads.layout, grads.size_bytes, self, place))

    def _write(self, data: memoryview) -> int:
        if self._file is None:
            path = self._folder / f".spool-{os.getpid()}"
            path.unlink(missing_ok=True)  # of a process of that number that was killed before it could
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            path.unlink()
            weakref.finalize(self, os.close, self._file)
        free = self._free[len(data)]
        place = free.pop() if free else self.size_bytes
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self._file, data[written:], place + written)
        except OSError:
            if place < self.size_bytes:
                free.append(place)
            raise
        self.size_bytes = max(self.size_bytes, place + len(data))
        return place

    def read(self, place: int, size: int) -> memoryview:
        """What was written there, in memory that the next read uses again."""
        if len(self._page) < size:
            self._page = bytearray(size)
        page = memoryview(self._page)[:size]
        if self._file is None or os.preadv(self._file, [page], place) != size:
            raise StorageError(f"the contributions of a version in {self._folder} can no longer be read; start anew")
        return page

    def release(self, place: int, size: int) -> None:
        """What was written there is of no use any more."""
        self._free[size].append(place)


class _Spooled(FlatTensors):
    """Gradients on the disk."""

    __slots__ = ("__weakref__", "_place", "_spool")

    def __init__(self, layout: FlatLayout, size_bytes: int, spool: Spool, place: int) -> None:
        super().__init__(layout, torch.empty(0, dtype=layout.dtype))
        self._spool, self._place, self.size_bytes = spool, place, size_bytes
        release: Callable[[int, int], None] = spool.release
        weakref.finalize(self, release, place, size_bytes)

    def numbers(self) -> Tensor:
        return torch.frombuffer(self._spool.read(self._place, self.size_bytes), dtype=self.layout.dtype)

    def __getitem__(self, name: str) -> Tensor:
        shape, start, count = self.layout.places[name]
        size = self.layout.dtype.itemsize
        if not count:
            return torch.empty(shape, dtype=self.layout.dtype)
        piece = self._spool.read(self._place + start * size, count * size)
        return torch.frombuffer(piece, dtype=self.layout.dtype).clone().view(shape)
