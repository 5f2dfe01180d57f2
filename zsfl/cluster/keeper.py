"""Which nodes that ended are started again: decisions only."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from zsfl.cluster.nodes import NodeInfo

MOST_DEATHS = 3
"""One after another, without having been ready: then something is wrong that starting it again does not mend."""
MOST_EARLY_DEATHS = 10
"""The same of one that was ready, but never for long. More, as it may have come a step further each time."""
EARLY_S = 10.0
"""A node that dies later than so long after it was ready has shown that it can live."""


class Keeper:
    """Has those started again that were killed; who left on purpose, or failed for a reason of its own, stays away."""

    def __init__(self) -> None:
        self._unready: Counter[str] = Counter()
        self.early: Counter[str] = Counter()
        """By node, its deaths in succession that came soon."""

    def decide(self, name: str, node: NodeInfo, now_s: float) -> Literal["start again", "let go", "give up"]:
        """What becomes of this node, which ended."""
        if node.failed is not None or not node.exit_code:
            return "let go"
        if node.was_killed:
            return "start again"
        self._unready[name] = 0 if node.was_ready else self._unready[name] + 1
        self.early[name] = 1 if now_s - node.ready_s > EARLY_S else self.early[name] + 1
        dies_always = self._unready[name] > MOST_DEATHS or self.early[name] > MOST_EARLY_DEATHS
        return "give up" if dies_always else "start again"
