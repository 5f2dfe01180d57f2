"""What helps where clients differ in their labels and in their speed: logit adjustment, and batch sizes.

Both need only how many samples of each class a client has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from zsfl.errors import ConfigError
from zsfl.learning.batches import Batches

Loss = Callable[[Tensor, Tensor], Tensor]
Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
MAX_CLASSES = 1024
CHUNK = 4096
"""Samples that are read at once to count their classes."""
IGNORED = -100
"""The target that torch's losses leave out unless told otherwise."""
SMOOTHING = 0.5
"""For each class there is, so many samples of the mix of all shards are added to what is present, so that a class that
is absent keeps a finite logarithm."""
SLOWEST = 1e-6
"""No client counts as slower than this share of the fastest."""
NEWTON_STEPS = 50
"""Far more than it takes, which is about ten."""


def class_counts(data: Batches) -> tuple[int, ...]:
    """Samples of each class, from 0 up to the highest there is; every target of a sample with many counts.

    `ConfigError` when the targets are no class indices.
    """
    counts = torch.zeros(0, dtype=torch.int64)
    for rows in torch.arange(len(data)).split(CHUNK):
        _, y = data[rows]
        y = y[y != IGNORED]
        if y.dtype != torch.int64 or (y.numel() and int(y.min()) < 0):
            raise ConfigError(
                f"the targets are {y.dtype} and not class indices from 0 up: adjust_logits, and by_speed with mix "
                "above 0, need classes; leave them out"
            )
        if y.numel() and int(y.max()) >= MAX_CLASSES:
            raise ConfigError(f"the targets have {int(y.max()) + 1} classes: at most {MAX_CLASSES} can be adjusted to")
        more = torch.bincount(y, minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    return tuple(counts.tolist())


def logit_shift(present: Sequence[int], everybody: Sequence[int]) -> Tensor:
    """log(p/q) for each class of `everybody`, with p the class shares of `present` and q those of `everybody`.

    Added to the logits before the loss, it lets a network that is trained on p learn the posterior of q (Menon et al.
    2021, logit adjustment; SCALA uses it for split federated learning). All zeros where p and q are equal, so that with
    everybody there nothing changes; 0 for a class that nobody has, which p and q agree on.
    """
    shift = torch.zeros(len(everybody), dtype=torch.float64)
    if tuple(present) == tuple(everybody):
        return shift
    p = torch.zeros_like(shift)
    p[: len(present)] = torch.tensor(present[: len(p)], dtype=torch.float64)
    q = torch.tensor(everybody, dtype=torch.float64) / max(sum(everybody), 1)
    known = q > 0
    added = SMOOTHING * int(known.sum())
    shift[known] = ((p[known] / q[known] + added) / (p.sum() + added)).log()
    return shift


def shifted_loss(loss: Loss, shift: Tensor) -> Loss:
    """`loss` of logits [B, C, ...] to which `shift` is added; classes behind its end are not shifted."""

    def shifted(output: Tensor, target: Tensor) -> Tensor:
        if output.ndim < 2 or output.shape[1] < len(shift):
            raise ConfigError(
                f"the output is {list(output.shape)}, and the data has {len(shift)} classes: adjust_logits needs "
                "logits [B, C, ...]"
            )
        whole = torch.zeros(output.shape[1], dtype=output.dtype, device=output.device)
        whole[: len(shift)] = shift
        return loss(output + whole.view([1, -1] + [1] * (output.ndim - 2)), target)

    return shifted


def regulate(
    speeds: Sequence[float],
    mixes: Sequence[Sequence[int]],
    total: int,
    least: int,
    most: int,
    mix: float,
    everybody: Sequence[int] | None = None,
) -> list[int]:
    """Batch sizes that sum to `total` (as far as the bounds allow), each from `least` to `most`.

    Proportional to the clients' speeds (samples/s), so that all are done at the same time, but regulated so that the
    merged batch keeps the label mix of all data (MergeSFL, Liao et al. 2024): they minimise, for sizes b of sum T,

        chi2(b/T, s/T) + mix chi2(sum_i b_i q_i / T, q)     where chi2(x, y) = sum (x - y)^2 / y

    with s_i the size proportional to speed, q_i client i's class shares from its counts in `mixes` (without any it has
    no say), and q those of `everybody` (None: of these clients together).
    """
    total = min(max(total, len(speeds) * least), len(speeds) * most)
    speed = np.asarray(speeds, dtype=np.float64) / max(speeds)
    speed = np.maximum(speed, SLOWEST)
    ideal = total * speed / speed.sum()
    off = _off(mixes, everybody) * np.sqrt(mix / total)
    return _whole(_regulated(ideal, off, total, least, most), total, most)


def _off(mixes: Sequence[Sequence[int]], everybody: Sequence[int] | None) -> Array:
    """[clients, classes]: how far each client's class shares are from all data's, in units of the root of these."""
    counts = np.zeros((len(mixes), max(len(everybody or ()), *map(len, mixes))))
    for row, mix in zip(counts, mixes, strict=True):
        row[: len(mix)] = mix
    whole = counts.sum(0) if everybody is None else np.pad(everybody, (0, counts.shape[1] - len(everybody)))
    sums, q = counts.sum(1, keepdims=True), whole / max(whole.sum(), 1.0)
    off = np.where(sums > 0, counts / np.maximum(sums, 1.0) - q, 0.0)
    return off[:, q > 0] / np.sqrt(q[q > 0])


def _regulated(ideal: Array, off: Array, total: int, least: int, most: int) -> Array:
    """The sizes b of that sum, within the bounds, that minimise sum (b - ideal)^2 / ideal + |b off|^2.

    Newton's method on the dual, which has one variable y for each column of `off` and in which sum and bounds are a
    projection: there y = b off, and b is the nearest to ideal (1 - off y).
    """
    if off.shape[1] > len(ideal):  # the same norm with fewer columns
        off = np.asarray(np.linalg.qr(off.T, mode="r")).T

    def at(dual: Array) -> tuple[Array, float]:
        sizes = _onto(ideal - ideal * (off @ dual), ideal, total, least, most)
        return sizes, float((np.square(sizes - ideal) / ideal).sum() / 2 + sizes @ off @ dual - dual @ dual / 2)

    dual = np.zeros(off.shape[1])
    sizes, value = at(dual)
    for _ in range(NEWTON_STEPS):
        slope = sizes @ off - dual
        free = np.where((sizes > least) & (sizes < most), ideal, 0.0)
        centred = off - free @ off / (free.sum() or 1.0)
        step = np.linalg.solve(np.eye(len(dual)) + (centred.T * free) @ centred, slope)
        gain = float(slope @ step)
        part, tried = 1.0, at(dual + step)
        while tried[1] < value + 1e-4 * part * gain and part > 1e-9:
            part /= 2
            tried = at(dual + part * step)
        if gain < 1e-9 * total or tried[1] <= value:
            break
        dual, (sizes, value) = dual + part * step, tried
    return sizes


def _onto(sizes: Array, weights: Array, total: int, least: int, most: int) -> Array:
    """The nearest sizes, in the metric of 1/weights, that keep sum and bounds."""
    low, high = ((least - sizes) / weights).min(), ((most - sizes) / weights).max()
    for _ in range(60):
        middle = (low + high) / 2
        if np.clip(sizes + middle * weights, least, most).sum() < total:
            low = middle
        else:
            high = middle
    return np.clip(sizes + high * weights, least, most)


def _whole(sizes: Array, total: int, most: int) -> list[int]:
    """Whole numbers with that sum, none above `most`: the largest remainders are rounded up."""
    whole = np.floor(sizes + 1e-9).astype(np.int64)
    order = [int(i) for i in np.argsort(whole - sizes, kind="stable")]
    left = total - int(whole.sum())
    while left > 0:
        for i in order:
            if left > 0 and whole[i] < most:
                whole[i] += 1
                left -= 1
    return whole.tolist()
