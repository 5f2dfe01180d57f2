"""The bits of tensors: in which of them two versions of a tensor differ, and one of them made of that and the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zsfl.errors import BadShape
from zsfl.tensors.spec import TensorSpec

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes an element, what its bits are looked at as."""


def xor(one: Tensor, other: Tensor) -> Tensor:
    """A new tensor like both, of the bits that differ: `xor(xor(a, b), b)` is `a`, bit for bit, NaNs too.

    BadShape unless dtype and shape are the same.
    """
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        raise BadShape(f"{one.dtype} {tuple(one.shape)} cannot differ in bits from {other.dtype} {tuple(other.shape)}")
    word = _WORDS[one.dtype.itemsize]
    return torch.bitwise_xor(one.detach().view(word), other.detach().view(word)).view(one.dtype)


def are_like(specs: Sequence[TensorSpec], state: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of `state` as to names, order, dtypes and shapes, whatever their bits."""
    return [(spec.name, spec.dtype, spec.shape) for spec in specs] == [
        (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in state.items()
    ]
