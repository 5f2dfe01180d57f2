"""The versions that an aggregator can still hand out."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from zsfl.errors import StaleWeights
from zsfl.ids import PartName, Version
from zsfl.tensors.codec import Codec
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import FetchWeights, Weights

KEPT_VERSIONS = 4
"""A step in flight is at most a version or two behind; older ones would be refused by the ledger anyway."""

Packed = tuple[Weights, list[Buffer]]
_RAW = Codec.parse("raw")


def pack(version: Version, part: PartName, state: Mapping[str, torch.Tensor]) -> Packed:
    """The message that carries one part of the model. Lossless: every node must hold the same weights."""
    packed = [
        _RAW.pack(name, tensor) for name, tensor in state.items() if (name.startswith("body.")) == (part == "body")
    ]
    specs = tuple(spec for spec, _ in packed)
    return Weights(part=part, version=version, tensors=specs), [buffer for _, buffer in packed]


class Shelf:
    """Packed weights of the newest versions."""

    def __init__(self) -> None:
        self._packed: dict[Version, dict[PartName, Packed]] = {}

    def put(self, version: Version, state: Mapping[str, torch.Tensor]) -> dict[PartName, Packed]:
        """Pack a version, to be published; the oldest one makes room."""
        parts: dict[PartName, Packed] = {
            "body": pack(version, "body", state),
            "client": pack(version, "client", state),
        }
        self._packed[version] = parts
        while len(self._packed) > KEPT_VERSIONS:
            del self._packed[min(self._packed)]
        return parts

    def answer(self, request: FetchWeights) -> Packed:
        """What was asked for; StaleWeights when it is not held (any more)."""
        version = max(self._packed, default=None) if request.version is None else request.version
        if version is None or version not in self._packed:
            held = f"{min(self._packed)} to {max(self._packed)}" if self._packed else "none"
            raise StaleWeights(f"version {version} is not held, only {held}; redo the step at the newest version")
        return self._packed[version][request.part]
