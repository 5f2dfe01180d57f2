"""Who can be reached is dialled, also by whom it wants to ask: a node behind NAT is told where somebody waits for it.

Its sockets then dial there instead of being dialled. Which end of a connection dials is nothing to ZeroMQ, nor to
CURVE: who asks is still the client of a handshake, and talks to nobody but the machine with that key.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from threading import Lock
from typing import Annotated, NamedTuple, cast

import zmq
from msgspec import Meta

from zsfl.ids import NodeCard, NodeId
from zsfl.wire.fields import Message, NodeIdText

MAX_CALLS = 16
"""Connections that one node wants of another; PER_PEER of `sockets.py` has room for as many as there are."""
MOST_LOST = 1024
"""Nodes behind NAT that are told, with each heartbeat, that they were lost, until they say HELLO again."""


PortNumber = Annotated[int, Meta(ge=1, le=65535)]


class Call(NamedTuple):
    """Whoever sends it waits at its port `at` for the socket of the other that listens at `port`."""

    port: PortNumber
    at: PortNumber


class CallBack(Message, frozen=True, kw_only=True, tag="call-back"):
    """Tells a node behind NAT where the sender waits for it. Nowhere: the sender does not hear it, or not any more."""

    node: NodeIdText
    """Who is meant."""
    calls: Annotated[tuple[Call, ...], Meta(max_length=MAX_CALLS)]


def topic_of(node: NodeId) -> bytes:
    """What only that node listens to."""
    return f"call/{node}/".encode()


class _Way(NamedTuple):
    """What the socket at that port dials."""

    port: int
    endpoint: str


class Line:
    """One connection to a node behind NAT, from the end that waits to be dialled."""

    def __init__(self, board: Switchboard, node: NodeId, port: int) -> None:
        self._board, self._node, self._port = board, node, port
        self._call: Call | None = None

    def open(self, socket: zmq.Socket[bytes]) -> None:
        """Wait for the node there. ZMQError where there is no such address, or no file descriptor left."""
        socket.bind(f"tcp://{self._board.host}:*")
        at = int(cast(bytes, socket.getsockopt(zmq.LAST_ENDPOINT)).rpartition(b":")[2].rstrip(b"\0"))
        self._call = Call(self._port, at)
        self._board.changed(self._node, self._call, there=True)

    def close(self) -> None:
        """Wait no more; may be called again."""
        if self._call is not None:
            self._board.changed(self._node, self._call, there=False)
            self._call = None


class Switchboard:
    """Where one node waits for which others. May be used from any thread."""

    def __init__(self, host: str, behind_nat: bool, tell: Callable[[NodeId], None]) -> None:
        """`tell`, called from any thread, has a node told that what it is called for has changed."""
        self.host = host
        self._behind_nat = behind_nat
        self._tell = tell
        self._calls: OrderedDict[NodeId, set[Call]] = OrderedDict()
        self._lock = Lock()

    def line(self, card: NodeCard, port: int) -> Line | None:
        """The way to a port of a node, if it cannot be dialled. Who is itself behind NAT dials all the same: both may
        be behind the same one.
        """
        return Line(self, card.id, port) if card.behind_nat and not self._behind_nat else None

    def changed(self, node: NodeId, call: Call, *, there: bool) -> None:
        """A line is open, or is not any more."""
        with self._lock:
            if not there and node not in self._calls:
                return
            calls = self._calls.setdefault(node, set())
            (calls.add if there else calls.discard)(call)
            lost = [one for one, left in self._calls.items() if not left]
            for one in lost[: max(0, len(lost) - MOST_LOST)]:
                del self._calls[one]
        self._tell(node)

    def joined(self, card: NodeCard) -> None:
        """It is there, and need not be told that it was lost."""
        with self._lock:
            if not self._calls.get(card.id, True):
                del self._calls[card.id]

    def left(self, node: NodeId) -> None:
        """It said goodbye, and is not told any more."""
        with self._lock:
            self._calls.pop(node, None)

    def call_back(self, node: NodeId) -> CallBack:
        """What to tell a node."""
        with self._lock:
            return CallBack(node=node, calls=tuple(sorted(self._calls.get(node, ()))[:MAX_CALLS]))

    def nodes(self) -> list[NodeId]:
        """Who is to be told again: it may have missed it."""
        with self._lock:
            return list(self._calls)


class Called:
    """What the sockets of a node behind NAT dial, for all who wait for it: decisions, without sockets.

    What several say is dialled once, until none of them says it: nobody ends another one's line by claiming it.
    """

    def __init__(self, own: NodeCard) -> None:
        self._own = own
        self._ways: dict[NodeId, frozenset[_Way]] = {}
        self._said: Counter[_Way] = Counter()
        """By how many."""

    def by(self, card: NodeCard, calls: tuple[Call, ...]) -> Iterator[tuple[int, str, bool]]:
        """Which of its ports are to dial which endpoints, or not any more, now that a peer waits there."""
        ways = (_Way(call.port, card.endpoint(call.at)) for call in calls)
        # To hang up on its own address would end the socket that listens there.
        wanted = frozenset(way for way in ways if way.endpoint != self._own.endpoint(way.port))
        before = self._ways.pop(card.id, frozenset[_Way]())
        if wanted:
            self._ways[card.id] = wanted
        for way in sorted(before ^ wanted):
            there = way in wanted
            self._said[way] += 1 if there else -1
            if self._said[way] == there:
                yield way.port, way.endpoint, there
            if not self._said[way]:
                del self._said[way]
