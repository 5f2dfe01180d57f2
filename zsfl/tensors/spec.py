"""What travels about a tensor beside its bytes, and the bounds on it. Imports neither torch nor numpy."""

from __future__ import annotations

import math
from typing import Literal, get_args

import msgspec

from zsfl.errors import BadShape

Base = Literal["raw", "fp16", "bf16", "int8", "int4", "int2", "rand2", "topk4", "topk8", "topk16", "rank6"]
BASES: tuple[Base, ...] = get_args(Base)
SUPPORTED: tuple[str, ...] = (*BASES, "shuffle", "lz4")
"""The codec words this node offers its peers."""

MAX_NDIM = 8
"""More than any layer here has (a batch of video is 5), and small enough to keep messages readable."""
MAX_TENSOR_BYTES = 1 << 30
"""Bound on one tensor, packed and unpacked; below lz4's own limit of 2,113,929,216 bytes a block."""
MAX_LZ4_RATIO = 255
"""A byte of an lz4 block stands for at most 255 bytes (lz4 block format, length extension)."""
SCALE_BYTES = 4
"""An int8 scale is a float32, and so is the one that the row scales of the smaller bases are shares of."""

FLOATS: dict[str, int] = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes per element of what the lossy codecs apply to."""
DTYPES: dict[str, int] = {**FLOATS, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}
"""Bytes per element of every dtype that may travel."""
_NARROW: dict[Base, int] = {"fp16": 2, "bf16": 2}
STEPS_PER_BYTE: dict[Base, int] = {"int4": 2, "int2": 4, "rand2": 4}
"""Elements of these that share a byte."""
ONE_OF: dict[Base, int] = {"topk4": 4, "topk8": 8, "topk16": 16}
"""Of how many elements of a sample these keep one."""
RANK = 6
"""Of the two factors that rank6 sends."""


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A packed tensor without its bytes; from a peer it is a claim until `codec.unpack` has checked it."""

    name: str
    dtype: str
    """Before packing and after unpacking, as torch spells it without its prefix: `float32`."""
    shape: tuple[int, ...]
    """Before packing and after unpacking."""
    codec: str
    """What was really done, canonically spelled: lossy words and lz4 only where they applied."""
    nbytes: int
    """Bytes on the wire."""


def bad_shape(name: str, what: str) -> BadShape:
    """The error about tensor `name`, to be raised."""
    return BadShape(f"tensor {name[:80]!r}: {what}")


def applied_base(base: Base, dtype: str) -> Base:
    """What `base` does to `dtype`: itself where it makes floats smaller, otherwise `raw`."""
    return base if base != "raw" and _NARROW.get(base, 1) < FLOATS.get(dtype, 0) else "raw"


def element_bytes(base: Base, dtype: str) -> int:
    """Bytes of one element of `dtype` in the payload of `base`; 1 where elements share a byte or are left out."""
    return DTYPES[dtype] if base == "raw" else _NARROW.get(base, 1)


def scaled_rows(shape: tuple[int, ...]) -> int:
    """How many scales `shape` has: one per sample (first dimension), one in all below two dimensions."""
    return shape[0] if len(shape) > 1 else 1


def kept_of(base: Base, width: int) -> int:
    """How many of the `width` elements of a sample a top-k base keeps."""
    return -(-width // ONE_OF[base])


def rank_of(shape: tuple[int, ...]) -> int:
    """Of the factors of a tensor of this shape, no dimension of which is 0."""
    rows = scaled_rows(shape)
    return min(RANK, rows, math.prod(shape) // rows)


def place_bytes(base: Base, width: int) -> tuple[int, bool]:
    """Bytes that say which elements of a sample a top-k base kept; whether they are a bit for each of `width`.

    Otherwise a byte is the place of one of them.
    """
    bits, kept = -(-width // 8), kept_of(base, width)
    return (kept, False) if width <= 256 and kept < bits else (bits, True)


def payload_bytes(name: str, base: Base, dtype: str, shape: tuple[int, ...], max_bytes: int) -> int:
    """Bytes of the payload before lz4; BadShape when it, or the tensor itself, is out of bounds."""
    if dtype not in DTYPES:
        raise bad_shape(name, f"dtype {dtype[:80]!r} may not travel; use one of {', '.join(DTYPES)}")
    if len(shape) > MAX_NDIM:
        raise bad_shape(name, f"{len(shape)} dimensions, at most {MAX_NDIM} are allowed")
    limit = min(max_bytes, MAX_TENSOR_BYTES)
    if shape and not 0 <= min(shape) <= max(shape) <= limit:
        raise bad_shape(name, f"a dimension is outside 0..{limit}")
    if 0 in shape:  # in its strides torch counts 0 as 1, and those must not overflow either
        _bound(name, math.prod(d or 1 for d in shape), shape, limit)
        return 0
    elements, rows = math.prod(shape), scaled_rows(shape)
    if base in STEPS_PER_BYTE:
        nbytes = SCALE_BYTES + rows - (-elements // STEPS_PER_BYTE[base])
    elif base in ONE_OF:
        width = elements // rows
        nbytes = SCALE_BYTES + rows * (1 + place_bytes(base, width)[0] + kept_of(base, width))
    elif base == "rank6":
        rank, width = rank_of(shape), elements // rows
        nbytes = SCALE_BYTES + rank * (2 + rows + width)
    else:
        nbytes = elements * element_bytes(base, dtype) + (SCALE_BYTES * rows if base == "int8" else 0)
    _bound(name, max(nbytes, elements * DTYPES[dtype]), shape, limit)
    return nbytes


def _bound(name: str, nbytes: int, shape: tuple[int, ...], limit: int) -> None:
    if nbytes > limit:
        raise bad_shape(name, f"shape {shape} takes {nbytes} bytes, at most {limit} are allowed")
