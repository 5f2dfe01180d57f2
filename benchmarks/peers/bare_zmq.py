"""Bare zmq.asyncio: DEALER to ROUTER, no schema, no bounds, no copies. What every layer above ZeroMQ is measured by."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, cast

import zmq
import zmq.asyncio

from .program import ASK_S, HOST, Buffer, Listening, serve_until_eof


async def serve(listening: Listening) -> None:
    """Send every message back to whom it came from."""
    socket = cast(Any, zmq.asyncio.Context.instance().socket(zmq.ROUTER))
    listening(socket.bind_to_random_port(f"tcp://{HOST}"))
    while True:
        await socket.send_multipart(await socket.recv_multipart(copy=False), copy=False)


class BareZmq:
    """A DEALER; answers find their questions by a number in the first frame."""

    def __init__(self, port: int) -> None:
        self._socket = cast(Any, zmq.asyncio.Context.instance().socket(zmq.DEALER))
        self._socket.linger = 0
        self._socket.connect(f"tcp://{HOST}:{port}")
        self._ids = itertools.count()
        self._waiting: dict[bytes, asyncio.Future[Buffer]] = {}
        self._reader = asyncio.create_task(self._read())

    async def ask(self, payload: bytes) -> Buffer:
        """The payload, as it came back."""
        name = b"%d" % next(self._ids)
        future = self._waiting[name] = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(ASK_S):
            await self._socket.send_multipart([name, payload], copy=False)
            return await future

    async def _read(self) -> None:
        while True:
            name, payload = await self._socket.recv_multipart(copy=False)
            self._waiting.pop(name.bytes).set_result(payload.buffer)

    async def close(self) -> None:
        """Close the socket."""
        self._reader.cancel()
        self._socket.close()


async def connect(port: int) -> BareZmq:
    """An asker joined to a server."""
    return BareZmq(port)


if __name__ == "__main__":
    serve_until_eof(serve)
