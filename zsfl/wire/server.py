"""The answering side: a ROUTER that any number of peers ask."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import zmq

from zsfl.errors import Busy, DeadlineExceeded, RemoteProtocolError, Unauthorised
from zsfl.metrics import Counters
from zsfl.settings import WireLimits
from zsfl.wire.batch import Batch, is_small
from zsfl.wire.door import Door, cut, key_shown
from zsfl.wire.framing import RETRY_AFTER_S, Arrived, Assembler, Buffer, Fault, Header, NoRoom, Room, encode, nbytes
from zsfl.wire.messages import Reply, Request
from zsfl.wire.pump import Pump
from zsfl.wire.refusals import refusal
from zsfl.wire.sockets import DATA_QUEUE, bind, dial, open_socket, send_now
from zsfl.wire.watch import HandshakeWatch

MAX_CALLERS = 4096
"""Connections remembered at once; of those that nothing is under way for, the longest silent is forgotten first."""
RETRY_SEND_S = 0.002
"""How often to try again to send to a peer whose queue is full."""
LAST_REPLY_S = 1.0
"""What replies that were sent last may take to leave when the server ends."""
SWEEP_S = 5.0
"""How often to look for half-finished messages, and unread replies, of peers that gave up or vanished."""
UNREAD_S = 60.0
"""A peer that took none of its replies for so long gets none of them any more: they would fill the room of all."""

Answered = tuple[Reply, Sequence[Buffer]]
Handler = Callable[[Request, Sequence[Buffer]], Answered | Awaitable[Answered]]
"""Gives the reply and its parts, or a future of them, or what has to be awaited and is worth a task."""
Permit = Callable[[Request, str], Callable[[], Awaitable[None]] | None]
"""Gives what raises Unauthorised unless this request may come by this key (empty where none are used); None: it may."""


class _Caller:
    """What the server keeps of one connection."""

    def __init__(self, limits: WireLimits, room: Room, send_batch: Callable[[list[Buffer]], None]) -> None:
        self.key = ""
        """By which it came in; empty where no keys are used."""
        self.frame: zmq.Frame | None = None
        """The last that it sent, by which its connection is known."""
        self.assembler = Assembler(limits, room)
        self.batch = Batch(limits, send_batch)
        self.tasks: dict[int, asyncio.Future[Any]] = {}
        self.due_s: dict[int, float] = {}
        """Of those that are no tasks, when their asker has given up."""
        self.outbox: deque[list[Buffer]] = deque()
        self.read_s = 0.0
        """When it took a reply from the outbox, or the first was put there."""

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self.tasks and not self.outbox and self.assembler.idle

    def end(self) -> None:
        """Let go of whatever is under way."""
        self.assembler.forget_all()
        for task in self.tasks.values():
            task.cancel()


class Server:
    """Answers requests: at once where the handler can, else when it has, within the deadline the asker set.

    Surplus requests are refused with Busy. A reply that its asker does not take waits in a queue of that asker
    alone; one that finds no room among all that wait is dropped, and the asker is told to ask again.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        host: str,
        port: int,
        handler: Handler,
        *,
        limits: WireLimits,
        counters: Counters,
        door: Door | None = None,
        permit: Permit | None = None,
    ) -> None:
        """With a `door` only who it lets in is heard, and may only say what its guard allows, and the `permit`."""
        self._handler = handler
        self._limits = limits
        self._counters = counters
        self._callers: dict[bytes, _Caller] = {}
        self._room, self._running = Room(limits.max_arriving_bytes), 0
        self._outbox_bytes = 0
        """Of all callers together."""
        self._full: set[bytes] = set()
        self._kick = asyncio.Event()
        self._closed = False
        self._tasks: asyncio.TaskGroup
        self._pump: Pump
        self._socket = open_socket(context, zmq.ROUTER, limits, DATA_QUEUE)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._context, self._door, self._permit = context, door, permit
        self.asked_by = ""
        """The key by which that came which the handler is given now; empty where none are used."""
        if door is not None:
            door.lock(self._socket)
        self.port = bind(self._socket, host, port)

    @property
    def has_unsent(self) -> bool:
        """Whether replies wait for their askers to take them."""
        return self._outbox_bytes > 0

    def close(self, linger_s: float = 0.0) -> None:
        """Close the socket of a server that may never have run; what was said last has `linger_s` to leave."""
        self._closed = True
        self._socket.close(linger=int(linger_s * 1000))

    async def run(self) -> None:
        """Serve until cancelled."""
        watch: HandshakeWatch | None = None
        try:
            if self._door is not None and self._door.locked:
                watch = HandshakeWatch(self._context, self._socket, self._door.failed, self._counters)
            async with asyncio.TaskGroup() as self._tasks:
                for minding in (self._flush_outboxes(), self._sweep()):
                    self._tasks.create_task(minding)
                self._pump = Pump(self._socket, self._take, self._counters)
                try:
                    await self._pump.until_ended()
                finally:
                    self._pump.close()
        finally:
            if watch is not None:
                watch.close()
            self.close(LAST_REPLY_S)

    def cut(self) -> None:
        """Tear the connections of those whose keys are trusted no more."""
        door = self._door
        if door is None or door.trust is None:
            return
        for identity, caller in list(self._callers.items()):
            if not door.trust.roles_of(caller.key):
                self._counters.add("connections_cut")
                if caller.frame is not None:
                    cut(caller.frame, self.port)
                self._forget(identity)

    def dial(self, endpoint: str, *, there: bool) -> None:
        """Answer also somebody who waits for this node there, or not any more."""
        dial(self._socket, endpoint, there=there)
        if (pump := getattr(self, "_pump", None)) is not None:
            pump.look()

    def _take(self, frames: list[zmq.Frame], _size: int) -> None:
        caller = self._caller(identity := frames[0].bytes, frames[0])
        failed = partial(self._refuse, identity, caller)
        try:
            for arrived in caller.assembler.feed([frame.buffer for frame in frames[1:]], failed):
                try:
                    self._arrived(identity, caller, arrived)
                except RemoteProtocolError as error:
                    failed(error)
        except RemoteProtocolError as error:
            failed(error)

    def _refuse(self, identity: bytes, caller: _Caller, fault: Fault) -> None:
        """Tell whoever may wait for an answer what is wrong: it may be of another version."""
        self._counters.add("busy" if isinstance(fault, NoRoom) else "protocol_errors")
        if fault.message_id is not None:
            self._send(identity, caller, self._encoded(fault.message_id, refusal(fault)))

    def _caller(self, identity: bytes, frame: zmq.Frame) -> _Caller:
        key = key_shown(frame) if self._door is not None and self._door.locked else ""
        if identity in self._callers and self._callers[identity].key != key:
            self._forget(identity)  # what somebody began under this name before, nobody else goes on with
        caller = self._callers.pop(identity, None)
        if caller is None:
            while len(self._callers) >= MAX_CALLERS:
                self._forget(
                    next((name for name, other in self._callers.items() if other.idle), next(iter(self._callers)))
                )
            caller = _Caller(self._limits, self._room, partial(self._send_batch, identity, key))
            caller.key = key
        caller.frame = frame
        self._callers[identity] = caller  # youngest last
        return caller

    def _forget(self, identity: bytes) -> None:
        caller = self._callers.pop(identity)
        self._empty(caller)
        caller.end()

    def _empty(self, caller: _Caller) -> None:
        self._outbox_bytes -= sum(map(_size, caller.outbox))
        caller.outbox.clear()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            now_s = asyncio.get_running_loop().time()
            for caller in list(self._callers.values()):
                caller.assembler.forget_overdue()
                if caller.outbox and now_s >= caller.read_s + UNREAD_S:
                    self._counters.add("replies_dropped", len(caller.outbox))
                    self._empty(caller)
                for request_id in [request_id for request_id, due_s in caller.due_s.items() if due_s < now_s]:
                    if not (answer := caller.tasks[request_id]).done():
                        answer.set_exception(DeadlineExceeded("it took longer than its deadline"))

    def _arrived(self, identity: bytes, caller: _Caller, arrived: Arrived) -> None:
        match arrived.kind:
            case "cancel":
                if task := caller.tasks.get(arrived.id):
                    task.cancel()
            case "request" if isinstance(arrived.body, Request):
                self._asked(identity, caller, arrived, arrived.body)
            case _:
                raise RemoteProtocolError(f"a {arrived.kind} where a request was due", arrived.id)

    def _asked(self, identity: bytes, caller: _Caller, arrived: Arrived, body: Request) -> None:
        """Answer at once where the handler does, else in a task."""
        if self._running >= self._limits.max_inflight:
            self._counters.add("busy")
            busy = refusal(Busy(f"{self._running} requests are being served, no room for more", 0.05))
            self._send(identity, caller, self._encoded(arrived.id, busy))
            return
        if arrived.id in caller.tasks:
            raise RemoteProtocolError(f"request {arrived.id} is being served already", arrived.id)
        if self._door is not None:
            try:
                self._door.guard.check(identity, caller.key, body)
            except Unauthorised as error:
                self._turned_away(caller.key, body, error)
                self._send(identity, caller, self._encoded(arrived.id, refusal(error)))
                return
        try:
            answer = self._answer(caller.key, body, arrived.parts)
            if isinstance(answer, asyncio.Future):
                self._await(identity, caller, arrived, answer)
                return
            if not isinstance(answer, tuple):
                task = self._tasks.create_task(self._serve(identity, caller, arrived, type(body).__name__, answer))
                caller.tasks[arrived.id] = task
                self._running += 1
                task.add_done_callback(lambda _: self._served(caller, arrived.id))
                if asyncio.iscoroutine(answer):
                    task.add_done_callback(lambda _: answer.close())  # of a task that was cancelled before it began
                return
            frames = self._encoded(arrived.id, *answer)
        except Exception as error:  # whatever goes wrong in a handler is the answer, not the end of the node
            self._counters.add("refused")
            frames = self._encoded(arrived.id, refusal(error))
        self._reply(identity, caller, arrived.id, frames)

    def _turned_away(self, key: str, body: Request, error: Unauthorised) -> None:
        self._counters.add("unauthorised")
        if self._door is not None:
            self._door.tell_once((key, type(body)), f"a request was turned away: {error}")

    def _answer(self, key: str, body: Request, parts: Sequence[Buffer]) -> Answered | Awaitable[Answered]:
        if self._permit is not None and (ask := self._permit(body, key)) is not None:
            return self._answer_once(ask, key, body, parts)
        self.asked_by = key
        return self._handler(body, parts)

    async def _answer_once(
        self, permitted: Callable[[], Awaitable[None]], key: str, body: Request, parts: Sequence[Buffer]
    ) -> Answered:
        try:
            await permitted()
        except Unauthorised as error:
            self._turned_away(key, body, error)
            raise
        self.asked_by = key
        answer = self._handler(body, parts)
        return answer if isinstance(answer, tuple) else await answer

    def _await(self, identity: bytes, caller: _Caller, arrived: Arrived, answer: asyncio.Future[Answered]) -> None:
        """Reply when the answer is there: for that alone no task is needed."""
        request_id = arrived.id
        caller.tasks[request_id] = answer
        caller.due_s[request_id] = asyncio.get_running_loop().time() + self._limits.deadline_of(arrived.deadline_s)
        self._running += 1

        def answered(_: asyncio.Future[Answered]) -> None:
            self._served(caller, request_id)
            if answer.cancelled() or self._closed:
                return
            try:
                frames = self._encoded(request_id, *answer.result())
            except Exception as error:  # whatever goes wrong in a handler is the answer, not the end of the node
                self._counters.add("refused")
                frames = self._encoded(request_id, refusal(error))
            self._reply(identity, caller, request_id, frames)

        answer.add_done_callback(answered)

    def _served(self, caller: _Caller, request_id: int) -> None:
        self._running -= 1
        caller.tasks.pop(request_id, None)
        caller.due_s.pop(request_id, None)

    async def _serve(
        self, identity: bytes, caller: _Caller, arrived: Arrived, what: str, answer: Awaitable[Answered]
    ) -> None:
        try:
            async with asyncio.timeout(self._limits.deadline_of(arrived.deadline_s)):
                reply, parts = await answer
            frames = self._encoded(arrived.id, reply, parts)
        except TimeoutError:
            frames = self._encoded(arrived.id, refusal(DeadlineExceeded(f"{what} took longer than its deadline")))
        except Exception as error:  # whatever goes wrong in a handler is the answer, not the end of the node
            self._counters.add("refused")
            frames = self._encoded(arrived.id, refusal(error))
        self._reply(identity, caller, arrived.id, frames)

    def _reply(self, identity: bytes, caller: _Caller, request_id: int, frames: list[list[Buffer]]) -> None:
        if not self._send(identity, caller, frames):
            full = Busy(f"{self._outbox_bytes} bytes of replies wait to be read, no room for another", RETRY_AFTER_S)
            self._send(identity, caller, self._encoded(request_id, refusal(full)))

    def _encoded(self, request_id: int, reply: Reply, parts: Sequence[Buffer] = ()) -> list[list[Buffer]]:
        return list(encode(Header(kind="reply", id=request_id, body=reply), parts, self._limits))

    def _send(self, identity: bytes, caller: _Caller, frames: list[list[Buffer]]) -> bool:
        """Hand a reply to ZeroMQ, or what it does not take to the caller's outbox; whether there was room for it."""
        if self._callers.get(identity) is not caller:  # forgotten: somebody else may be called so by now
            return True
        if len(frames) == 1 and not caller.outbox and caller.batch.takes(frames[0]):
            size = sum(map(nbytes, frames[0]))
            if self._outbox_bytes + size <= self._limits.max_outbox_bytes:
                self._outbox_bytes += size  # so that there is room should ZeroMQ have none
                caller.batch.add(frames[0])
                return True
        return self._send_now(identity, caller, frames)

    def _send_now(self, identity: bytes, caller: _Caller, frames: list[list[Buffer]]) -> bool:
        rest = deque[list[Buffer]]([identity, *multipart] for multipart in frames)
        while rest and not caller.outbox and self._sent(rest[0]):
            rest.popleft()
        size = sum(_size(multipart) for multipart in rest)
        if self._outbox_bytes + size > self._limits.max_outbox_bytes:
            self._counters.add("replies_dropped")
            return False
        if rest:
            if not caller.outbox:
                caller.read_s = asyncio.get_running_loop().time()
            caller.outbox.extend(rest)
            self._outbox_bytes += size
            self._full.add(identity)
            self._kick.set()
        return True

    def _send_batch(self, identity: bytes, key: str, frames: list[Buffer]) -> None:
        self._outbox_bytes -= sum(map(nbytes, frames))
        caller = self._callers.get(identity)
        if caller is not None and caller.key == key and not self._closed:
            self._send_now(identity, caller, [frames])

    def _sent(self, multipart: list[Buffer]) -> bool:
        """Whether ZeroMQ took it, or there is nobody left to send it to; False: the peer's queue is full."""
        size = _size(multipart)
        try:
            if not send_now(self._socket, multipart, copy=is_small(multipart, self._limits.copy_below_bytes)):
                return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._counters.add("replies_unroutable")
            return True
        finally:
            self._pump.touched()
        self._counters.add("bytes_sent", size)
        return True

    async def _flush_outboxes(self) -> None:
        while True:
            await self._kick.wait()
            for identity in list(self._full):
                caller = self._callers.get(identity)
                while caller and caller.outbox and self._sent(caller.outbox[0]):
                    caller.read_s = asyncio.get_running_loop().time()
                    self._outbox_bytes -= _size(caller.outbox.popleft())
                if caller is None or not caller.outbox:
                    self._full.discard(identity)
            if not self._full:
                self._kick.clear()
            await asyncio.sleep(RETRY_SEND_S if self._full else 0)


def _size(multipart: list[Buffer]) -> int:
    """Bytes of one multipart but for the identity before it."""
    return sum(nbytes(frame) for frame in multipart[1:])
