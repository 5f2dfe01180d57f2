"""How somebody who is no node of a run gets through to one that listens, with the keys of this machine or without."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from zsfl.errors import NO_DESCRIPTORS, ConfigError, NoPeer, ZsflError
from zsfl.ids import Address
from zsfl.keys.nodes import new_node_id
from zsfl.keys.secret import KEY_FILE, keys_folder, own_keys
from zsfl.keys.trusted import TrustFile
from zsfl.metrics import Counters
from zsfl.settings import NodeSettings, WireLimits
from zsfl.wire.connection import Connection
from zsfl.wire.door import Door, is_loopback
from zsfl.wire.greeting import mechanism_at
from zsfl.wire.sockets import can_open, open_context

GREETING_S = 10.0
"""What somebody who listens may take to say whether it uses keys."""
KEYS_AT_ONCE = 32
"""Trusted keys that are tried together, where it is not known whose machine is at an address."""
MEET_S = 10.0
"""What those may take."""


@asynccontextmanager
async def connected(address: Address, peer: str, settings: NodeSettings) -> AsyncGenerator[Connection, None]:
    """A connection to a node's control socket for somebody who is no node; errors call it `peer`.

    NoPeer when nobody is there; ConfigError when keys are used there and this machine has none, or the other way round.
    """
    door = await _door_to(address, peer, settings)
    context = open_context()
    own_id = new_node_id(door.key)

    def connect(key: str) -> Connection:
        wired: dict[str, Any] = {"limits": WireLimits(), "counters": Counters(), "door": door, "watch": True}
        return Connection(context, f"tcp://{address}", peer=peer, own_id=own_id, key=key, last_words=True, **wired)

    try:
        connection = await _met(connect, list(door.trust.known), peer) if door.trust else connect("")
        try:
            yield connection
        finally:
            connection.close()
    finally:
        context.destroy(linger=0)


async def _door_to(address: Address, peer: str, settings: NodeSettings) -> Door:
    try:
        mechanism = await mechanism_at(address, GREETING_S)
    except TimeoutError:
        raise NoPeer(f"{peer} at {address} does not answer within {GREETING_S:g} s") from None
    if settings.insecure and settings.keys:
        raise ConfigError(
            f"keys are to be used, those in {settings.keys}, and --insecure says not to: leave out either"
        )
    local = is_loopback(address.rpartition(":")[0])
    match mechanism:
        case None:
            raise NoPeer(f"nobody listens at {address}")
        case "NULL" if settings.keys:  # as for a node: where keys are named, also on this machine nothing goes without
            raise ConfigError(
                f"{peer} at {address} uses no keys, and those in {settings.keys} are to be used: start it with --keys, "
                "or leave that out here (ZSFL_KEYS says the same)"
            )
        case "NULL" if local or settings.insecure:
            return Door("orders")
        case "NULL":
            raise ConfigError(f"{peer} at {address} uses no keys: if that is meant so, give --insecure")
        case "CURVE":
            folder = keys_folder(settings.keys)
            if not (folder / KEY_FILE).exists():
                raise ConfigError(
                    f"{peer} at {address} uses keys, and this machine has none: pair them with `zsfl invite`"
                )
            keys = own_keys(folder)
            return Door("orders", keys, TrustFile(folder, keys.public))
        case _:
            raise NoPeer(f"what listens at {address} is no zsfl node")


async def _met(connect: Callable[[str], Connection], keys: Sequence[str], peer: str) -> Connection:
    found = await by_key(connect, keys, MEET_S)
    if found is None:
        raise NoPeer(f"{peer} is on no machine that this one trusts: pair the two with `zsfl invite` on one of them")
    _, connection = found
    try:
        connection.met.result()
    except ZsflError:
        connection.close()
        raise
    return connection


async def by_key(
    connect: Callable[[str], Connection], keys: Sequence[str], wait_s: float
) -> tuple[str, Connection] | None:
    """The key of the machine that is there, and the connection by it, all keys being tried, some at a time.

    Whether that machine lets this one in, the connection's `met` says. NoPeer where no file descriptor is left to try.
    """
    left = list(keys)
    while left:
        trials: dict[str, Connection] = {}
        try:
            for key in left[:KEYS_AT_ONCE]:
                trials[key] = connect(key)
                if not trials[key].is_open:
                    trials.pop(key).close()
                    break
            del left[: len(trials)]
            if trials:
                met = [one.met for one in trials.values()]
                await asyncio.wait(met, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            for key, one in trials.items():
                if one.met.done():
                    del trials[key]
                    return key, one
            if not trials or not can_open():  # where connections are made that takes some, too
                raise NoPeer(f"not all keys could be tried: {NO_DESCRIPTORS}")
        finally:
            for one in trials.values():
                one.close()
    return None
