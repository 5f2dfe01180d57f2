"""Which nodes that ended are started again: decisions only."""

from __future__ import annotations

from collections import Counter

from zsfl.cluster.nodes import NodeInfo

MOST_DEATHS = 3
"""One after another, without having been ready: then something is wrong that starting it again does not mend."""


class Keeper:
    """Has those started again that were killed; who left on purpose, or failed for a reason of its own, stays away."""

    def __init__(self) -> None:
        self._deaths: Counter[str] = Counter()

    def starts_again(self, name: str, node: NodeInfo) -> bool:
        """Whether this node, which ended, is to be started again."""
        if node.failed is not None or not node.exit_code:
            return False
        self._deaths[name] = 1 if node.was_ready else self._deaths[name] + 1
        return self._deaths[name] <= MOST_DEATHS
