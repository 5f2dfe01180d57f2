"""zsfl's own request and reply: INFER with one tensor, answered by OUTPUT, with all checks, bounds and deadlines."""

from __future__ import annotations

import os
from collections.abc import Sequence

import zmq

from zsfl.ids import Version
from zsfl.metrics import Counters
from zsfl.settings import WireLimits
from zsfl.tensors.spec import TensorSpec
from zsfl.wire.connection import Connection
from zsfl.wire.fields import Load
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import Infer, Output, Reply, Request
from zsfl.wire.server import Server

from .program import ASK_S, HOST, Listening, serve_until_eof

LOAD = Load(slots=64, busy=1, service_s=0.001)


def _echo(request: Request, parts: Sequence[Buffer]) -> tuple[Reply, Sequence[Buffer]]:
    assert isinstance(request, Infer)
    return Output(output=request.input, load=LOAD), parts


async def serve(listening: Listening) -> None:
    """Answer every request with its part."""
    server = Server(zmq.Context.instance(), HOST, 0, _echo, limits=WireLimits(), counters=Counters())
    listening(server.port)
    await server.run()


class ZsflWire:
    """One connection."""

    def __init__(self, port: int) -> None:
        self._connection = Connection(
            zmq.Context.instance(),
            f"tcp://{HOST}:{port}",
            peer="server",
            own_id=os.urandom(6).hex(),
            limits=WireLimits(),
            counters=Counters(),
        )

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


async def connect(port: int) -> ZsflWire:
    """An asker joined to a server."""
    return ZsflWire(port)


if __name__ == "__main__":
    serve_until_eof(serve)
