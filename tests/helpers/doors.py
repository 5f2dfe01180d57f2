"""Machines with keys of their own, as folders, and what nodes on them open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import zmq.asyncio
from helpers.wires import HOST, echo

from zsfl.ids import PublicKey, Role
from zsfl.keys.nodes import new_node_id
from zsfl.keys.secret import own_keys
from zsfl.keys.trusted import EVERY_ROLE, Trusted, TrustFile, revoke, trust
from zsfl.metrics import Counters
from zsfl.settings import WireLimits
from zsfl.wire.connection import Connection
from zsfl.wire.door import Door
from zsfl.wire.gatekeeper import kept
from zsfl.wire.server import Handler, Server


class Machine:
    """A folder of keys, a door, and a ZeroMQ context: what one process of a machine has."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder / name
        self.name = name
        self.notes: list[str] = []
        self.counters = Counters()
        self.limits = WireLimits()
        keys = own_keys(self.folder)
        self.key: PublicKey = keys.public
        self.trust = TrustFile(self.folder, keys.public, self.notes.append)
        self.door = Door(name, keys, self.trust, note=self.notes.append)
        self.context = zmq.asyncio.Context()
        self._tasks: dict[Server, asyncio.Task[None]] = {}
        self._connections: list[Connection] = []
        self._stack = ExitStack()

    def open(self) -> None:
        """Let its authenticator answer."""
        self._stack.enter_context(kept(self.context, self.door))

    def trusts(self, other: Machine, roles: frozenset[Role] = EVERY_ROLE) -> None:
        """From now on."""
        trust(self.folder, Trusted(key=other.key, name=other.name, roles=roles))
        self.trust.refresh()

    def revokes(self, other: Machine) -> None:
        """From now on; connections that there are, are another matter."""
        revoke(self.folder, other.name)
        self.trust.refresh()

    def serve(self, handler: Handler = echo, **more: Any) -> Server:
        """A server that runs."""
        wired: dict[str, Any] = {"limits": self.limits, "counters": self.counters, "door": self.door} | more
        server = Server(self.context, HOST, 0, handler, **wired)
        self._tasks[server] = asyncio.create_task(server.run())
        return server

    def connect(self, server: Server, key: str, *, own_id: str = "", **more: Any) -> Connection:
        """A connection to a server of the machine with that key."""
        return self.dial(f"{HOST}:{server.port}", key, own_id, **more)

    def dial(self, address: str, key: str, own_id: str = "", **more: Any) -> Connection:
        """A connection to what listens at `host:port`, on the machine with that key."""
        wired: dict[str, Any] = {"limits": self.limits, "counters": self.counters, "door": self.door} | more
        connection = Connection(
            self.context,
            f"tcp://{address}",
            peer="them",
            own_id=own_id or new_node_id(self.key),
            key=key,
            **wired,
        )
        self._connections.append(connection)
        return connection

    async def close(self) -> None:
        """End everything."""
        for connection in self._connections:
            connection.close()
        for task in self._tasks.values():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        self._stack.close()
        self.context.destroy(linger=0)


@asynccontextmanager
async def machines(folder: Path, *names: str) -> AsyncIterator[list[Machine]]:
    """Machines that trust nobody yet; the authenticators of all of them answer."""
    made = [Machine(folder, name) for name in names]
    try:
        for machine in made:
            machine.open()
        yield made
    finally:
        for machine in made:
            await machine.close()
