"""A context, servers and connections over real sockets, and the proof that nothing of them is left."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import zmq
import zmq.asyncio
from helpers.waiting import eventually

from zsfl.metrics import Counters
from zsfl.settings import WireLimits
from zsfl.wire.connection import Connection
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import Ok, Reply, Request
from zsfl.wire.server import Handler, Server

HOST = "127.0.0.1"


async def echo(_request: Request, parts: Sequence[Buffer]) -> tuple[Reply, Sequence[Buffer]]:
    """Answers with what came."""
    return Ok(), parts


class Wires:
    """Sockets of one test."""

    def __init__(self, limits: WireLimits) -> None:
        self.limits = limits
        self.context = zmq.asyncio.Context()
        self.served = Counters()
        self.asked = Counters()
        self._tasks: dict[Server, asyncio.Task[None]] = {}
        self._connections: list[Connection] = []

    def serve(self, handler: Handler = echo, port: int = 0, limits: WireLimits | None = None) -> Server:
        """A server that runs."""
        server = Server(self.context, HOST, port, handler, limits=limits or self.limits, counters=self.served)
        self._tasks[server] = asyncio.create_task(server.run())
        return server

    async def stop(self, server: Server) -> None:
        """End a server; its port is free again afterwards."""
        task = self._tasks.pop(server)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    def connect(
        self, server: Server | int, limits: WireLimits | None = None, *, last_words: bool = False
    ) -> Connection:
        """A connection to a server, or to a port."""
        port = server if isinstance(server, int) else server.port
        connection = Connection(
            self.context,
            f"tcp://{HOST}:{port}",
            peer="them",
            own_id=os.urandom(4).hex(),
            limits=limits or self.limits,
            counters=self.asked,
            last_words=last_words,
        )
        self._connections.append(connection)
        return connection

    def raw(self, kind: int, server: Server) -> zmq.asyncio.Socket:
        """A bare ZeroMQ socket joined to a server."""
        socket = self.context.socket(kind)
        socket.linger = 0
        socket.connect(f"tcp://{HOST}:{server.port}")
        return socket

    async def close(self) -> None:
        """End everything; a server that failed raises what it failed with."""
        for connection in self._connections:
            connection.close()
        for server in list(self._tasks):
            await self.stop(server)
        self.context.destroy(linger=0)


@asynccontextmanager
async def wires(limits: WireLimits | None = None) -> AsyncIterator[Wires]:
    """Sockets for a test; leaves no task and no descriptor behind."""
    zmq.Frame(bytes(1 << 17), copy=False)  # starts, once and for all, the thread in which pyzmq collects lent buffers
    tasks, descriptors = asyncio.all_tasks(), _descriptors()
    opened = Wires(limits or WireLimits())
    try:
        yield opened
    finally:
        await opened.close()
    await eventually(lambda: asyncio.all_tasks() <= tasks)
    await eventually(lambda: _descriptors() <= descriptors)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
