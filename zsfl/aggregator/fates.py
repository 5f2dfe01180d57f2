"""What became of every step of a run: a few bits each, so that none is ever counted or dropped twice."""

from __future__ import annotations

from zsfl.ids import StepId


class StepSet:
    """A set of the steps of one run. A bit for each step up to the last one: 25 KB for 100,000 versions and k < 2."""

    def __init__(self, steps_per_version: int) -> None:
        self._width = steps_per_version
        self._bits: dict[int, bytearray] = {}

    def add(self, step: StepId) -> None:
        """Put a step in; its k must be below the steps of a version."""
        byte, bit = divmod(step.version * self._width + step.k, 8)
        held = self._bits.setdefault(step.shard, bytearray())
        if len(held) <= byte:
            held.extend(bytes(byte + 1 - len(held) + len(held) // 8))  # a little more, so that it grows seldom
        held[byte] |= 1 << bit

    def __contains__(self, step: StepId) -> bool:
        if step.k >= self._width:
            return False
        byte, bit = divmod(step.version * self._width + step.k, 8)
        held = self._bits.get(step.shard, b"")
        return byte < len(held) and bool(held[byte] & 1 << bit)
