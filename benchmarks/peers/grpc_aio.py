"""gRPC: grpc.aio with generic methods on bytes, so that no generated code stands in the way."""

from __future__ import annotations

from typing import Any, cast

import grpc  # pyright: ignore[reportMissingImports, reportMissingTypeStubs]
import grpc.aio  # pyright: ignore[reportMissingImports, reportMissingTypeStubs]

from .program import ASK_S, HOST, Buffer, Listening, serve_until_eof

METHOD = "/bench.Echo/Ask"
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
"""Its own limit is 4 MiB."""
_grpc = cast(Any, grpc)


async def serve(listening: Listening) -> None:
    """Answer every call with its request."""

    async def echo(request: bytes, _context: object) -> bytes:
        return request

    server = _grpc.aio.server(options=OPTIONS)
    handlers = {"Ask": _grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((_grpc.method_handlers_generic_handler("bench.Echo", handlers),))
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    listening(port)
    try:
        await server.wait_for_termination()
    finally:
        await server.stop(0)


class GrpcAio:
    """One channel."""

    def __init__(self, port: int) -> None:
        self._channel = _grpc.aio.insecure_channel(f"{HOST}:{port}", options=OPTIONS)
        self._call = self._channel.unary_unary(METHOD)

    async def ask(self, payload: bytes) -> Buffer:
        """The payload, as it came back."""
        return await self._call(payload, timeout=ASK_S)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


async def connect(port: int) -> GrpcAio:
    """An asker joined to a server."""
    return GrpcAio(port)


if __name__ == "__main__":
    serve_until_eof(serve)
