"""Which nodes a cluster has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zsfl.ranges import ranges

MOST_NAME = 60
"""Characters of a client's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The nodes of a cluster: by name, in the order in which they are started, what each is set to beside the others.

    The aggregator is called "aggregator".
    """

    shards: int
    aggregator: Mapping[str, Any]
    split_servers: Mapping[str, Mapping[str, Any]]
    clients: Mapping[str, Mapping[str, Any]]
    standbys: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])


def client_flags(shards: Sequence[int], processes: int) -> dict[str, dict[str, Any]]:
    """Clients that hold these shards in so many processes, by name."""
    found: dict[str, dict[str, Any]] = {}
    for number in range(processes):
        mine = shards[number * len(shards) // processes : (number + 1) * len(shards) // processes]
        held = ranges(mine)
        name = f"client-{held.replace(', ', '_')}"
        if len(name) > MOST_NAME:
            name = f"client-{mine[0]}_and_{len(mine) - 1}_more"
        found[name] = {"shards": held}
    return found
