"""Lossless steps over a payload: byte shuffling and lz4, the latter only where a sample says that it pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import lz4.block  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

SAMPLES = 4
"""Places of a large payload that are compressed first (dask/distributed samples five)."""
SAMPLE_BYTES = 4096
PAYS = 0.9
"""Share of the bytes that lz4 may keep at most, for sample and whole; above it the time is not worth it."""

_lz4 = cast(Any, lz4.block)
_compress = cast("Callable[..., bytes]", _lz4.compress)
_decompress = cast("Callable[..., bytearray]", _lz4.decompress)
_Lz4Error = cast("type[Exception]", _lz4.LZ4BlockError)


def shuffle(payload: Bytes, itemsize: int) -> Bytes:
    """The first bytes of all items, then the second ones, and so on; `itemsize` divides the length."""
    return np.ascontiguousarray(payload.reshape(-1, itemsize).T).reshape(-1)


def unshuffle(payload: Bytes, itemsize: int) -> Bytes:
    """The inverse of `shuffle`."""
    items = np.empty((payload.size // itemsize, itemsize), np.uint8)
    for i, plane in enumerate(payload.reshape(itemsize, -1)):
        items[:, i] = plane  # four times as fast as copying the transpose
    return items.reshape(-1)


def squeeze(payload: Bytes, itemsize: int) -> bytes | None:
    """The lz4 block of `payload`, shuffled first if `itemsize` > 1; None where it does not pay."""
    if payload.size > 4 * SAMPLES * SAMPLE_BYTES and _squeezed(_sample(payload), itemsize) is None:
        return None
    return _squeezed(payload, itemsize)


def _squeezed(payload: Bytes, itemsize: int) -> bytes | None:
    block = _compress(shuffle(payload, itemsize) if itemsize > 1 else payload, store_size=False)
    return block if len(block) <= PAYS * payload.size else None


def _sample(payload: Bytes) -> Bytes:
    """Evenly spread pieces, from the first bytes to the last ones."""
    stride = (payload.size - SAMPLE_BYTES) // (SAMPLES - 1)
    return np.concatenate([payload[i * stride : i * stride + SAMPLE_BYTES] for i in range(SAMPLES)])


def expand(block: memoryview, size: int) -> bytearray | None:
    """The `size` bytes in an lz4 block; None if it is malformed or holds another number of bytes."""
    try:
        payload = _decompress(block, uncompressed_size=size, return_bytearray=True)
    except _Lz4Error:
        return None
    return payload if len(payload) == size else None
