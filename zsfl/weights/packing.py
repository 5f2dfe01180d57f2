"""One portion of a version as the message that carries it, and back: whole, or as what differs from another version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from zsfl.errors import BadShape
from zsfl.ids import Portion, Version
from zsfl.tensors.bits import are_like, xor
from zsfl.tensors.codec import Codec, unpack
from zsfl.tensors.spec import MAX_TENSOR_BYTES
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import Weights

Packed = tuple[Weights, list[Buffer]]
State = Mapping[str, torch.Tensor]
Base = tuple[Version, State]
"""A version that another one may differ from."""
RAW = Codec()


def pack(version: Version, portion: Portion, state: State, codec: Codec = RAW, base: Base | None = None) -> Packed:
    """The message that carries `state`, whole or as the bits that differ from those of `base`, which has its tensors.

    The codec is lossless: every node must hold the same weights.
    """
    packed = [
        codec.pack(name, tensor if base is None else xor(tensor, base[1][name])) for name, tensor in state.items()
    ]
    specs = tuple(spec for spec, _ in packed)
    based_on = None if base is None else base[0]
    return Weights(portion=portion, version=version, base=based_on, tensors=specs), [buffer for _, buffer in packed]


def unpacked(
    weights: Weights, parts: Sequence[Buffer], base: Base | None = None, *, max_bytes: int = MAX_TENSOR_BYTES
) -> dict[str, torch.Tensor]:
    """The weights themselves; BadShape where message and parts do not agree, or differ from what is not `base`."""
    if len(parts) != len(weights.tensors):
        raise BadShape(f"{len(weights.tensors)} tensors are declared and {len(parts)} arrived")
    packed = zip(weights.tensors, parts, strict=True)
    if weights.base is None:
        return {spec.name: unpack(spec, part, max_bytes=max_bytes) for spec, part in packed}
    if base is None or weights.base != base[0]:
        raise BadShape(f"version {weights.version} differs from {weights.base}, which is not here")
    before = base[1]
    if not are_like(weights.tensors, before):
        raise BadShape(f"version {weights.version} has other tensors than {weights.base}, from which it differs")
    return {spec.name: xor(unpack(spec, part, max_bytes=max_bytes), before[spec.name]) for spec, part in packed}
