"""The answering side: a ROUTER that any number of peers ask."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import zmq
import zmq.asyncio

from zsfl.errors import Busy, DeadlineExceeded, LocalProtocolError, RemoteProtocolError
from zsfl.metrics import Counters
from zsfl.settings import WireLimits
from zsfl.wire.connection import FAIR_SHARE
from zsfl.wire.framing import Arrived, Assembler, Buffer, Header, encode, nbytes
from zsfl.wire.messages import Reply, Request
from zsfl.wire.refusals import refusal
from zsfl.wire.sockets import bind, send_now

MAX_CALLERS = 4096
"""Connections remembered at once; the longest silent is forgotten first."""
RETRY_SEND_S = 0.002
"""How often to try again to send to a peer whose queue is full."""

Handler = Callable[[Request, Sequence[Buffer]], Awaitable[tuple[Reply, Sequence[Buffer]]]]


class _Caller:
    """What the server keeps of one connection."""

    def __init__(self, limits: WireLimits) -> None:
        self.assembler = Assembler(limits)
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.outbox: deque[list[Buffer]] = deque()
        self.outbox_bytes = 0


class Server:
    """Answers requests, each in a task of its own, within the deadline the asker set.

    Surplus requests are refused with Busy. A reply that its asker does not take waits in a queue of that asker
    alone; one that overflows is dropped, and the asker's deadline tells it.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        host: str,
        port: int,
        handler: Handler,
        *,
        limits: WireLimits,
        counters: Counters,
    ) -> None:
        self._handler = handler
        self._limits = limits
        self._counters = counters
        self._callers: dict[bytes, _Caller] = {}
        self._running = 0
        self._full: set[bytes] = set()
        self._kick = asyncio.Event()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.port = bind(self._socket, host, port)

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._flush_outboxes())
                await self._read(tasks)
        finally:
            self._socket.close(linger=0)

    async def _read(self, tasks: asyncio.TaskGroup) -> None:
        for turn in itertools.count():
            identity, *frames = await self._socket.recv_multipart(copy=False)
            views = [frame.buffer for frame in frames]
            self._counters.add("bytes_received", sum(view.nbytes for view in views))
            caller = self._caller(identity.bytes)
            try:
                if arrived := caller.assembler.feed(views):
                    self._arrived(tasks, identity.bytes, caller, arrived)
            except RemoteProtocolError as error:
                self._counters.add("protocol_errors")
                if error.message_id is not None:  # somebody of another version, perhaps, who waits for an answer
                    self._reply(identity.bytes, caller, error.message_id, refusal(error), ())
            if turn % FAIR_SHARE == 0:
                await asyncio.sleep(0)

    def _caller(self, identity: bytes) -> _Caller:
        caller = self._callers.pop(identity, None) or _Caller(self._limits)
        self._callers[identity] = caller  # youngest last
        if len(self._callers) > MAX_CALLERS:
            self._callers.pop(next(iter(self._callers)))
        return caller

    def _arrived(self, tasks: asyncio.TaskGroup, identity: bytes, caller: _Caller, arrived: Arrived) -> None:
        match arrived.kind:
            case "cancel":
                if task := caller.tasks.get(arrived.id):
                    task.cancel()
            case "request" if isinstance(arrived.body, Request):
                if self._running >= self._limits.max_inflight:
                    self._counters.add("busy")
                    busy = refusal(Busy(f"{self._running} requests are being served, no room for more", 0.05))
                    self._reply(identity, caller, arrived.id, busy, ())
                    return
                task = tasks.create_task(self._serve(identity, caller, arrived, arrived.body))
                caller.tasks[arrived.id] = task
                self._running += 1
                task.add_done_callback(lambda _: self._served(caller, arrived.id))
            case _:
                raise RemoteProtocolError(f"a {arrived.kind} where a request was due")

    def _served(self, caller: _Caller, request_id: int) -> None:
        self._running -= 1
        caller.tasks.pop(request_id, None)

    async def _serve(self, identity: bytes, caller: _Caller, arrived: Arrived, body: Request) -> None:
        reply: Reply
        parts: Sequence[Buffer] = ()
        try:
            async with asyncio.timeout(arrived.deadline_s or self._limits.default_deadline_s):
                reply, parts = await self._handler(body, arrived.parts)
        except TimeoutError:
            reply = refusal(DeadlineExceeded(f"{type(body).__name__} took longer than its deadline"))
        except Exception as error:  # whatever goes wrong in a handler is the answer, not the end of the node
            self._counters.add("refused")
            reply = refusal(error)
        try:
            self._reply(identity, caller, arrived.id, reply, parts)
        except LocalProtocolError as error:
            self._reply(identity, caller, arrived.id, refusal(error), ())

    def _reply(self, identity: bytes, caller: _Caller, request_id: int, reply: Reply, parts: Sequence[Buffer]) -> None:
        for frames in encode(Header(kind="reply", id=request_id, body=reply), parts, self._limits):
            multipart = [identity, *frames]
            if caller.outbox or not self._sent(multipart):
                self._enqueue(identity, caller, multipart)

    def _enqueue(self, identity: bytes, caller: _Caller, multipart: list[Buffer]) -> None:
        size = sum(nbytes(frame) for frame in multipart)
        if caller.outbox_bytes + size > self._limits.max_outbox_bytes:
            self._counters.add("replies_dropped")
            return
        caller.outbox.append(multipart)
        caller.outbox_bytes += size
        self._full.add(identity)
        self._kick.set()

    def _sent(self, multipart: list[Buffer]) -> bool:
        """Whether ZeroMQ took it, or there is nobody left to send it to; False: the peer's queue is full."""
        size = sum(nbytes(frame) for frame in multipart[1:])
        try:
            if not send_now(self._socket, multipart, copy=size < self._limits.copy_below_bytes):
                return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._counters.add("replies_unroutable")
            return True
        self._counters.add("bytes_sent", size)
        return True

    async def _flush_outboxes(self) -> None:
        while True:
            await self._kick.wait()
            for identity in list(self._full):
                caller = self._callers.get(identity)
                while caller and caller.outbox and self._sent(caller.outbox[0]):
                    caller.outbox_bytes -= sum(nbytes(frame) for frame in caller.outbox.popleft())
                if caller is None or not caller.outbox:
                    self._full.discard(identity)
            if not self._full:
                self._kick.clear()
            with suppress(TimeoutError):
                await asyncio.sleep(RETRY_SEND_S if self._full else 0)
