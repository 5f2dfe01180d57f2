"""The network between the nodes of this process: every connection goes through a TCP proxy that can do it harm.

There is one proxy for each node that dials and each port that it dials, so that what passes between any two nodes, in
either direction, can be slowed down, held up or torn.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

import pytest

from zsfl.ids import Address, NodeCard
from zsfl.wire.sockets import is_free

HERE: ContextVar[str | None] = ContextVar("HERE", default=None)
"""The node that whatever runs belongs to, in whichever thread and loop it runs."""
HOST = "127.0.0.1"
CHUNK_BYTES = 1 << 16
Flow = tuple[str, str]
"""From which node, to which node."""


def free_port() -> int:
    """A port that nobody listens on now, and that the system gives nobody who asks for any: those begin at 32768."""
    return next(port for port in iter(lambda: random.randrange(10_000, 32_000), None) if is_free("127.0.0.1", port))


class _Way:
    """From one node to one port of another."""

    def __init__(self, network: Network, dialer: str, target: str, port: int) -> None:
        self._network, self._port = network, port
        self.there, self.back = (dialer, target), (target, dialer)
        self.listening = socket.create_server((HOST, 0))
        self.streams: set[asyncio.StreamWriter] = set()
        """All that were opened since the last reset: one that is closed may have something to send yet."""

    @property
    def endpoint(self) -> str:
        return f"tcp://{HOST}:{self.listening.getsockname()[1]}"

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either end is closed."""
        self.streams.add(writer)
        with suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection(HOST, self._port)
            self.streams.add(far_writer)
            flows = [
                asyncio.ensure_future(self._network.carry(self.there, reader, far_writer)),
                asyncio.ensure_future(self._network.carry(self.back, far_reader, writer)),
            ]
            try:
                await asyncio.wait(flows, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for flow in flows:
                    flow.cancel()
                await asyncio.gather(*flows, return_exceptions=True)
                far_writer.close()
        writer.close()

    def reset(self) -> None:
        """Tear every connection; both ends are told."""
        for writer in self.streams:
            if not writer.is_closing():
                raw = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        self.streams.clear()


class Network:
    """All ways of one test. Nodes are known by name; a new fault adds to those there are, until `heal`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(NodeCard, "endpoint", lambda card, port: self._endpoint(card, port))
        self._loop = asyncio.get_running_loop()
        self._names: dict[Address, str] = {}
        self._ways: dict[tuple[str, str, int], _Way] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._carrying: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._blocked: set[Flow] = set()
        self._slow: dict[Flow, tuple[int, float]] = {}
        self.latency_s = 0.0
        """Of every piece of at most `CHUNK_BYTES`, everywhere."""
        self.carried: Counter[Flow] = Counter()
        """Bytes."""

    def knows(self, name: str, address: str) -> None:
        """This node has its control socket there."""
        self._names[Address(address)] = name

    def _endpoint(self, card: NodeCard, port: int) -> str:
        """Called by whichever node dials, in its own thread."""
        dialer = HERE.get()
        if dialer is None:
            return f"tcp://{card.host}:{port}"
        key = dialer, self._names.get(card.address, card.name), port
        if (way := self._ways.get(key)) is None:
            way = self._ways[key] = _Way(self, *key)
            self._loop.call_soon_threadsafe(self._serve, way)
        return way.endpoint

    def _serve(self, way: _Way) -> None:
        async def serve() -> None:
            server = await asyncio.start_server(connected, sock=way.listening)
            async with server:
                await server.serve_forever()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            carrying = asyncio.ensure_future(way.carry(reader, writer))
            self._carrying.add(carrying)
            carrying.add_done_callback(self._carrying.discard)

        self._serving.add(asyncio.ensure_future(serve()))

    async def carry(self, flow: Flow, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction of one connection, its end included."""
        with suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                for piece, pause_s in self._pieces(flow, data):
                    await asyncio.sleep(pause_s)
                    await self._passable(flow)
                    writer.write(piece)
                    await writer.drain()
                    self.carried[flow] += len(piece)
        await self._passable(flow)

    def _pieces(self, flow: Flow, data: bytes) -> Iterator[tuple[bytes, float]]:
        size, pause_s = self._slow.get(flow, (CHUNK_BYTES, self.latency_s))
        return ((data[first : first + size], pause_s) for first in range(0, len(data), size))

    async def _passable(self, flow: Flow) -> None:
        while flow in self._blocked:
            await self._changed.wait()

    # --- what can be done to it -------------------------------------------------------------------------

    def _flows(self, name: str) -> set[Flow]:
        flows = {flow for way in self._ways.values() for flow in (way.there, way.back)}
        return {flow for flow in flows if name in flow}

    def block(self, *flows: Flow) -> None:
        """Nothing gets through this way any more, and nobody is told: as when a cable is pulled out."""
        self._blocked.update(flows)

    def block_to(self, name: str) -> None:
        """Nothing reaches this node."""
        self.block(*((source, name) for source in self._others(name)))

    def block_from(self, name: str) -> None:
        """Nothing that this node says gets through."""
        self.block(*((name, target) for target in self._others(name)))

    def cut(self, name: str) -> None:
        """Nothing gets through to or from this node."""
        self.block_to(name)
        self.block_from(name)

    def _others(self, name: str) -> set[str]:
        return {*self._names.values()} - {name}

    def dribble(self, name: str, size_bytes: int, pause_s: float) -> None:
        """What passes to and from this node comes in pieces of so many bytes, with pauses in between."""
        self._slow |= dict.fromkeys(self._flows(name), (size_bytes, pause_s))

    def reset(self, name: str) -> None:
        """Tear all connections of this node; they may be opened again."""
        for way in self._ways.values():
            if name in way.there:
                way.reset()

    def heal(self) -> None:
        """All is well again, and what was held up arrives."""
        self._blocked.clear()
        self._slow.clear()
        self._changed.set()
        self._changed = asyncio.Event()

    async def close(self) -> None:
        """Leave nothing behind."""
        tasks = [*self._serving, *self._carrying]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for way in self._ways.values():
            way.listening.close()
            way.reset()


@contextmanager
def in_node(name: str) -> Iterator[None]:
    """What is started inside belongs to this node."""
    token = HERE.set(name)
    try:
        yield
    finally:
        HERE.reset(token)
