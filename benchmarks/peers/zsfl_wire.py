"""zsfl's own request and reply: INFER with one tensor, answered by OUTPUT, with all checks, bounds and deadlines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import zmq

from zsfl.ids import Version
from zsfl.keys.nodes import new_node_id
from zsfl.metrics import Counters
from zsfl.settings import WireLimits
from zsfl.tensors.spec import TensorSpec
from zsfl.wire.connection import Connection
from zsfl.wire.door import Door
from zsfl.wire.fields import Load
from zsfl.wire.framing import Buffer
from zsfl.wire.gatekeeper import kept
from zsfl.wire.messages import Infer, Output, Reply, Request
from zsfl.wire.server import Server

from .program import ASK_S, HOST, Listening, serve_until_eof

LOAD = Load(slots=64, busy=1, service_s=0.001)


def _echo(request: Request, parts: Sequence[Buffer]) -> tuple[Reply, Sequence[Buffer]]:
    assert isinstance(request, Infer)
    return Output(output=request.input, load=LOAD), parts


async def serve(listening: Listening, door: Door | None = None) -> None:
    """Answer every request with its part; of whom the `door` lets in, where there is one."""
    context = new_context()
    with kept(context, door) if door else nullcontext():
        server = Server(context, HOST, 0, _echo, limits=WireLimits(), counters=Counters(), door=door)
        listening(server.port)
        await server.run()


def new_context() -> zmq.Context[Any]:
    """With as many threads that send and receive as ZSFL_IO_THREADS says."""
    return zmq.Context(int(os.environ.get("ZSFL_IO_THREADS", "1")))


class ZsflWire:
    """One connection."""

    def __init__(self, port: int, context: zmq.Context[Any] | None = None, door: Door | None = None) -> None:
        self._port, self._door = port, door
        self._owns = context is None
        self._context = context or new_context()
        self._connection = Connection(
            self._context,
            f"tcp://{HOST}:{port}",
            peer="server",
            own_id=new_node_id(door.key if door else ""),
            limits=WireLimits(),
            counters=Counters(),
            door=door,
            key=door.key if door else "",
        )

    def another(self) -> ZsflWire:
        """One more connection to the same server."""
        return ZsflWire(self._port, self._context, self._door)

    async def ask(self, payload: bytes) -> Buffer:
        """The payload, as it came back."""
        spec = TensorSpec("input", "uint8", (len(payload),), "raw", len(payload))
        answer = await self._connection.request(
            Infer(shard=3, version=Version(12), input=spec), [payload], deadline_s=ASK_S
        )
        answer.expect(Output)
        return answer.parts[0]

    async def close(self) -> None:
        """Close the connection."""
        self._connection.close()
        if self._owns:
            self._context.destroy(linger=0)


async def connect(port: int) -> ZsflWire:
    """An asker joined to a server."""
    return ZsflWire(port)


if __name__ == "__main__":
    serve_until_eof(serve)
