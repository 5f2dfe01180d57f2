"""HTTP with raw bytes as bodies: FastAPI under uvicorn (with uvloop and httptools), asked by httpx."""

from __future__ import annotations

from socket import socket

import httpx  # pyright: ignore[reportMissingImports]
import uvicorn  # pyright: ignore[reportMissingImports]
from fastapi import FastAPI, Request, Response  # pyright: ignore[reportMissingImports]

from .program import ASK_S, HOST, Buffer, Listening, serve_until_eof

CONNECTIONS = 64
"""HTTP/1.1 has one question open on each; httpx keeps as many alive."""
IDLE_S = 75
"""How long the server keeps an idle connection: longer than httpx does, or one would close as the other asks."""


async def serve(listening: Listening) -> None:
    """Answer every POST with its body."""
    app = FastAPI()

    @app.post("/")
    async def echo(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        return Response(await request.body(), media_type="application/octet-stream")

    class Server(uvicorn.Server):
        """Tells its port."""

        async def startup(self, sockets: list[socket] | None = None) -> None:
            await super().startup(sockets)
            listening(self.servers[0].sockets[0].getsockname()[1])

    config = uvicorn.Config(
        app, host=HOST, port=0, log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=IDLE_S
    )
    await Server(config).serve()


class HttpBytes:
    """One client with a pool of connections."""

    def __init__(self, port: int) -> None:
        limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
        self._client = httpx.AsyncClient(limits=limits, timeout=ASK_S, trust_env=False)
        self._url = f"http://{HOST}:{port}/"

    async def ask(self, payload: bytes) -> Buffer:
        """The payload, as it came back."""
        answer = await self._client.post(self._url, content=payload)
        answer.raise_for_status()
        return answer.content

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()


async def connect(port: int) -> HttpBytes:
    """An asker joined to a server."""
    return HttpBytes(port)


if __name__ == "__main__":
    serve_until_eof(serve)
