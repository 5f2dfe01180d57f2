"""Lossy payloads of less than a byte for each element, made by the CPU.

All begin with a float32, `top`, and one byte for each sample: its scale is |top| * 2**(-byte / 8), so 32 octaves of
scales cost a byte each. A sample of zeros has the byte 255; one with an inf or NaN has 254, and comes back as NaN. What
looks random here follows from the tensor alone, so the same tensor always packs to the same bytes.

- int4: steps -7..7; where no element is below zero (`top` has a minus sign then) 0..15. The scale fits the largest.
- int2: steps -1.5, -0.5, 0.5, 1.5 whose scale fits the mean square (few large ones are cut off), or 0..3 as in int4.
- rand2: the same steps, fit to the largest and rounded up or down at random, so that the mean error is nothing: for
  gradients, where errors in one direction add up.
- topk4, topk8, topk16: one of 4, 8, 16 elements of each sample, as int8; the others are zero. Mostly the largest, but
  some at random, so that no element is left out for ever ("Reducing Communication for Split Learning by Randomized
  Top-k Sparsification", arXiv 2305.18469). Which they are is said by a bit each, or a byte for the place of each.
- rank6: (samples x elements) as the product of two matrices of rank 6, as int8, a scale for each of their 12 vectors.
  The gradient at a cut before a linear tail of C classes has rank C - 1. One inf or NaN makes all of it NaN.
"""

from __future__ import annotations

import math
import zlib
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zsfl.tensors.quantize import as_tensor, narrow
from zsfl.tensors.spec import (
    ONE_OF,
    SCALE_BYTES,
    STEPS_PER_BYTE,
    Base,
    kept_of,
    payload_bytes,
    place_bytes,
    rank_of,
    scaled_rows,
)

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
LOW_BASES = frozenset((*STEPS_PER_BYTE, *ONE_OF, "rank6"))

RANDOM_SHARE = 0.1
"""Of the kept elements of random top-k, about so many are drawn from all of the sample rather than its largest."""
_CHOSEN = 1e6
"""How many times larger an element that was drawn counts: the largest of some million cannot displace it."""
_NOISE = 1 << 16
"""Random numbers that are made once; each tensor begins somewhere else among them."""
_ZEROS, _NOT_FINITE, _LAST = 255, 254, 253
_MAX = np.finfo(np.float32).max
_TINY = np.finfo(np.float32).tiny
_FLAT = 2 ** (-1 / 8)
"""Makes good for scales that are half a sixteenth of an octave wider than wanted in the mean, here squared."""
_REACH_INT2 = 3.8
"""Steps up to the largest element of an int2 without signs: it is cut off to 3, which makes the others finer."""
_SCALES = np.exp2(-np.arange(256, dtype=np.float32) / 8)
_SCALES[_ZEROS], _SCALES[_NOT_FINITE] = 0, np.nan


def to_low(base: Base, values: Tensor) -> Bytes:
    """Floats (S, ...), not empty -> the payload of `base`."""
    rows = scaled_rows(tuple(values.shape))
    flat = values.reshape(rows, -1).cpu()
    if flat.dtype is torch.float64:  # what is finite stays so
        flat = torch.where(flat.isinf(), flat, flat.clamp(-float(_MAX), float(_MAX)))
    x = flat.float().contiguous().numpy()  # sums of a view would round otherwise
    nbytes = payload_bytes("", base, "float32", x.shape, 1 << 62)
    payload = np.empty(nbytes, np.uint8)
    with np.errstate(all="ignore"):
        if base == "rank6":
            _to_factors(x, payload)
        else:
            (_to_top_k if base in ONE_OF else _to_steps)(base, x, payload)
    return payload


