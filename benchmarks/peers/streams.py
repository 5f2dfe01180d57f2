"""asyncio's own streams: eight bytes of length, then the payload; answers come in the order of the questions."""

from __future__ import annotations

import asyncio
from collections import deque

from .program import ASK_S, HOST, Buffer, Listening, serve_until_eof

LIMIT = 1 << 20
"""What a stream reads ahead; asyncio's 64 KiB would have it stop and go on for every large payload."""


async def _receive(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(8)))


async def _send(writer: asyncio.StreamWriter, payload: bytes) -> None:
    writer.write(len(payload).to_bytes(8))
    writer.write(payload)
    await writer.drain()


async def serve(listening: Listening) -> None:
    """Send every payload back."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await _send(writer, await _receive(reader))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(echo, HOST, 0, limit=LIMIT)
    listening(server.sockets[0].getsockname()[1])
    await server.serve_forever()


class Streams:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._waiting: deque[asyncio.Future[Buffer]] = deque()
        self._reader = asyncio.create_task(self._read(reader))

    async def ask(self, payload: bytes) -> Buffer:
        """The payload, as it came back."""
        future: asyncio.Future[Buffer] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        async with asyncio.timeout(ASK_S):
            await _send(self._writer, payload)
            return await future

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while True:
            payload = await _receive(reader)
            self._waiting.popleft().set_result(payload)

    async def close(self) -> None:
        """Close the connection."""
        self._reader.cancel()
        self._writer.close()


async def connect(port: int) -> Streams:
    """An asker joined to a server."""
    return Streams(*await asyncio.open_connection(HOST, port, limit=LIMIT))


if __name__ == "__main__":
    serve_until_eof(serve)
