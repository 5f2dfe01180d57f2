"""Broadcasts: a PUB socket for what a node says, a SUB socket for what its peers say."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import zmq

from zsfl.errors import (
    LocalProtocolError,
    ProtocolError,
    Rejected,
    RemoteProtocolError,
    Unavailable,
    lacks_descriptors,
)
from zsfl.ids import Role
from zsfl.keys.trusted import EVERY_ROLE
from zsfl.metrics import Counters
from zsfl.settings import WireLimits
from zsfl.wire.calling import Line
from zsfl.wire.door import Door
from zsfl.wire.fields import MAX_SETTLED
from zsfl.wire.framing import Assembler, Buffer, Header, encode, nbytes
from zsfl.wire.messages import Announcement, AnyMessage, Broadcast
from zsfl.wire.permits import may_say
from zsfl.wire.pump import Pump
from zsfl.wire.sockets import bind, dial, open_socket, send_now
from zsfl.wire.watch import HandshakeWatch

MAX_HEARD_BYTES = 1024
"""Subscribers say what they subscribe to, and before that their keys, and nothing else."""
BROADCAST_QUEUE = 512
"""Multiparts, of up to one piece each, that ZeroMQ holds for one slow subscriber before it drops what follows;
subscribers ask for what they missed."""

SWEEP_S = 5.0
"""How often to look whether a broadcast that has begun to arrive still does."""
OPEN_AGAIN_S = 0.5
"""After which pause to try again to open a socket."""
BIND_AGAIN_S = 0.05
"""After which pause to try again to bind to a port that was let go of."""

Heard = Callable[[Broadcast, list[Buffer]], None]


class Publisher:
    """Says each thing once, to all who listen. Nobody listening, or too slowly, costs nothing."""

    def __init__(
        self,
        context: zmq.Context[Any],
        host: str,
        *,
        limits: WireLimits,
        counters: Counters,
        note: Callable[[str], None] = lambda _: None,
        door: Door | None = None,
        hearers: frozenset[Role] = EVERY_ROLE,
    ) -> None:
        """`note` is told, once for each kind of broadcast, that one was over a limit. With a `door` only who it lets
        in, as one of the `hearers`, hears anything.
        """
        # No longer frames: who reads slowly keeps a whole queue of them in the publisher's memory.
        self._limits = replace(limits, frame_bytes=min(limits.frame_bytes, limits.piece_bytes))
        self._counters = counters
        self._note = note
        self._noted: set[type[Broadcast]] = set()
        self._ids = itertools.count(1)
        self._socket = open_socket(context, zmq.PUB, limits, BROADCAST_QUEUE)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_HEARD_BYTES)
        self._watch: HandshakeWatch | None = None
        if door is not None and door.locked:
            door.lock(self._socket, hearers)
            self._watch = HandshakeWatch(context, self._socket, door.failed, counters)
        self._host = host
        self._dialled: set[str] = set()
        self.port = bind(self._socket, host, 0)

    def publish(self, topic: bytes, body: Broadcast, parts: Sequence[Buffer] = ()) -> None:
        """Hand a broadcast to ZeroMQ; never waits. One that is over a limit is dropped, counted and noted."""
        header = Header(kind="publish", id=next(self._ids), body=body)
        try:
            self._send(topic, encode(header, parts, self._limits))
        except LocalProtocolError as error:
            self._counters.add("broadcasts_dropped")
            if type(body) not in self._noted:
                self._noted.add(type(body))
                self._note(f"its {type(body).__name__} was not sent: {error}")

    def _send(self, topic: bytes, multiparts: Iterable[list[Buffer]]) -> None:
        for frames in multiparts:
            size = sum(nbytes(frame) for frame in frames)
            send_now(self._socket, [topic, *frames], copy=size < self._limits.copy_below_bytes)
            self._counters.add("bytes_sent", size)

    def cut(self) -> None:
        """Tear all connections, as there is no telling them apart: who is let in connects again at once."""
        if not self._socket.closed:
            with suppress(zmq.ZMQError):  # it may be unbound for the moment already
                self._socket.unbind(f"tcp://{self._host}:{self.port}")
            self._bind_again()
            for endpoint in self._dialled:
                for there in (False, True):
                    dial(self._socket, endpoint, there=there)

    def dial(self, endpoint: str, *, there: bool) -> None:
        """Say it also to somebody who waits for this node there, or not any more."""
        (self._dialled.add if there else self._dialled.discard)(endpoint)
        dial(self._socket, endpoint, there=there)

    def _bind_again(self) -> None:
        if self._socket.closed:
            return
        try:
            self._socket.bind(f"tcp://{self._host}:{self.port}")
        except zmq.ZMQError:  # somebody has taken the port meanwhile; nobody is heard from here until it is free
            asyncio.get_running_loop().call_later(BIND_AGAIN_S, self._bind_again)

    def close(self, linger_s: float = 0.0) -> None:
        """Close the socket, giving what was said last `linger_s` to leave."""
        if self._watch is not None:
            self._watch.close()
        self._socket.close(linger=int(linger_s * 1000))


class Subscriber:
    """Listens to one publisher on some topics."""

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        topics: Sequence[bytes],
        heard: Heard,
        *,
        limits: WireLimits,
        counters: Counters,
        door: Door | None = None,
        key: str = "",
        role: Role | None = None,
        line: Line | None = None,
    ) -> None:
        """`door`, `key`, `line` are as in Connection; a publisher of that `role` is heard only in what it may say."""
        self._heard = heard
        self._role = role
        self._counters = counters
        # In order, so that a broadcast that lost a chunk in a full queue is forgotten when the next one begins.
        self._assembler = Assembler(limits, in_order=True)
        self._sweep: asyncio.TimerHandle | None = None
        self._make = partial(_listening, context, endpoint, topics, limits, door, key, line)
        self._socket: zmq.Socket[bytes] | None = None
        self._line = line

    def arriving(self) -> list[AnyMessage]:
        """Bodies of the broadcasts whose parts are still on their way."""
        return self._assembler.arriving()

    async def run(self) -> None:
        """Listen until cancelled; where there are no file descriptors left, once there are."""
        while self._socket is None:
            try:
                self._socket = self._make()
            except zmq.ZMQError as error:
                if not lacks_descriptors(error):
                    raise
                await asyncio.sleep(OPEN_AGAIN_S)
        pump = Pump(self._socket, self._take, self._counters)
        try:
            await pump.until_ended()
        finally:
            pump.close()
            self.close()

    def close(self) -> None:
        """Close the socket of a subscriber that may never have run."""
        if self._sweep is not None:
            self._sweep.cancel()
        self._assembler.forget_all()
        if self._line is not None:
            self._line.close()
        if self._socket is not None:
            self._socket.close(linger=0)

    def _take(self, frames: list[zmq.Frame], _size: int) -> None:
        try:
            for arrived in self._assembler.feed([frame.buffer for frame in frames[1:]]):
                if arrived.kind != "publish" or not isinstance(arrived.body, Broadcast):
                    raise RemoteProtocolError(f"a {arrived.kind} where a broadcast was due")
                if self._role is not None and not may_say(self._role, arrived.body):
                    self._counters.add("unauthorised")
                    continue
                self._heard(arrived.body, arrived.parts)
        except (ProtocolError, Unavailable, Rejected):
            self._counters.add("protocol_errors")
        if self._sweep is None:
            self._sweep_later()

    def _sweep_later(self) -> None:
        """What is broken off is not kept for good: nothing else may come to take its place."""
        idle = self._assembler.idle or self._socket is None or self._socket.closed
        self._sweep = None if idle else asyncio.get_running_loop().call_later(SWEEP_S, self._swept)

    def _swept(self) -> None:
        self._assembler.forget_stalled()
        self._sweep_later()


def _listening(
    context: zmq.Context[Any],
    endpoint: str,
    topics: Sequence[bytes],
    limits: WireLimits,
    door: Door | None,
    key: str,
    line: Line | None,
) -> zmq.Socket[bytes]:
    socket = open_socket(context, zmq.SUB, limits, BROADCAST_QUEUE)
    if door is not None:
        door.unlock(socket, key)
    for topic in topics:
        socket.subscribe(topic)
    if line is None:
        socket.connect(endpoint)
        return socket
    try:
        line.open(socket)
    except zmq.ZMQError:
        socket.close(linger=0)
        raise
    return socket


def in_pieces(announcement: Announcement) -> Iterator[Announcement]:
    """The announcement as it is, or several of the same state where its cids are too many for one."""
    counted, dropped = announcement.counted, announcement.dropped
    for first in range(0, max(len(counted), len(dropped), 1), MAX_SETTLED):
        piece = slice(first, first + MAX_SETTLED)
        yield msgspec.structs.replace(announcement, counted=counted[piece], dropped=dropped[piece])
