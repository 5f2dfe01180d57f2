"""Which waiting steps a server takes through the body at once: decisions only, learned from its own measurements."""

from __future__ import annotations

from collections import defaultdict

MOST_MERGED = 64
"""Steps in one pass."""
MOST_MERGED_BYTES = 64 << 20
"""Of their inputs together: what autograd keeps for them is a multiple of it."""
PROBE_EVERY = 64
"""So often the way that seems slower is measured again."""
SMOOTHING = 0.2
"""Weight of the newest measurement."""


class MergePolicy:
    """Merges where a sample costs less so; the two ways are measured apart for each kind of request."""

    def __init__(self) -> None:
        self._cost_s: dict[tuple[str, bool], float] = {}
        self._decided: defaultdict[str, int] = defaultdict(int)

    def pays(self, kind: str, count: int) -> bool:
        """Whether to take so many steps of this kind at once."""
        if count < 2:
            return False
        self._decided[kind] += 1
        merged, single = self._cost_s.get((kind, True)), self._cost_s.get((kind, False))
        if merged is None or single is None:
            return merged is None
        return (merged < single) is (self._decided[kind] % PROBE_EVERY != 0)

    def measured(self, kind: str, merged: bool, samples: int, seconds: float) -> None:
        """A pass over so many samples took so long."""
        cost_s, key = seconds / max(samples, 1), (kind, merged)
        before = self._cost_s.get(key, cost_s)
        self._cost_s[key] = before + SMOOTHING * (cost_s - before)
