"""Which split server takes the next request: decisions only, no sockets and no clock."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from zsfl.ids import NodeId
from zsfl.wire.fields import Load

UNKNOWN_SERVICE_S = 0.001
"""Assumed of a server that no server's service time is known for: short, so that it is tried soon."""
MIN_SERVICE_S = 1e-6
"""No server is faster: a weight stays a finite number whatever a server says."""
SHUN_S = 1.0
"""How long a server is avoided after it failed, while there are others."""
MAX_SHUN_S = 5.0
"""A server that refuses work cannot ask to be left alone for longer."""
MAX_AVOIDED_S = 60.0
"""The longest that a server is avoided, while there are others, that failed again and again."""

UNKNOWN_SLOTS = 4
"""Requests of ours at once to a server that has not said yet how many it admits."""
MAX_ASKED = 128
"""Requests of ours at once to any server, whatever it says: well below what a connection carries."""


@dataclass(slots=True)
class _Server:
    load: Load | None = None
    asked: int = 0
    """Requests of ours that it has not answered."""
    due: int = 0
    """Requests of ours that only this server can answer well and that wait for it to have room."""
    shunned_until_s: float = 0.0
    silences: int = 0
    """Since it served last: requests that it did not answer in time."""
    losses: int = 0
    """How often what it had acknowledged did not reach the aggregator."""

    @property
    def slots(self) -> int:
        return UNKNOWN_SLOTS if self.load is None else min(self.load.slots, MAX_ASKED)

    @property
    def has_room(self) -> bool:
        return self.asked + self.due < self.slots


class ServerChooser:
    """Chooses at random, in proportion to how soon each server is likely to answer.

    At random, since clients that all ran for the shortest queue would all stand in it.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._servers: dict[NodeId, _Server] = {}

    def joined(self, server: NodeId) -> None:
        """A server is there."""
        self._servers.setdefault(server, _Server())

    def lost(self, server: NodeId) -> None:
        """A server is gone."""
        self._servers.pop(server, None)

    def heard(self, server: NodeId, load: Load) -> None:
        """A server said how busy it is."""
        if server in self._servers:
            self._servers[server].load = load

    def asked(self, server: NodeId) -> None:
        """A request is on its way."""
        if server in self._servers:
            self._servers[server].asked += 1

    def answered(self, server: NodeId) -> None:
        """A request came to its end, well or not."""
        # One that was lost and came back was not asked what its former self was.
        if server in self._servers and self._servers[server].asked:
            self._servers[server].asked -= 1

    def refused(self, server: NodeId, now_s: float, for_s: float = SHUN_S) -> None:
        """A server has no room or failed: leave it alone for a while."""
        if server in self._servers:
            self._servers[server].shunned_until_s = now_s + min(for_s, MAX_SHUN_S)

    def silent(self, server: NodeId, now_s: float) -> None:
        """A server did not answer in time. That costs a deadline, so it is tried ever more seldom."""
        if (held := self._servers.get(server)) and held.shunned_until_s <= now_s:
            held.silences += len(self._servers) > 1
            held.shunned_until_s = now_s + min(SHUN_S * 2 ** max(0, held.silences - 1), MAX_AVOIDED_S)

    def served(self, server: NodeId) -> None:
        """A server answered."""
        if server in self._servers:
            self._servers[server].silences = 0

    def unreached(self, server: NodeId, now_s: float) -> None:
        """What a server acknowledged does not reach the aggregator: it is tried ever more seldom, though it answers."""
        held = self._servers.get(server)
        if held is not None and len(self._servers) > 1 and held.shunned_until_s <= now_s:
            held.shunned_until_s = now_s + min(MAX_SHUN_S * 2**held.losses, MAX_AVOIDED_S)
            held.losses += 1

    def pick(self, now_s: float) -> NodeId | None:
        """A server to ask now; None when all are shunned (see `next_free_s`) or hold as much of ours as they admit."""
        free = {
            name: server
            for name, server in self._servers.items()
            if server.shunned_until_s <= now_s and server.has_room
        }
        if not free:
            return None
        loads = [server.load for server in self._servers.values() if server.load is not None]
        known = [load.service_s for load in loads if load.service_s]
        guess_s = min(known, default=UNKNOWN_SERVICE_S)
        weights = [1.0 / _expected_s(server, guess_s) for server in free.values()]
        return self._rng.choices(list(free), weights)[0]

    def next_free_s(self) -> float | None:
        """When the first server that has room may be asked again; None when none has room."""
        return min((server.shunned_until_s for server in self._servers.values() if server.has_room), default=None)

    @property
    def occupied(self) -> bool:
        """Whether any server is busy with requests of ours."""
        return any(server.asked for server in self._servers.values())

    def is_full(self, server: NodeId) -> bool:
        """Whether this server answers as many requests of ours as it admits; one that admits none is not full."""
        held = self._servers.get(server)
        return held is not None and 0 < held.slots <= held.asked

    @contextmanager
    def due(self, server: NodeId) -> Iterator[None]:
        """While inside, the next room at this server is kept for a request that only it can answer well."""
        held = self._servers.get(server, _Server())
        held.due += 1
        try:
            yield
        finally:
            held.due -= 1


def _expected_s(server: _Server, guess_s: float) -> float:
    """Seconds until the server would answer one more request."""
    if server.load is None:
        return max(guess_s, MIN_SERVICE_S) * (server.asked + 1)
    queue = max(server.load.busy, server.asked)
    crowded = max(1.0, (queue + 1) / max(server.load.slots, 1))
    return max(server.load.service_s or guess_s, MIN_SERVICE_S) * (queue + 1) * crowded
