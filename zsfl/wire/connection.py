"""The asking side: one DEALER per connection."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakSet

import zmq

from zsfl.errors import (
    NO_DESCRIPTORS,
    DeadlineExceeded,
    LocalProtocolError,
    NoPeer,
    RemoteProtocolError,
    Unauthorised,
    ZsflError,
    lacks_descriptors,
)
from zsfl.ids import NodeCard, PublicKey, Role
from zsfl.keys.machine import machine_id
from zsfl.metrics import Counters
from zsfl.settings import WireLimits
from zsfl.wire.batch import Batch, is_small
from zsfl.wire.calling import Line, Switchboard
from zsfl.wire.door import Door
from zsfl.wire.framing import Arrived, Assembler, Buffer, Fault, Header, NoRoom, encode, nbytes
from zsfl.wire.messages import AnyMessage, Refusal, Request
from zsfl.wire.permits import may_send
from zsfl.wire.pump import Pump
from zsfl.wire.refusals import to_error
from zsfl.wire.sockets import DATA_QUEUE, descriptor_of, open_socket, round_trip_s, send_now
from zsfl.wire.watch import HandshakeWatch

_serial = itertools.count()
_Answer = TypeVar("_Answer", bound=AnyMessage)


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply and its parts."""

    body: AnyMessage
    parts: list[Buffer]

    def expect(self, kind: type[_Answer]) -> _Answer:
        """The body as `kind`; RemoteProtocolError when the peer answered something else."""
        if not isinstance(self.body, kind):
            raise RemoteProtocolError(f"expected {kind.__name__}, got {type(self.body).__name__}")
        return self.body


