"""Asks one node how it is, and where it does not answer finds out why."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from zsfl.doctor.seen import Reach, SeenNode, Silence
from zsfl.errors import NO_DESCRIPTORS, DeadlineExceeded, NoPeer, Unauthorised, ZsflError, lacks_descriptors
from zsfl.ids import Address
from zsfl.keys.nodes import new_node_id
from zsfl.metrics import Counters
from zsfl.settings import WireLimits
from zsfl.wire.connection import Connection
from zsfl.wire.door import Door
from zsfl.wire.examining import Condition, Examine
from zsfl.wire.greeting import mechanism_at
from zsfl.wire.reaching import by_key
from zsfl.wire.sockets import open_context

REACH_S = 1.5
"""What a connection may take."""
GREETING_S = 1.0
MEET_S = 2.0
"""What the machine that has one of the keys that are tried may take to show it."""
ANSWER_S = 2.0
AT_ONCE = 64
"""Connections that are tried at once."""


class Asker:
    """Asks as an operator does, which makes nobody's peer of it."""

    def __init__(self, locked: Door | None) -> None:
        """`locked` has the keys of this machine, if there are any."""
        self._locked = locked
        self._context = open_context()
        self._room = asyncio.Semaphore(AT_ONCE)

    def close(self) -> None:
        """Close what is open."""
        self._context.destroy(linger=0)

    async def reach(self, host: str, port: int) -> Reach:
        """Whether TCP gets through to a port."""
        async with self._room:
            return await reach(host, port)

    async def ask(self, node: SeenNode, key: str) -> SeenNode:
        """The same node with what it says, or why it does not; `key` is that of its machine, where that is known."""
        host, _, port = node.address.rpartition(":")
        found = await self.reach(host, int(port))
        if found != "open":
            return msgspec.structs.replace(node, silence=found)
        try:
            mechanism = await mechanism_at(Address(node.address), GREETING_S)
        except TimeoutError:
            return msgspec.structs.replace(node, silence="mute")
        match mechanism:
            case "NULL":
                return await self._examine(msgspec.structs.replace(node, locked=False), Door("doctor"), ())
            case "CURVE":
                return await self._unlock(msgspec.structs.replace(node, locked=True), key)
            case _:
                return msgspec.structs.replace(node, silence="stranger" if mechanism is not None else "refused")

    async def _unlock(self, node: SeenNode, key: str) -> SeenNode:
        if self._locked is None or self._locked.trust is None:
            return msgspec.structs.replace(node, silence="keys")
        trusted = list(self._locked.trust.known)
        if key and key not in trusted:
            return msgspec.structs.replace(node, silence="unknown")
        return await self._examine(node, self._locked, [key] if key else trusted)

    async def _examine(self, node: SeenNode, door: Door, keys: Sequence[str]) -> SeenNode:
        own_id = new_node_id(door.key)
        wired: dict[str, Any] = {"limits": WireLimits(), "counters": Counters(), "door": door, "watch": True}
        met: Connection | None = None

        def connect(key: str) -> Connection:
            return Connection(self._context, f"tcp://{node.address}", peer=node.name, own_id=own_id, key=key, **wired)

        try:
            if door.locked:
                found = await by_key(connect, keys, MEET_S)
                if found is None:
                    return msgspec.structs.replace(node, silence="unknown")
                key, met = found
                node = msgspec.structs.replace(node, key=key)
                met.met.result()
            else:
                met = connect("")
            return await _examined(node, met)
        except ZsflError as error:
            return msgspec.structs.replace(node, silence=_silence(error), said=str(error))
        finally:
            if met is not None:
                met.close()


async def _examined(node: SeenNode, connection: Connection) -> SeenNode:
    begun_s = time.time()
    told = (await connection.request(Examine(), deadline_s=ANSWER_S)).expect(Condition)
    ended_s = time.time()
    return msgspec.structs.replace(
        node,
        condition=told,
        card=told.card,
        off_s=told.clock_s - (begun_s + ended_s) / 2,
        within_s=abs(ended_s - begun_s) / 2,
    )


def _silence(error: ZsflError) -> Silence:
    match error:
        case DeadlineExceeded() | NoPeer():
            return "mute"
        case Unauthorised():
            return "turned away" if "does not trust" in str(error) else "forbidden"
        case _:
            return "old"


async def reach(host: str, port: int) -> Reach:
    """Whether TCP gets through: a port that is refused and one that is silent are told apart."""
    try:
        async with asyncio.timeout(REACH_S):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return "silent"
    except (ConnectionRefusedError, ConnectionResetError):
        return "refused"
    except OSError as error:
        if lacks_descriptors(error):
            raise NoPeer(f"nobody can be asked: {NO_DESCRIPTORS}") from error
        return "unreachable"
    writer.transport.abort()
    return "open"
