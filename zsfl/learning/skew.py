"""What helps where clients differ in their labels and in their speed: logit adjustment, and batch sizes.

Both need only how many samples of each class a client has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

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
SMOOTHING = 0.5
"""Added to every class count, so that a class that nobody has keeps a finite logarithm."""
ROUNDS_OF_DESCENT = 300


def class_counts(data: Batches) -> tuple[int, ...]:
    """Samples of each class, from 0 up to the highest there is; every target of a sample with many counts."""
    counts = torch.zeros(0, dtype=torch.int64)
    for rows in torch.arange(len(data)).split(CHUNK):
        _, y = data[rows]
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or (y.numel() and int(y.min()) < 0):
            raise ConfigError(
                f"the targets are {y.dtype} and not class indices from 0 up: adjust_logits, and by_speed with mix "
                "above 0, need classes; leave them out"
            )
        if y.numel() and int(y.max()) >= MAX_CLASSES:
            raise ConfigError(f"the targets have {int(y.max()) + 1} classes: at most {MAX_CLASSES} can be adjusted to")
        more = torch.bincount(y.flatten(), minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    return tuple(counts.tolist())


def logit_shift(present: Sequence[int], everybody: Sequence[int]) -> Tensor:
    """log(p/q) for each class of `everybody`, with p the class shares of `present` and q those of `everybody`.

    Added to the logits before the loss, it lets a network that is trained on p learn the posterior of q (Menon et al.
    2021, logit adjustment; SCALA uses it for split federated learning). All zeros where p and q are equal, so that with
    everybody there nothing changes.
    """
    classes = len(everybody)
    if tuple(present) == tuple(everybody):
        return torch.zeros(classes, dtype=torch.float64)
    shares = []
    for counts in (present, everybody):
        padded = torch.zeros(classes, dtype=torch.float64)
        padded[: len(counts)] = torch.tensor(counts[:classes], dtype=torch.float64)
        shares.append((padded + SMOOTHING) / (padded + SMOOTHING).sum())
    return (shares[0] / shares[1]).log()


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
    speeds: Sequence[float], mixes: Sequence[Sequence[int]], total: int, least: int, most: int, mix: float
) -> list[int]:
    """Batch sizes that sum to `total` (as far as the bounds allow), each from `least` to `most`.

    Proportional to the clients' speeds (samples/s), so that all are done at the same time, but regulated so that the
    merged batch keeps the label mix of all data (MergeSFL, Liao et al. 2024): they minimise, for sizes b of sum T,

        sum_i (b_i - s_i)^2 / s_i + mix / T |sum_i b_i (q_i - q)|^2

    with s_i the size proportional to speed, q_i client i's class shares from its counts in `mixes`, and q those of all.
    """
    count = len(speeds)
    total = min(max(total, count * least), count * most)
    speed = np.asarray(speeds, dtype=np.float64)
    ideal = total * speed / speed.sum()
    counts = np.asarray(list(zip_longest(*mixes, fillvalue=0)), dtype=np.float64).T.reshape(count, -1)
    sums = counts.sum(1, keepdims=True)
    shares = np.divide(counts, sums, out=np.zeros_like(counts), where=sums > 0)
    off = shares - counts.sum(0) / max(counts.sum(), 1.0)
    off[sums[:, 0] == 0] = 0.0
    sizes = _onto(ideal, ideal, total, least, most)
    rate = 1.0 / (1.0 + 2.0 * mix)  # in the metric of 1/s the curvature is at most 1 + 2 mix
    for _ in range(ROUNDS_OF_DESCENT if mix and off.any() else 0):
        slope = (sizes - ideal) / ideal + mix / total * (off @ (off.T @ sizes))
        moved = _onto(sizes - rate * ideal * slope, ideal, total, least, most)
        if np.abs(moved - sizes).max() < 1e-3:
            break
        sizes = moved
    return _whole(sizes, total, most)


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