class Connection:
    """Requests to one endpoint of one peer; many may be in flight."""

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        *,
        peer: str,
        own_id: str,
        limits: WireLimits,
        counters: Counters,
        door: Door | None = None,
        key: str = "",
        role: Role | None = None,
        watch: bool = False,
        last_words: bool = False,
        line: Line | None = None,
    ) -> None:
        """With a locked `door` it reaches nobody but the machine with that `key`. Of a peer of that `role` only answers
        are taken that it may give. With `watch` requests fail with Unauthorised as soon as that machine turns this one
        away, and not only by their deadline. With `last_words` an answer also counts if its sender left at once.
        With a `line` it is the peer that dials.
        """
        self.peer = peer
        self._role = role
        self._endpoint = endpoint
        self._limits = limits
        self._counters = counters
        self._pending: dict[int, asyncio.Future[Answer]] = {}
        self._ids = itertools.count(1)
        self._assembler = Assembler(limits, wanted=self._pending.__contains__)
        self._closed: str | None = None
        self._waiting: deque[tuple[list[Buffer], asyncio.Future[Any]]] = deque()
        """Multiparts that found no room, each with the future that makes it pointless, first come first sent."""
        self.met: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done, where it is watched, once the machine with that key is there and lets this one in."""
        self._watch: HandshakeWatch | None = None
        self._line = line
        self._descriptor: int | None = None
        """Of the connection by which the last answer came."""
        self._batch = Batch(limits, self._send_batch)
        self._make = partial(self._made, context, own_id, door, key, watch, last_words)
        self._is_open = False
        with suppress(NoPeer):  # the first request tries again
            self._open()

    def _open(self) -> None:
        """NoPeer where there are no file descriptors left."""
        try:
            self._socket = self._make()
        except zmq.ZMQError as error:
            if not lacks_descriptors(error):
                raise
            raise NoPeer(f"{self.peer} at {self._endpoint} cannot be asked: {NO_DESCRIPTORS}") from error
        self._pump = Pump(self._socket, self._take, self._counters, self._flush)
        self._pump.ended.add_done_callback(self._reader_ended)
        self._is_open = True

    def _made(
        self, context: zmq.Context[Any], own_id: str, door: Door | None, key: str, watch: bool, last_words: bool
    ) -> zmq.Socket[bytes]:
        socket = open_socket(context, zmq.DEALER, self._limits, DATA_QUEUE)
        try:
            # A routing id is never used twice: a ROUTER refuses one whose last connection it has not buried yet. Nor
            # can it be guessed, or somebody else would have it first.
            socket.routing_id = f"{own_id}/{next(_serial)}-{secrets.token_hex(8)}".encode()
            # A request to somebody who is not there yet waits for its deadline instead of in a queue. The price:
            # together with a connection ZeroMQ throws away what came by it and was not read yet.
            socket.setsockopt(zmq.IMMEDIATE, not last_words)
            if door is not None and door.locked:
                self._own_machine = machine_id(PublicKey(door.key))
                door.unlock(socket, key)
                if watch and self._line is None:  # whoever dials a line may say what it likes
                    self._watch = HandshakeWatch(context, socket, self._shaken)
            if self._line is None:
                socket.connect(self._endpoint)
            else:
                self._line.open(socket)
        except zmq.ZMQError:
            if self._watch is not None:
                self._watch.close()
            socket.close(linger=0)
            raise
        return socket

    @property
    def is_open(self) -> bool:
        """Whether it has a socket: not where there are no file descriptors left."""
        return self._is_open

    async def request(self, body: Request, parts: Sequence[Buffer] = (), *, deadline_s: float) -> Answer:
        """The peer's answer within `deadline_s`.

        Raises what the peer refused with; DeadlineExceeded; NoPeer when the connection is closed meanwhile.
        Cancelling the caller cancels the request at the peer.
        """
        if self._closed is not None:
            raise NoPeer(f"{self.peer} at {self._endpoint} {self._closed}")
        if len(self._pending) >= self._limits.max_inflight:
            raise LocalProtocolError(f"over {self._limits.max_inflight} requests in flight to {self.peer}")
        if not self._is_open:
            self._open()
        request_id = next(self._ids)
        header = Header(kind="request", id=request_id, deadline_s=deadline_s, body=body)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._pending[request_id] = future
        late = loop.call_later(deadline_s, self._expire, future, type(body).__name__, deadline_s)
        begun = False
        try:
            if self._closed is None and self._batch.takes(parts):
                self._batch.add(next(encode(header, parts, self._limits)))
            else:
                for frames in encode(header, parts, self._limits):
                    if future.done():  # refused before all of it was sent, or too late
                        break
                    if self._waiting or not self._sent(frames):
                        await self._until_sent(frames, future)
                    begun = True
            begun = True
            answer = await future
        except (DeadlineExceeded, asyncio.CancelledError):
            self._cancel(request_id, begun)
            raise
        finally:
            late.cancel()
            self._pending.pop(request_id, None)
            self._assembler.forget(request_id)
        if isinstance(answer.body, Refusal):
            raise to_error(answer.body, self.peer)
        return answer

    def _expire(self, future: asyncio.Future[Answer], what: str, deadline_s: float) -> None:
        # An answer that is here by now counts, however long this loop was held up.
        self._pump.drain_all()
        if not future.done():
            said = f"no answer from {self.peer} at {self._endpoint} to {what} within {deadline_s:.3g} s"
            future.set_exception(DeadlineExceeded(said))
            future.exception()

    def close(self, reason: str = "was closed") -> None:
        """Fail what is in flight with NoPeer and close the socket; may be called again."""
        if self._closed is not None:
            return
        self._closed = reason
        self._fail(None, NoPeer(f"{self.peer} at {self._endpoint} {reason}"))
        if not self._is_open:
            return
        if self._line is not None:
            self._line.close()
        self._pump.close()
        if self._watch is not None:
            self._watch.close()
        self._socket.close(linger=0)

    def _shaken(self, event: int, _value: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED and not self.met.done():
            self.met.set_result(None)
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            said = f"{self.peer} does not trust this machine, {self._own_machine}: pair them with `zsfl invite` there"
            self._fail(None, Unauthorised(said))
            if not self.met.done():
                self.met.set_exception(Unauthorised(said))
                self.met.exception()  # whoever waits gets it; nobody waiting is no fault

    def _sent(self, frames: list[Buffer]) -> bool:
        if self._closed is not None:
            raise NoPeer(f"{self.peer} at {self._endpoint} {self._closed}")
        size = sum(map(nbytes, frames))
        if not send_now(self._socket, frames, copy=is_small(frames, self._limits.copy_below_bytes)):
            return False
        self._counters.add("bytes_sent", size)
        self._pump.touched()
        return True

    async def _until_sent(self, frames: list[Buffer], future: asyncio.Future[Answer]) -> None:
        """Returns when this is sent, or the request has come to its end."""
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((frames, sent))
        self._pump.wants_room()
        try:
            await asyncio.wait({sent, future}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sent.cancel()

    def _flush(self) -> None:
        """There is room for some of those that wait."""
        while self._waiting and self._closed is None:
            frames, sent = self._waiting[0]
            if not sent.done():
                if not self._sent(frames):
                    self._pump.wants_room()
                    return
                sent.set_result(None)
            self._waiting.popleft()

    def _cancel(self, request_id: int, begun: bool) -> None:
        """Tell the peer as soon as there is room for it."""
        if begun and self._closed is None:
            self._batch.add(next(encode(Header(kind="cancel", id=request_id), (), self._limits)))

    def _send_batch(self, frames: list[Buffer]) -> None:
        """Send small messages as one, as soon as there is room."""
        if self._closed is None and (self._waiting or not self._sent(frames)):
            self._waiting.append((frames, asyncio.get_running_loop().create_future()))
            self._pump.wants_room()

    @property
    def was_heard(self) -> bool:
        """Whether anything ever came by it."""
        return self._descriptor is not None

    def round_trip_s(self) -> float | None:
        """Of a small packet there and back, as the system measures it; None where it does not say."""
        return None if self._descriptor is None else round_trip_s(self._descriptor)

    def _take(self, frames: list[zmq.Frame], _size: int) -> None:
        self._descriptor = descriptor_of(frames[0])
        try:
            for arrived in self._assembler.feed([frame.buffer for frame in frames], self._refuse):
                try:
                    self._answered(arrived)
                except RemoteProtocolError as error:
                    self._refuse(error)
        except RemoteProtocolError as error:
            self._refuse(error)

    def _refuse(self, fault: Fault) -> None:
        if isinstance(fault, NoRoom):
            self._fail(fault.message_id, fault)
            return
        self._counters.add("protocol_errors")
        self._fail(fault.message_id, NoPeer(f"{self.peer} sent what cannot be read: {fault}"))

    def _answered(self, arrived: Arrived) -> None:
        if arrived.kind != "reply" or arrived.body is None:
            raise RemoteProtocolError(f"{self.peer} sent a {arrived.kind} where a reply was due", arrived.id)
        if self._role is not None and not may_send(self._role, type(arrived.body)):
            said = f"{self.peer} is a {self._role} and sent a {type(arrived.body).__name__}"
            raise RemoteProtocolError(f"{said}, which is not for it to say", arrived.id)
        future = self._pending.get(arrived.id)
        if future is not None and not future.done():
            future.set_result(Answer(arrived.body, arrived.parts))

    def _fail(self, request_id: int | None, error: ZsflError) -> None:
        """Fail the request that went wrong; all of them when it cannot be told which."""
        for future in self._pending.values() if request_id is None else [self._pending.get(request_id)]:
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # whoever waits gets it; nobody waiting is no fault

    def _reader_ended(self, ended: asyncio.Future[None]) -> None:
        """Nothing more can be heard of whoever is still asking."""
        error = ended.exception()
        self.close("was closed" if error is None else f"can no longer be read: {error!r}")


class Dialer:
    """Opens the connections of one side of a node, and closes those that are open at the end."""

    def __init__(
        self,
        context: zmq.Context[Any],
        own_id: str,
        *,
        limits: WireLimits,
        counters: Counters,
        door: Door | None = None,
        board: Switchboard | None = None,
    ) -> None:
        """Nodes behind NAT are waited for as the `board` says."""
        self._door = door
        self._board = board
        self._context = context
        self._own_id = own_id
        self._limits = limits
        self._counters = counters
        self._opened: WeakSet[Connection] = WeakSet()

    def connect(self, card: NodeCard, port: int, *, watch: bool = False) -> Connection:
        """A new connection to one of a node's ports; open until the caller, or `close`, closes it."""
        connection = Connection(
            self._context,
            card.endpoint(port),
            peer=card.name,
            own_id=self._own_id,
            limits=self._limits,
            counters=self._counters,
            door=self._door,
            key=card.key,
            role=card.role,
            watch=watch,
            line=None if self._board is None else self._board.line(card, port),
        )
        self._opened.add(connection)
        return connection

    def close(self) -> None:
        """Close whatever is still open."""
        for connection in list(self._opened):
            connection.close()
