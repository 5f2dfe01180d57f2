"""Error feedback: what lossy packing leaves out of one tensor is added to the next one of the same name.

For sums that are added up in the end (gradients, changes of weights), where what is late still counts. Not for fresh
activations: what was left out of one batch has no place in another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor

from zsfl.tensors.codec import Codec, unpack
from zsfl.tensors.spec import TensorSpec

MOST_KEPT = 4096
"""Tensors whose rest is kept; that of the longest unused is let go first, which costs a little accuracy."""


class ErrorFeedback:
    """The rests of one sender. Losing it loses no more than the rests."""

    def __init__(self, codec: Codec, most: int = MOST_KEPT) -> None:
        self.codec = codec
        self._most = most
        self._rests: OrderedDict[Hashable, Tensor] = OrderedDict()

    def pack(self, key: Hashable, name: str, tensor: Tensor) -> tuple[TensorSpec, bytes | memoryview]:
        """As `Codec.pack`, of the tensor and what was left out before under this key; BadShape alters nothing.

        A tensor of another shape or dtype than the one before begins anew, and so does one after an inf or NaN.
        """
        if not tensor.is_floating_point():
            return self.codec.pack(name, tensor)
        whole = tensor.detach().cpu()
        rest = self._rests.get(key)
        if rest is not None and (rest.shape, rest.dtype) == (whole.shape, whole.dtype):
            whole = whole + rest
        spec, buffer = self.codec.pack(name, whole)
        left = whole - unpack(spec, buffer)
        if torch.isfinite(left).all():
            self._rests[key] = left
            self._rests.move_to_end(key)
        else:
            self._rests.pop(key, None)
        while len(self._rests) > self._most:
            self._rests.popitem(last=False)
        return spec, buffer

    def forget(self, key: Hashable) -> None:
        """Let go of a rest, such as that of a tensor that is no longer trained."""
        self._rests.pop(key, None)
