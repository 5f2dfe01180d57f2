"""Lossy payloads: 16-bit floats, and int8 with one scale per sample. Runs on the tensor's own device."""

from __future__ import annotations

import torch
from torch import Tensor

from zsfl.tensors.spec import SCALE_BYTES, int8_rows

_FLOAT32 = torch.finfo(torch.float32)
_MAX_SCALE = _FLOAT32.max / 127 * (1 - _FLOAT32.eps)
"""Largest scale that 127 times itself does not push out of float32."""


def narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` (not empty) as a 16-bit float: finite ones are clamped to its range, inf and NaN stay."""
    limit = torch.finfo(dtype).max
    lowest, highest = values.aminmax()
    if not (float(lowest) >= -limit and float(highest) <= limit):  # also taken when there is a NaN
        values = torch.where(values.isinf(), values, values.clamp(-limit, limit))
    return values.to(dtype)


def to_int8(values: Tensor) -> Tensor:
    """Floats (S, ...), not empty -> uint8 vector: S float32 scales, then int8 steps; value = step * scale.

    Symmetric, scale = max |value| of the sample / 127, rounded to the nearest step. A sample with inf or NaN
    gets the scale NaN and comes back as NaN; float64 beyond the range of float32 is clamped to it.
    """
    rows = int8_rows(tuple(values.shape))
    flat = values.reshape(rows, -1)
    flat = flat if flat.dtype is torch.float64 else flat.float()
    largest = flat.abs().amax(1)
    scale = (largest / 127).clamp_(_FLOAT32.tiny, _MAX_SCALE).float()
    steps = (flat / scale.unsqueeze(1)).round_()
    if not float(largest.amax()) <= 127 * _MAX_SCALE:  # rare: a NaN, inf, or steps beyond 127
        scale[~largest.isfinite()] = torch.nan
        steps.nan_to_num_(0.0).clamp_(-127, 127)  # what a NaN becomes as an int8 is not defined
    payload = torch.empty(rows * SCALE_BYTES + flat.numel(), dtype=torch.uint8, device=values.device)
    split = rows * SCALE_BYTES
    payload[:split].view(torch.float32).copy_(scale)
    payload[split:].view(torch.int8).view(rows, -1).copy_(steps)
    return payload


def from_int8(payload: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The uint8 vector of `to_int8` -> floats of `shape`."""
    rows = int8_rows(shape)
    split = rows * SCALE_BYTES
    scale = payload[:split].clone().view(torch.float32).unsqueeze(1)  # the payload need not be aligned
    steps = payload[split:].view(torch.int8).view(rows, -1)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return (steps.to(wide) * scale).to(dtype).view(shape)
