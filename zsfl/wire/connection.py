"""The asking side: one DEALER per connection."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import zmq
import zmq.asyncio

from zsfl.errors import DeadlineExceeded, LocalProtocolError, NoPeer, RemoteProtocolError, ZsflError
from zsfl.metrics import Counters
from zsfl.settings import WireLimits
from zsfl.wire.framing import Arrived, Assembler, Buffer, Header, NoRoom, encode, nbytes
from zsfl.wire.messages import AnyMessage, Refusal, Request
from zsfl.wire.refusals import to_error
from zsfl.wire.sockets import DATA_QUEUE, open_socket, send, send_soon

FAIR_SHARE = 64
"""Messages handled before other tasks get a turn: a hot recv loop on a ready socket never yields by itself."""
FAIR_BYTES = 1 << 18
"""A message of so many is a turn of its own: copying 64 chunks of a tensor would take the loop for too long."""

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
        context: zmq.asyncio.Context,
        endpoint: str,
        *,
        peer: str,
        own_id: str,
        limits: WireLimits,
        counters: Counters,
    ) -> None:
        self.peer = peer
        self._endpoint = endpoint
        self._limits = limits
        self._counters = counters
        self._pending: dict[int, asyncio.Future[Answer]] = {}
        self._ids = itertools.count(1)
        self._assembler = Assembler(limits, wanted=self._pending.__contains__)
        self._closed: str | None = None
        self._socket = open_socket(context, zmq.DEALER, limits, DATA_QUEUE)
        # A routing id is never used twice: a ROUTER refuses one whose last connection it has not buried yet.
        self._socket.routing_id = f"{own_id}/{next(_serial)}".encode()
        # A request to somebody who is not there yet waits for its deadline instead of in a queue.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.connect(endpoint)
        self._reader = asyncio.create_task(self._read(), name=f"read {endpoint}")
        self._reader.add_done_callback(self._reader_ended)

    async def request(self, body: Request, parts: Sequence[Buffer] = (), *, deadline_s: float) -> Answer:
        """The peer's answer within `deadline_s`.

        Raises what the peer refused with; DeadlineExceeded; NoPeer when the connection is closed meanwhile.
        Cancelling the caller cancels the request at the peer.
        """
        if self._closed is not None:
            raise NoPeer(f"{self.peer} at {self._endpoint} {self._closed}")
        if len(self._pending) >= self._limits.max_inflight:
            raise LocalProtocolError(f"over {self._limits.max_inflight} requests in flight to {self.peer}")
        request_id = next(self._ids)
        header = Header(kind="request", id=request_id, deadline_s=deadline_s, body=body)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pending[request_id] = future
        begun = False
        try:
            async with asyncio.timeout(deadline_s):
                for frames in encode(header, parts, self._limits):
                    if future.done():  # refused before all of it was sent
                        break
                    await self._send(frames)
                    begun = True
                answer = await future
        except TimeoutError:
            self._cancel(request_id, begun)
            raise DeadlineExceeded(
                f"no answer from {self.peer} at {self._endpoint} to {type(body).__name__} within {deadline_s:.3g} s"
            ) from None
        except asyncio.CancelledError:
            self._cancel(request_id, begun)
            raise
        finally:
            self._pending.pop(request_id, None)
            self._assembler.forget(request_id)
        if isinstance(answer.body, Refusal):
            raise to_error(answer.body, self.peer)
        return answer

    def close(self, reason: str = "was closed") -> None:
        """Fail what is in flight with NoPeer and close the socket; may be called again."""
        if self._closed is not None:
            return
        self._closed = reason
        self._reader.cancel()
        self._fail(None, NoPeer(f"{self.peer} at {self._endpoint} {reason}"))
        self._socket.close(linger=0)

    async def _send(self, frames: list[Buffer]) -> None:
        size = sum(nbytes(frame) for frame in frames)
        if self._closed is not None:
            raise NoPeer(f"{self.peer} at {self._endpoint} {self._closed}")
        try:
            await send(self._socket, frames, copy=size < self._limits.copy_below_bytes)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed is None or (task is not None and task.cancelling()):
                raise
            # Closing a socket cancels what waits to be sent on it.
            raise NoPeer(f"{self.peer} at {self._endpoint} {self._closed}") from None
        self._counters.add("bytes_sent", size)

    def _cancel(self, request_id: int, begun: bool) -> None:
        if begun and self._closed is None:
            send_soon(self._socket, next(encode(Header(kind="cancel", id=request_id), (), self._limits)))

    async def _read(self) -> None:
        for turn in itertools.count():
            frames = await self._socket.recv_multipart(copy=False)
            views = [frame.buffer for frame in frames]
            size = sum(view.nbytes for view in views)
            self._counters.add("bytes_received", size)
            try:
                if arrived := self._assembler.feed(views):
                    self._answered(arrived)
            except RemoteProtocolError as error:
                self._counters.add("protocol_errors")
                self._fail(error.message_id, NoPeer(f"{self.peer} sent what cannot be read: {error}"))
            except NoRoom as error:
                self._fail(error.message_id, error)
            if turn % FAIR_SHARE == 0 or size >= FAIR_BYTES:
                await asyncio.sleep(0)

    def _answered(self, arrived: Arrived) -> None:
        if arrived.kind != "reply" or arrived.body is None:
            raise RemoteProtocolError(f"{self.peer} sent a {arrived.kind} where a reply was due", arrived.id)
        future = self._pending.get(arrived.id)
        if future is not None and not future.done():
            future.set_result(Answer(arrived.body, arrived.parts))

    def _fail(self, request_id: int | None, error: ZsflError) -> None:
        """Fail the request that went wrong; all of them when it cannot be told which."""
        for future in self._pending.values() if request_id is None else [self._pending.get(request_id)]:
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # whoever waits gets it; nobody waiting is no fault

    def _reader_ended(self, reader: asyncio.Task[None]) -> None:
        """Nothing more can be heard of whoever is still asking."""
        error = None if reader.cancelled() else reader.exception()
        self.close("was closed" if error is None else f"can no longer be read: {error!r}")
