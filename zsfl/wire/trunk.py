"""Several connections to one peer, where one does not fill a long link: each has a window of its own in TCP."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from zsfl.errors import DeadlineExceeded
from zsfl.wire.connection import Answer, Connection
from zsfl.wire.framing import Buffer, nbytes
from zsfl.wire.messages import Request

LONG_S = 0.01
"""A link with a longer round trip is not filled by one connection for certain; no LAN has one."""
LOOK_S = 1.0
"""How often a busy one asks the system for it, at most."""
MUCH_BYTES = 1 << 20
"""Of requests under way on a connection: with less a further one does not pay."""
MOST = 4
"""Connections opened by themselves; MAX_CALLERS has room for so many of each peer."""


class Trunk:
    """Spreads whole requests, so that what belongs to one, such as its end before time, goes the same way."""

    def __init__(self, connect: Callable[[], Connection], connections: int = 0) -> None:
        """As many `connections` as are asked for; 0: further ones where a long link is busy."""
        self._connect = connect
        self._most = connections or MOST
        self._under_way = {connect(): 0 for _ in range(connections or 1)}
        """Bytes of the requests on each."""
        self._first = next(iter(self._under_way))
        self._further: set[Connection] = set()
        """Those that were opened by themselves."""
        self._is_long, self._looked_s = False, -math.inf

    @property
    def peer(self) -> str:
        """Who is asked."""
        return self._first.peer

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._under_way)

    async def request(self, body: Request, parts: Sequence[Buffer] = (), *, deadline_s: float) -> Answer:
        """As of `Connection`, over the one that has least to do."""
        size = sum(map(nbytes, parts))
        connection = self._chosen()
        self._under_way[connection] += size
        try:
            return await connection.request(body, parts, deadline_s=deadline_s)
        except DeadlineExceeded:
            if connection in self._further and not connection.was_heard:
                self._give_up(connection)
            raise
        finally:
            if connection in self._under_way:
                self._under_way[connection] -= size

    def _chosen(self) -> Connection:
        idlest = min(self._under_way, key=self._under_way.__getitem__)
        if self._under_way[idlest] < MUCH_BYTES or self.connections >= self._most or not self._reaches_far():
            return idlest
        another = self._connect()
        if not another.is_open:  # there are no descriptors left
            another.close()
            return idlest
        self._under_way[another] = 0
        self._further.add(another)
        return another

    def _give_up(self, connection: Connection) -> None:
        """It never came about, as where the peer has no descriptor left, and would take all requests, as the idlest."""
        self._further.discard(connection)
        del self._under_way[connection]
        self._most = self.connections
        connection.close("has no room for another connection")

    def _reaches_far(self) -> bool:
        now_s = time.monotonic()
        if now_s >= self._looked_s + LOOK_S:
            round_trip_s = self._first.round_trip_s()
            self._is_long, self._looked_s = round_trip_s is not None and round_trip_s >= LONG_S, now_s
        return self._is_long

    def close(self, reason: str = "was closed") -> None:
        """Close them all."""
        for connection in self._under_way:
            connection.close(reason)
