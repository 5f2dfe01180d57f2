"""The versions that an aggregator can still hand out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import torch

from zsfl.errors import StaleWeights
from zsfl.ids import Portion, Version
from zsfl.tensors.codec import Codec
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import FetchWeights, Weights

KEPT_VERSIONS = 4
"""Kept of whatever size: a step in flight is at most a version or two behind where nobody is slow."""
KEPT_BYTES = 1 << 30
"""More versions than that are kept, for those who are slow, only while they are not longer than this together."""

Packed = tuple[Weights, list[Buffer]]
_RAW = Codec.parse("raw")


def pack(version: Version, portion: Portion, state: Mapping[str, torch.Tensor]) -> Packed:
    """The message that carries `state`. Lossless: every node must hold the same weights."""
    packed = [_RAW.pack(name, tensor) for name, tensor in state.items()]
    specs = tuple(spec for spec, _ in packed)
    return Weights(portion=portion, version=version, tensors=specs), [buffer for _, buffer in packed]


class Shelf:
    """Packed weights of the newest versions."""

    def __init__(self, portions: Mapping[Portion, Collection[str]], max_staleness: int = 0) -> None:
        """`portions` are given with the names of their tensors. Steps up to `max_staleness` versions late count, so
        their versions had better be there.
        """
        self._portions = portions
        self._packed: dict[Version, dict[Portion, Packed]] = {}
        self._most = max(KEPT_VERSIONS, max_staleness + 2)
        self._pins: Counter[Version] = Counter()

    def put(self, version: Version, state: Mapping[str, torch.Tensor]) -> dict[Portion, Packed]:
        """Pack a version, to be published; the oldest one makes room."""
        packed = {
            portion: pack(version, portion, {name: tensor for name, tensor in state.items() if name in names})
            for portion, names in self._portions.items()
        }
        self._packed[version] = packed
        size_bytes = sum(tensor.nbytes for tensor in state.values())
        self._keep(max(KEPT_VERSIONS, min(self._most, KEPT_BYTES // max(size_bytes, 1))))
        return packed

    def _keep(self, count: int) -> None:
        """Let go of the oldest versions beyond `count`, other than those that are pinned."""
        for version in sorted(self._packed)[:-count]:
            if not self._pins[version]:
                del self._packed[version]

    def pin(self, version: Version) -> None:
        """Keep a version until it is unpinned as often."""
        self._pins[version] += 1

    def unpin(self, version: Version) -> None:
        """The next `put` may let it go."""
        self._pins[version] -= 1
        if not self._pins[version]:
            del self._pins[version]

    def answer(self, request: FetchWeights) -> Packed:
        """What was asked for; StaleWeights when it is not held (any more)."""
        version = max(self._packed, default=None) if request.version is None else request.version
        if version is None or version not in self._packed:
            held = f"those from {min(self._packed)} to {max(self._packed)}" if self._packed else "none"
            raise StaleWeights(f"version {version} is not held, only {held}; redo the step at the newest version")
        if request.portion not in self._portions:
            raise StaleWeights(
                f"there is no portion {request.portion!r} of the weights: do all nodes run the same job?"
            )
        return self._packed[version][request.portion]
