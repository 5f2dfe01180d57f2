"""Serves over HTTP, to few and slow clients as to many and hostile ones: the page and its stream of snapshots."""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from zsfl.dashboard.http import MAX_HEAD_BYTES, Gate, HttpError, Request, head_of, parse
from zsfl.dashboard.hub import Has, Hub
from zsfl.errors import ConfigError

MAX_CONNECTIONS = 128
"""At once; further ones are told to come back."""
HEAD_S = 10.0
"""What a request may take to arrive."""
STALL_S = 30.0
"""A viewer that takes nothing for so long is let go of; its page comes back by itself."""
LINGER_S, LINGER_BYTES = 2.0, 1 << 18
"""What else is taken of somebody whose request was refused, so that the refusal is read."""
BUFFER_BYTES = 1 << 16
"""Kept for a viewer beyond what its system has taken, and one snapshot at most."""


class Page:
    """The one page, and the policy that lets it run its own script and load nothing else."""

    def __init__(self, html: bytes) -> None:
        self.html = html
        style, script = (_hash(html, tag) for tag in (b"style", b"script"))
        self.policy = (
            f"default-src 'none'; style-src {style}; script-src {script}; connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    @classmethod
    def load(cls) -> Page:
        """As it lies in the package."""
        return cls(Path(__file__).with_name("page.html").read_bytes())


def _hash(html: bytes, tag: bytes) -> str:
    inside = re.search(rb"<%s>(.*?)</%s>" % (tag, tag), html, re.DOTALL)
    digest = hashlib.sha256(inside[1] if inside else b"").digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


class HttpServer:
    """Listens on one address from `open` to `close`; what there is to get is for the classes below it to say."""

    what, flag, path = "the page", "--port", "/"
    """For people: what is served, which flag says where, and what to ask for."""
    whose = "open the whole address that `zsfl dash` printed: it has a token, new with each start"
    """What those who come without the token are told."""

    def __init__(self, *, stall_s: float = STALL_S, head_s: float = HEAD_S) -> None:
        self._stall_s = stall_s
        self._head_s = head_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._gate: Gate
        self._server: asyncio.Server
        self.url: str = ""

    async def open(self, host: str, port: int, token: str) -> None:
        """Listen, on any free port where `port` is 0; ConfigError where that cannot be."""
        try:
            self._server = await asyncio.start_server(self._connected, host, port, limit=MAX_HEAD_BYTES)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"cannot serve {self.what} at {host}:{port}{_why(error, self.flag)}") from None
        port = self._server.sockets[0].getsockname()[1]
        self._gate = Gate(host, port, token, self.whose)
        self.url = f"http://{host}:{port}{self.path}"

    async def close(self) -> None:
        """Let everybody go."""
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(BUFFER_BYTES)
        task = asyncio.ensure_future(self._serve(reader, writer, is_full=len(self._tasks) >= MAX_CONNECTIONS))
        if len(self._tasks) >= 2 * MAX_CONNECTIONS:  # not even that can be said to all
            writer.transport.abort()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_full: bool) -> None:
        try:
            with suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                try:
                    request = await self._request(reader)
                    if is_full:
                        raise HttpError(503, "too many ask at once: come back later")
                    await self._answer(request, writer)
                except HttpError as error:
                    await self._say(writer, error.status, f"{error}\n".encode(), head_only=False)
                    await self._let_finish(reader, writer)
                writer.close()
                async with asyncio.timeout(self._stall_s):
                    await writer.wait_closed()
        finally:
            writer.transport.abort()

    async def _let_finish(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take what is still on its way, for a while: to close before would take back the answer, too."""
        writer.write_eof()
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                for _ in range(LINGER_BYTES // MAX_HEAD_BYTES):
                    if not await reader.read(MAX_HEAD_BYTES):
                        return

    async def _request(self, reader: asyncio.StreamReader) -> Request:
        try:
            async with asyncio.timeout(self._head_s):
                head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            raise HttpError(431, f"a request has at most {MAX_HEAD_BYTES} bytes") from None
        except TimeoutError:
            raise HttpError(408, f"no request came within {self._head_s:g} s") from None
        request = parse(head)
        self._check(request)
        return request

    def _check(self, request: Request) -> None:
        """HttpError for whoever may not ask for that."""
        self._gate.check(request)

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> None:
        """Answer a request that may be made; HttpError where there is nothing to get."""
        raise NotImplementedError

    async def _say(
        self,
        writer: asyncio.StreamWriter,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        head_only: bool,
    ) -> None:
        said = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body)), **(headers or {})}
        if status == 405:
            said["Allow"] = "GET, HEAD"
        writer.write(head_of(status, said) + (b"" if head_only else body))
        await self._drained(writer)

    async def _drained(self, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(self._stall_s):
            await writer.drain()


def _why(error: Exception, flag: str) -> str:
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        return f" (something listens there already); choose another {flag}"
    said = os.strerror(number) if number else str(error)
    if number == errno.EADDRNOTAVAIL:
        return " (this machine has no such address); name one that it has"
    return f" ({said}); choose another {flag}"


class PageServer(HttpServer):
    """The page, and what viewers of it are sent."""

    def __init__(self, page: Page, hub: Hub, *, stall_s: float = STALL_S, head_s: float = HEAD_S) -> None:
        super().__init__(stall_s=stall_s, head_s=head_s)
        self._page = page
        self._hub = hub

    async def open(self, host: str, port: int, token: str) -> None:
        """The same; the token is in the address."""
        await super().open(host, port, token)
        if token:
            self.url = f"{self.url}?token={quote(token)}"

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> None:
        head_only = request.method == "HEAD"
        match request.path:
            case "/" if self._gate.has_token(request):
                # The token leaves the address bar, and with it whatever keeps addresses.
                headers = {"Location": "/", "Set-Cookie": self._gate.set_cookie()}
                await self._say(writer, 303, b"", headers, head_only=head_only)
            case "/":
                headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": self._page.policy}
                await self._say(writer, 200, self._page.html, headers, head_only=head_only)
            case "/events":
                writer.write(head_of(200, {"Content-Type": "text/event-stream"}))
                if not head_only:
                    await self._stream(writer)
            case _:
                raise HttpError(404, "there is one page here: /")

    async def _stream(self, writer: asyncio.StreamWriter) -> None:
        """Snapshots, until the viewer leaves or takes no more; those that come while it is slow are passed over."""
        has = Has()
        with self._hub.viewer():
            writer.write(b"retry: 1000\n\n")
            while not writer.is_closing():
                frame, has = await self._hub.next(has)
                writer.write(frame)
                await self._drained(writer)