def from_low(base: Base, payload: Bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """The bytes of `to_low` -> floats of `shape`; None where they are no such bytes."""
    rows = scaled_rows(shape)
    width = math.prod(shape) // rows
    top = float(payload[:SCALE_BYTES].view(np.float32)[0])
    scales = 2 * rank_of(shape) if base == "rank6" else rows
    with np.errstate(all="ignore"):  # a peer may say any scale
        scale = _SCALES.take(payload[SCALE_BYTES : SCALE_BYTES + scales]) * np.float32(abs(top))
        rest = payload[SCALE_BYTES + scales :]
        if base == "rank6":
            values = _from_factors(rest, rows, width, scale)
        elif base in ONE_OF:
            values = _from_top_k(base, rest, rows, width, scale)
        else:
            values = _from_steps(base, rest, rows, width, scale, unsigned=math.copysign(1.0, top) < 0)
    if values is None:
        return None
    tensor = as_tensor(values)
    return (narrow(tensor, dtype) if dtype.itemsize < SCALE_BYTES else tensor.to(dtype)).view(shape)


def _put_scales(payload: Bytes, wanted: Floats, reach: float, unsigned: bool = False) -> tuple[Floats, bool]:
    """Write `top` and a byte for each row. What to divide by, none smaller than wanted; whether all of it is finite.

    `reach` is the largest step, which must not lead out of float32.
    """
    codes = payload[SCALE_BYTES : SCALE_BYTES + len(wanted)]
    top, finite = wanted.max(), True
    if _TINY < top < _MAX / 256 and wanted.min() > 0:
        codes[...] = np.minimum(np.log2(top / wanted) * 8, _LAST)
        by = _SCALES.take(codes) * top
    else:  # a row of zeros, an inf or a NaN, or very large ones
        good = np.isfinite(wanted)
        wanted = np.where(good, np.minimum(wanted, _MAX / np.float32(reach * (1 + 1e-6))), wanted)
        top, finite = max(wanted.max(where=good, initial=0), _TINY), bool(good.all())
        code = np.minimum(np.log2(top / wanted.clip(_TINY)) * 8, _LAST)
        codes[...] = np.where(good, np.where(wanted > 0, code, _ZEROS), _NOT_FINITE)
        by = _SCALES.take(codes) * top
        by[codes == _ZEROS] = 1
    payload[:SCALE_BYTES].view(np.float32)[0] = -top if unsigned else top
    return by, finite


def _largest(x: Floats) -> Floats:
    """Of each row by magnitude; torch takes half the time of numpy for it."""
    return as_tensor(x).abs().amax(1).numpy()


def _to_steps(base: Base, x: Floats, payload: Bytes) -> None:
    most = (1 << 8 // STEPS_PER_BYTE[base]) - 1
    unsigned = bool(x.min() >= 0)
    middle = 0 if unsigned else 8 if base == "int4" else 1.5
    reach = (_REACH_INT2 if base == "int2" else most) if unsigned else 7 if base == "int4" else 1.5
    if base == "int2" and not unsigned:
        wanted = np.sqrt(np.einsum("ij,ij->i", x, x) * np.float32(_FLAT / x.shape[1]))  # best for a bell curve
        far = wanted == np.inf
        if far.any():  # squares may overflow where the elements do not
            wanted[far] = _largest(x[far]) / np.float32(1.5)
    else:
        wanted = _largest(x) / np.float32(reach)
    by, finite = _put_scales(payload, wanted, reach, unsigned)
    steps = x / by[:, None]
    if middle:
        steps += np.float32(middle)
    if base == "rand2":
        steps += _noise(payload[: SCALE_BYTES + len(x)], x.size).reshape(x.shape)
        np.floor(steps, out=steps)
    else:
        np.rint(steps, out=steps)
    if not finite:
        steps = np.nan_to_num(steps)
    if (
        not finite or base != "int4"
    ):  # whose scales are wide enough; those of int2 are not to be, and noise may round up
        np.clip(steps, 0, most, out=steps)
    payload[SCALE_BYTES + len(x) :] = _folded(steps.astype(np.uint8).reshape(-1), STEPS_PER_BYTE[base])


def _folded(steps: Bytes, per_byte: int) -> Bytes:
    """Several steps in each byte, the first one in its lowest bits."""
    if steps.size % per_byte:
        steps = np.concatenate([steps, np.zeros(-steps.size % per_byte, np.uint8)])
    if per_byte == 2:
        pairs = steps.view("<u2")
        return (pairs | pairs >> 4).astype(np.uint8)
    fours = steps.view("<u4")
    return (fours | fours >> 6 | fours >> 12 | fours >> 18).astype(np.uint8)


@cache
def _unfolded(base: Base, unsigned: bool) -> Floats:
    """For each byte the steps in it."""
    per_byte = STEPS_PER_BYTE[base]
    bits = 8 // per_byte
    steps = np.arange(256)[:, None] >> np.arange(per_byte) * bits & (1 << bits) - 1
    return (steps - (0 if unsigned else 8 if base == "int4" else 1.5)).astype(np.float32)


def _from_steps(base: Base, packed: Bytes, rows: int, width: int, scale: Floats, unsigned: bool) -> Floats:
    steps = _unfolded(base, unsigned).take(packed, axis=0).reshape(-1)[: rows * width].reshape(rows, width)
    return np.multiply(steps, scale[:, None], out=steps)


def _to_top_k(base: Base, x: Floats, payload: Bytes) -> None:
    rows, width = x.shape
    kept, (size, as_bits) = kept_of(base, width), place_bytes(base, width)
    by, finite = _put_scales(payload, _largest(x) / np.float32(127), 127)
    score = np.abs(x)
    score[_noise(payload[: SCALE_BYTES + len(x)], x.size).reshape(x.shape) < RANDOM_SHARE / ONE_OF[base]] *= _CHOSEN
    # Sorting is vectorised where numbers are few, and selecting is not.
    order = np.argsort(score, axis=1) if width <= 256 else np.argpartition(score, width - kept, axis=1)
    places = np.sort(order[:, width - kept :], axis=1)
    starts = np.arange(0, x.size, width, dtype=np.int64)
    flat = places + starts[:, None]
    where = payload[SCALE_BYTES + rows : SCALE_BYTES + rows * (1 + size)].reshape(rows, size)
    if as_bits:
        chosen = np.zeros(x.shape, np.uint8)
        chosen.reshape(-1)[flat] = 1
        where[...] = np.packbits(chosen, axis=1)
    else:
        where[...] = places
    steps = np.rint(x.reshape(-1).take(flat) / by[:, None])
    if not finite:
        steps = np.nan_to_num(steps).clip(-127, 127)
    payload[SCALE_BYTES + rows * (1 + size) :].view(np.int8)[...] = steps.reshape(-1)


def _from_top_k(base: Base, rest: Bytes, rows: int, width: int, scale: Floats) -> Floats | None:
    kept, (size, as_bits) = kept_of(base, width), place_bytes(base, width)
    where = rest[: rows * size].reshape(rows, size)
    steps = rest[rows * size :].view(np.int8).reshape(rows, kept)
    if as_bits:
        bits = np.unpackbits(where, axis=1)
        if bits[:, width:].any() or (bits.sum(axis=1, dtype=np.int64) != kept).any():
            return None
        places = np.flatnonzero(bits[:, :width])
    else:
        if where.max() >= width or (kept > 1 and (where[:, 1:] <= where[:, :-1]).any()):
            return None
        places = (where + np.arange(rows)[:, None] * width).reshape(-1)
    values = np.zeros((rows, width), np.float32)
    values[~np.isfinite(scale)] = np.nan
    values.reshape(-1)[places] = (steps * scale[:, None]).reshape(-1)
    return values


def _to_factors(x: Floats, payload: Bytes) -> None:
    width = x.shape[1]
    rank = rank_of(x.shape)
    largest = np.abs(x).max()
    if not np.isfinite(largest) or not largest:
        payload[:] = 0
        payload[SCALE_BYTES : SCALE_BYTES + 2 * rank] = _NOT_FINITE if largest else _ZEROS
        return
    x = x / largest  # nothing overflows below
    sketch = _noise(np.empty(0, np.uint8), width * rank).reshape(width, rank) - np.float32(0.5)
    basis = np.linalg.qr(x @ (x.T @ (x @ sketch)))[0]
    basis = np.linalg.qr(x @ (x.T @ basis))[0]  # nearer to the strongest directions
    factors: list[Floats] = [basis.T, (basis.T @ x).astype(np.float32, copy=False)]
    sizes = [_largest(np.ascontiguousarray(factor)) for factor in factors]
    even = np.sqrt(sizes[0].max() * sizes[1].max()) * np.sqrt(largest)  # neither is larger than the other
    wanted = np.concatenate([size * np.float32(even / size.max() / 127) for size in sizes])
    by, _ = _put_scales(payload, wanted, 127)
    start = SCALE_BYTES + 2 * rank
    for factor, size, own in zip(factors, sizes, np.split(by, 2), strict=True):
        steps = payload[start : start + factor.size].view(np.int8).reshape(factor.shape)
        steps[...] = np.rint(factor * ((even / size.max()) / own)[:, None]).clip(-127, 127)
        start += factor.size


def _from_factors(rest: Bytes, rows: int, width: int, scale: Floats) -> Floats:
    rank = len(scale) // 2
    left = rest[: rank * rows].view(np.int8).reshape(rank, rows) * scale[:rank, None]
    right = rest[rank * rows :].view(np.int8).reshape(rank, width) * scale[rank:, None]
    return np.clip(np.ascontiguousarray(left.T) @ right, -_MAX, _MAX).astype(np.float32, copy=False)


@cache
def _numbers() -> Floats:
    return np.random.default_rng(2305_18469).random(2 * _NOISE, dtype=np.float32)


def _noise(scales: Bytes, count: int) -> Floats:
    """So many numbers in [0, 1), which follow from the scales of a tensor."""
    numbers, start = _numbers(), zlib.crc32(scales.data) % _NOISE
    if count <= _NOISE:
        return numbers[start : start + count]
    return np.resize(np.roll(numbers, -start), count)
