"""A page of `zsfl dash`, as a browser would read it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from helpers.processes import Command
from helpers.waiting import eventually, until


async def address_of(command: Command) -> str:
    """Where the page is, once the command says so."""

    def said() -> list[str]:
        return [line.split()[-1] for line in command.out if line.startswith("watch it at http://")]

    await eventually(lambda: said() or command.process.returncode is not None)
    assert said(), command.text
    return said()[0]


class Stream:
    """What a viewer has seen so far."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self.live: dict[str, Any] = {}
        self.rounds: list[dict[str, Any]] = []

    async def until(self, is_so: Callable[[Stream], object]) -> None:
        """Watch until it is so."""
        while not is_so(self):
            name, data = "", ""
            while (line := (await until(self._reader.readline())).decode()) != "\n":
                assert line, "the stream has ended"
                field, _, value = line.rstrip("\n").partition(": ")
                name, data = (value, data) if field == "event" else (name, value)
            if name == "live":
                self.live = json.loads(data)
            elif name:
                rounds = json.loads(data)["rounds"]
                self.rounds = rounds if name == "history" else [*self.rounds, *rounds]

    def there(self) -> dict[str, str]:
        """How each node is, by name."""
        return {node["name"]: node["presence"] for node in self.live["seen"]["nodes"]} if self.live else {}


@asynccontextmanager
async def watching(url: str) -> AsyncIterator[Stream]:
    """The stream of snapshots of the page at `url`."""
    at = urlsplit(url)
    reader, writer = await asyncio.open_connection(at.hostname, at.port, limit=1 << 24)
    try:
        writer.write(f"GET /events HTTP/1.1\r\nHost: {at.netloc}\r\n\r\n".encode())
        head = (await until(reader.readuntil(b"\r\n\r\n"))).decode()
        assert head.startswith("HTTP/1.1 200 "), head
        yield Stream(reader)
    finally:
        writer.transport.abort()
