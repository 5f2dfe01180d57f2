"""The versions that an aggregator can still hand out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from zsfl.errors import StaleWeights
from zsfl.ids import Portion, Version
from zsfl.tensors.codec import Codec
from zsfl.weights.packing import RAW, Base, Packed, State, pack
from zsfl.wire.messages import FetchWeights

KEPT_VERSIONS = 4
"""Kept of whatever size: a step in flight is at most a version or two behind where nobody is slow."""
KEPT_BYTES = 1 << 30
"""More versions than that are kept, for those who are slow, only while they are not longer than this together."""


class Shelf:
    """The newest versions, packed or to be packed when they are asked for."""

    def __init__(
        self,
        portions: Mapping[Portion, Collection[str]],
        max_staleness: int = 0,
        *,
        codec: Codec = RAW,
        differences: bool = False,
    ) -> None:
        """`portions` are given with the names of their tensors. Steps up to `max_staleness` versions late count, so
        their versions had better be there. With `differences` a version is published as what differs from the one
        before; whoever asks for one gets it whole.
        """
        self._portions = portions
        self._codec = codec
        self._differences = differences
        self._states: dict[Version, State] = {}
        """Of which a portion may have to be packed yet, or from which the next version differs."""
        self._packed: dict[Version, dict[Portion, Packed]] = {}
        """Whole ones."""
        self._most = max(KEPT_VERSIONS, max_staleness + 2)
        self._pins: Counter[Version] = Counter()

    def put(self, version: Version, state: State) -> dict[Portion, Packed]:
        """Pack a version, to be published; the oldest one makes room."""
        before = Version(version - 1)
        differs = self._differences and before == max(self._packed, default=None)
        base = (before, self._states[before]) if differs else None
        self._states[version] = state
        published = {portion: self._pack(version, portion, base) for portion in self._portions}
        self._packed[version] = {} if base else published
        size_bytes = sum(tensor.nbytes for tensor in state.values())
        self._keep(max(KEPT_VERSIONS, min(self._most, KEPT_BYTES // max(size_bytes, 1))))
        return published

    def _pack(self, version: Version, portion: Portion, base: Base | None = None) -> Packed:
        names = self._portions[portion]
        own = {name: tensor for name, tensor in self._states[version].items() if name in names}
        return pack(version, portion, own, self._codec, base)

    def _keep(self, count: int) -> None:
        """Let go of the oldest versions beyond `count`, other than those that are pinned, and of what is packed."""
        for version in sorted(self._packed)[:-count]:
            if not self._pins[version]:
                del self._packed[version]
        base = max(self._packed) if self._differences else None
        self._states = {
            version: state
            for version, state in self._states.items()
            if version == base or len(self._packed.get(version, self._portions)) < len(self._portions)
        }

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
        whole = self._packed[version]
        if request.portion not in whole:
            whole[request.portion] = self._pack(version, request.portion)
        return whole[request.portion]
