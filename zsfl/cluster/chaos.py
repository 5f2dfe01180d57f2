"""Kills nodes of a cluster on purpose, at random moments that a seed decides."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from zsfl.cluster.nodes import NodeInfo
from zsfl.errors import ConfigError
from zsfl.ids import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Chaos:
    """So many kills, one about every `every_s` seconds, spread evenly over `roles`; equal seeds draw alike.

    Only nodes that are ready are killed, and only while the cluster trains.
    """

    kills: int = 100
    every_s: float = 0.5
    roles: Sequence[Role | str] = (Role.CLIENT, Role.SPLIT_SERVER, Role.AGGREGATOR)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kills < 0 or not 0 < self.every_s < math.inf:
            raise ConfigError(f"{self.kills} kills every {self.every_s} s: use 0 kills or more, and a time above 0")
        known = (Role.CLIENT, Role.SPLIT_SERVER, Role.AGGREGATOR)
        if not self.roles or any(role not in known for role in self.roles):
            raise ConfigError(f"roles are {tuple(self.roles)!r}: name some of {', '.join(known)}")

    def plan(self) -> Iterator[tuple[float, Role, float]]:
        """For each kill: after what pause, in which role, and where among its nodes (0 to 1)."""
        draw = random.Random(self.seed)
        roles = [Role(role) for role in self.roles]
        for number in range(self.kills):
            # In turn, in an order of its own each time, so that few kills are spread over the roles too.
            if number % len(roles) == 0:
                draw.shuffle(roles)
            yield draw.expovariate(1 / self.every_s), roles[number % len(roles)], draw.random()


class Killable(Protocol):
    """A cluster, as far as it matters here."""

    @property
    def nodes(self) -> Mapping[str, NodeInfo]:
        """By name."""
        ...

    @property
    def is_training(self) -> bool:
        """Whether an order to train is being carried out."""
        ...

    async def until(self, true: Callable[[], object]) -> None:
        """Returns once `true` is."""
        ...

    async def kill(self, name: str) -> None:
        """End one node at once."""
        ...


async def wreck(cluster: Killable, chaos: Chaos, killed: list[str]) -> None:
    """Carry out a plan while the cluster trains, and write down the names of those that were killed."""
    for pause_s, role, place in chaos.plan():
        await asyncio.sleep(pause_s)
        await cluster.until(lambda role=role: cluster.is_training and _there(cluster, role))
        there = _there(cluster, role)
        victim = there[int(place * len(there))]
        killed.append(victim)
        await cluster.kill(victim)


def _there(cluster: Killable, role: Role) -> list[str]:
    """Those who stand by count as aggregators, since each may be the one that aggregates."""
    roles = {role, Role.STANDBY} if role is Role.AGGREGATOR else {role}
    return sorted(name for name, node in cluster.nodes.items() if node.role in roles and node.is_there)
