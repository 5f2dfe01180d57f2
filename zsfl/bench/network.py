"""Round trips between two machines through zsfl's own request and reply.

The server answers HELLO as a node would, and INFER by sending the tensor back; it runs no model and joins no run.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import zmq

from zsfl.errors import ConfigError, DeadlineExceeded, NoPeer, RemoteProtocolError, ZsflError
from zsfl.ids import PROTOCOL, Address, NodeCard, Role, Version
from zsfl.keys.nodes import new_node_id
from zsfl.metrics import Counters
from zsfl.settings import NodeSettings, WireLimits
from zsfl.tensors.spec import TensorSpec
from zsfl.wire.connection import Connection
from zsfl.wire.door import door_for
from zsfl.wire.fields import Load
from zsfl.wire.framing import Buffer, nbytes
from zsfl.wire.gatekeeper import kept
from zsfl.wire.greeting import mechanism_at
from zsfl.wire.guard import Guard
from zsfl.wire.messages import Hello, Infer, Output, Request, Welcome
from zsfl.wire.reaching import connected
from zsfl.wire.server import Answered, Server

SIZES = (1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 24)
"""Bytes of the tensors that go there and back."""
OPEN = 8
"""Requests on their way at once where throughput is measured; fewer where together they are over `OPEN_BYTES`."""
OPEN_BYTES = 1 << 24
HELLO_S = 5.0
"""How long the other machine may take to say that it is there."""
FACT = "zsfl bench"
"""The fact in a HELLO that tells a bench server that it is meant."""
_IDLE = Load(slots=OPEN, busy=0, service_s=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTrips:
    """What was measured at one size."""

    size_bytes: int
    median_s: float
    """Of a round trip with nothing else on its way."""
    slow_s: float
    """19 of 20 round trips were faster, as far as there were so many."""
    open: int
    """Requests on their way at once while `answers_per_s` was measured."""
    answers_per_s: float


class _Anybody(Guard):
    """Whoever is let in may have tensors sent back: nothing else is to be had here."""

    def check(self, routing_id: bytes, key: str, body: Request) -> None:
        """No objection."""


async def serve(settings: NodeSettings, ready: Callable[[int], None]) -> int:
    """Answer until SIGINT or SIGTERM; how many tensors were sent back. `ready` is told the port."""
    host, port = settings.host, settings.port
    door = door_for(settings, "bench", lambda message: print(message, flush=True))
    door.guard = _Anybody("bench")
    stop = asyncio.Event()
    counters = Counters()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    context, stack = zmq.Context(settings.io_threads), ExitStack()
    try:
        stack.enter_context(kept(context, door))
        answers = _answers(host, counters)
        server = Server(context, host, port, answers, limits=WireLimits(), counters=counters, door=door)
        ready(server.port)
        running = asyncio.create_task(server.run())
        waiting = asyncio.create_task(stop.wait())
        await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
    finally:
        stack.close()
        context.destroy(linger=0)
    return int(counters.snapshot().get("returned", 0))


def _answers(host: str, counters: Counters) -> Callable[[Request, Sequence[Buffer]], Answered]:
    def answer(request: Request, parts: Sequence[Buffer]) -> Answered:
        match request:
            case Hello():
                if request.protocol != PROTOCOL:
                    raise ConfigError(
                        f"it speaks protocol {PROTOCOL} and you {request.protocol}: use one version of zsfl"
                    )
                if FACT not in request.facts:
                    raise ConfigError("this is `zsfl bench --serve`, not a node of a run: name another --peer")
                return Welcome(card=_card(host), codecs=(), peers=()), ()
            case Infer():
                counters.add("returned")
                return Output(output=request.input, load=_IDLE), parts
            case _:
                raise RemoteProtocolError(f"a bench server does not answer {type(request).__name__}")

    return answer


async def measure(
    address: str,
    *,
    seconds: float,
    request_s: float,
    settings: NodeSettings | None = None,
    sizes: Sequence[int] = SIZES,
) -> AsyncIterator[RoundTrips]:
    """Measure against the bench server at `host:port`, each size for about `seconds`, as they are given.

    NoPeer when no bench server answers there; DeadlineExceeded when one request takes longer than `request_s`.
    """
    if await _nobody_listens(address):
        raise _nobody(address)
    async with connected(Address(address), "the bench server", settings or NodeSettings()) as connection:
        await _greet(connection, address)
        for size in sizes:
            yield await _measure_size(connection, size, seconds, request_s)


async def _nobody_listens(address: str) -> bool:
    with suppress(TimeoutError):
        return await mechanism_at(Address(address), HELLO_S) is None
    return True


def _nobody(address: str) -> NoPeer:
    host, _, port = address.rpartition(":")
    return NoPeer(
        f"nobody answers at {address} within {HELLO_S:g} s: run `zsfl bench --serve --host {host} --port {port}` "
        "there, and let the firewall pass TCP to that port"
    )


async def _greet(connection: Connection, address: str) -> None:
    hello = Hello(protocol=PROTOCOL, facts={FACT: "1"}, card=_card("127.0.0.1"), codecs=())
    try:
        (await connection.request(hello, deadline_s=HELLO_S)).expect(Welcome)
    except DeadlineExceeded:
        raise _nobody(address) from None
    except ZsflError as error:
        raise NoPeer(f"at {address} is no bench server; run `zsfl bench --serve` there. It says: {error}") from error


async def _measure_size(connection: Connection, size: int, seconds: float, request_s: float) -> RoundTrips:
    payload = os.urandom(size)
    request = Infer(shard=0, version=Version(0), input=TensorSpec("bench", "uint8", (size,), "raw", size))

    async def answered() -> Buffer:
        answer = await connection.request(request, [payload], deadline_s=request_s)
        answer.expect(Output)
        if len(answer.parts) != 1 or nbytes(answer.parts[0]) != size:
            raise RemoteProtocolError(f"the bench server sent back other than the {size} bytes it was sent")
        return answer.parts[0]

    async def ask() -> float:
        begun_s = time.perf_counter()
        await answered()
        return time.perf_counter() - begun_s

    # The first use of memory and of the connection is not what is asked about.
    if bytes(await answered()) != payload:
        raise RemoteProtocolError(f"the bench server sent back other bytes than the {size} it was sent")
    times = await _keep_asking(ask, seconds / 2)
    questions = max(1, min(OPEN, OPEN_BYTES // size))
    begun_s = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as tasks:
            asking = [tasks.create_task(_keep_asking(ask, seconds / 2)) for _ in range(questions)]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    passed_s = time.perf_counter() - begun_s
    return RoundTrips(
        size_bytes=size,
        median_s=statistics.median(times),
        slow_s=sorted(times)[math.ceil(0.95 * len(times)) - 1],
        open=questions,
        answers_per_s=sum(len(one.result()) for one in asking) / passed_s,
    )


async def _keep_asking(ask: Callable[[], Awaitable[float]], seconds: float) -> list[float]:
    """One question after the other, at least one; how long each took, in seconds."""
    until_s = time.perf_counter() + seconds
    times: list[float] = []
    while not times or time.perf_counter() < until_s:
        times.append(await ask())
    return times


def _card(host: str) -> NodeCard:
    return NodeCard(id=new_node_id(), name="bench", role=Role.OBSERVER, host=host, control_port=0)
