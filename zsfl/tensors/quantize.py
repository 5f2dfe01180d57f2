"""Lossy payloads of 16-bit floats, and of int8 with one scale per sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zsfl.tensors.spec import SCALE_BYTES, scaled_rows

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32] | NDArray[np.float64]

as_tensor = cast("Callable[[Floats], Tensor]", cast(Any, torch).from_numpy)
"""The same numbers, which may be written."""
_FLOAT32 = torch.finfo(torch.float32)
_MAX_SCALE = np.float32(_FLOAT32.max / 127 * (1 - _FLOAT32.eps))
"""Largest scale that 127 times itself does not push out of float32."""
_TINY = np.float32(_FLOAT32.tiny)


def narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` (not empty) as a 16-bit float: finite ones are clamped to its range, inf and NaN stay."""
    limit = torch.finfo(dtype).max
    lowest, highest = values.aminmax()
    if not (float(lowest) >= -limit and float(highest) <= limit):  # also taken when there is a NaN
        values = torch.where(values.isinf(), values, values.clamp(-limit, limit))
    return values.to(dtype)


def to_int8(values: Tensor) -> Tensor | Bytes:
    """Floats (S, ...), not empty -> uint8 vector: S float32 scales, then int8 steps; value = step * scale.

    Symmetric, scale = max |value| of the sample / 127, rounded to the nearest step. A sample with inf or NaN
    gets the scale NaN and comes back as NaN; float64 beyond the range of float32 is clamped to it. On the tensor's
    own device; on the CPU in numpy, whose calls cost less: the bytes are the same.
    """
    rows = scaled_rows(tuple(values.shape))
    flat = values.reshape(rows, -1)
    flat = flat if flat.dtype is torch.float64 else flat.float()
    largest = flat.abs().amax(1)
    if values.is_cpu:
        return _to_int8_here(flat.numpy(), largest.numpy())
    scale = (largest / 127).clamp_(float(_TINY), float(_MAX_SCALE)).float()
    steps = (flat / scale.unsqueeze(1)).round_()
    if not float(largest.amax()) <= 127 * float(_MAX_SCALE):  # rare: a NaN, inf, or steps beyond 127
        scale[~largest.isfinite()] = torch.nan
        steps.nan_to_num_(0.0).clamp_(-127, 127)  # what a NaN becomes as an int8 is not defined
    payload = torch.empty(rows * SCALE_BYTES + flat.numel(), dtype=torch.uint8, device=values.device)
    split = rows * SCALE_BYTES
    payload[:split].view(torch.float32).copy_(scale)
    payload[split:].view(torch.int8).view(rows, -1).copy_(steps)
    return payload


def _to_int8_here(flat: Floats, largest: Floats) -> Bytes:
    rows = len(flat)
    split = rows * SCALE_BYTES
    payload = np.empty(split + flat.size, np.uint8)
    scale, steps = payload[:split].view(np.float32), payload[split:].view(np.int8).reshape(flat.shape)
    if largest.max() <= 127 * _MAX_SCALE:
        np.maximum(largest / 127, _TINY, out=scale, casting="same_kind")
        work = flat / scale[:, None]
        np.rint(work, out=work)
    else:  # rare: a NaN, inf, or steps beyond 127
        with np.errstate(all="ignore"):
            scale[:] = np.clip(largest / 127, _TINY, _MAX_SCALE)
            work = np.nan_to_num(np.rint(flat / scale[:, None])).clip(
                -127, 127
            )  # what a NaN becomes as an int8 is not defined
            scale[~np.isfinite(largest)] = np.nan
    steps[...] = work
    return payload


def from_int8(payload: Bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The bytes of `to_int8` -> floats of `shape`."""
    rows = scaled_rows(shape)
    split = rows * SCALE_BYTES
    scale = payload[:split].view(np.float32)[:, None]  # numpy reads them wherever they begin
    steps = payload[split:].view(np.int8).reshape(rows, -1)
    with np.errstate(all="ignore"):  # a peer may say any scale
        values = np.multiply(steps, scale, dtype=np.float64 if dtype is torch.float64 else np.float32)
    return as_tensor(values).to(dtype).view(shape)
