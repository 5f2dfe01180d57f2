"""Gradients of a spill packed by a codec: bytes (uint8) under a name that says how to unpack them.

`coded/CODEC/DTYPE/SHAPE/NAME`, such as `coded/rand2/float32/64x64/grad/body.0.weight`; so a spill stays a safetensors
file that describes itself, and readers need not agree on anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from zsfl.errors import BadShape, SpillCorrupt
from zsfl.ids import parse_cid
from zsfl.tensors.codec import Codec, unpack, unpacked_bytes
from zsfl.tensors.feedback import ErrorFeedback
from zsfl.tensors.spec import MAX_TENSOR_BYTES, TensorSpec

if TYPE_CHECKING:
    from zsfl.spill.layout import SpillMeta

_GRAD = "grad/"
CODED = "coded/"
"""What the names of packed tensors begin with."""


class SpillCoder:
    """Packs the gradients of one node's spills; what else is in them stays as it is."""

    def __init__(self, codec: Codec, *, feedback: bool = False) -> None:
        """With `feedback`, what is left out of a gradient is added to the next one of the same shard or body."""
        self._codec = codec
        self._feedback = ErrorFeedback(codec) if feedback else None

    def coded(self, meta: SpillMeta, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The tensors to store in place of these."""
        if self._codec == Codec():
            return tensors
        whose = parse_cid(meta.cid).shard if meta.part == "client" else None
        found: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if not name.startswith(_GRAD) or not tensor.numel():
                found[name] = tensor
                continue
            if self._feedback is None:
                spec, data = self._codec.pack(name, tensor)
            else:
                spec, data = self._feedback.pack((whose, name), name, tensor)
            if spec.codec == "raw":
                found[name] = tensor if self._feedback is None else unpack(spec, data)
            else:
                found[_name(spec)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return found


def uncoded(tensors: dict[str, torch.Tensor], max_bytes: int = MAX_TENSOR_BYTES) -> dict[str, torch.Tensor]:
    """The tensors that a coder was given, as far as it kept them; SpillCorrupt where a name or bytes say nothing.

    All together they may take so many bytes, which a few packed ones may stand for.
    """
    if not any(name.startswith(CODED) for name in tensors):
        return tensors
    found: dict[str, torch.Tensor] = {}
    room = max_bytes
    for stored, tensor in tensors.items():
        if not stored.startswith(CODED):
            found[stored] = tensor
            continue
        try:
            if tensor.dtype is not torch.uint8 or tensor.ndim != 1:
                raise BadShape(f"{stored[:80]!r} is not stored as bytes")
            spec = _spec(stored, len(tensor))
            if spec.name in tensors or spec.name in found:
                raise BadShape(f"{spec.name[:80]!r} is there twice")
            room -= unpacked_bytes(spec, len(tensor))
            if room < 0:
                raise BadShape(f"its tensors take more than {max_bytes} bytes once they are unpacked")
            found[spec.name] = unpack(spec, tensor.numpy().data)
        except (BadShape, ValueError) as error:
            raise SpillCorrupt(f"not a whole spill: {error}") from error
    return found


@lru_cache(1024)
def _name(spec: TensorSpec) -> str:
    return f"{CODED}{spec.codec}/{spec.dtype}/{'x'.join(map(str, spec.shape))}/{spec.name}"


@lru_cache(1024)
def _spec(stored: str, size: int) -> TensorSpec:
    """ValueError where the name is not made as `_name` makes it."""
    _, codec, dtype, shape, name = stored.split("/", 4)
    return TensorSpec(name, dtype, tuple(map(int, shape.split("x"))) if shape else (), codec, size)
