"""Asks nodes to leave, wherever they run, and sees them off: what `zsfl drain` does."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from zsfl.bounds import is_address
from zsfl.cluster.orders import deadline
from zsfl.errors import ConfigError, DeadlineExceeded, NoPeer, Rejected, ZsflError
from zsfl.ids import Address, NodeId
from zsfl.settings import NodeSettings
from zsfl.wire.connection import Connection
from zsfl.wire.greeting import mechanism_at
from zsfl.wire.messages import Drain, Draining
from zsfl.wire.reaching import connected
from zsfl.words import number_of

ANSWER_S = 10.0
"""What a node may take to answer: it is never busy with anything else."""
LOOK_S = 0.1
"""How often to look whether it is still there."""


def print_drain(addresses: Sequence[str], wait_s: float, settings: NodeSettings | None = None) -> int:
    """Ask these nodes to leave, all at once, and tell what becomes of each; 0 when all have left."""
    if not 0 < wait_s < math.inf:
        raise ConfigError(f"--wait-s is {wait_s:g}: expected a number of seconds above 0")
    for address in addresses:
        if not is_address(address):
            raise ConfigError(
                f"{address!r} is no HOST:PORT, such as 192.168.1.20:7700; a node's first line says its own"
            )

    async def all_left() -> bool:
        once = dict.fromkeys(map(Address, addresses))
        return all(await asyncio.gather(*(_print_one(address, wait_s, settings) for address in once)))

    return 0 if asyncio.run(all_left()) else 1


async def _print_one(address: Address, wait_s: float, settings: NodeSettings | None) -> bool:
    def tell(node: Draining) -> None:
        requests = f"{node.busy} request{'s' * (node.busy != 1)} in hand"
        spills = f"{number_of(node.offered, 'spill')} that no version has counted yet"
        print(f"{node.name} at {address} is leaving: {requests}, {spills}", flush=True)

    begun_s = time.monotonic()
    try:
        name = await drain(address, wait_s, tell, settings)
    except ZsflError as error:
        print(f"zsfl: {error}", file=sys.stderr, flush=True)
        return False
    print(f"{name} at {address} has left after {time.monotonic() - begun_s:.1f} s", flush=True)
    return True


async def drain(
    address: Address,
    wait_s: float,
    asked: Callable[[Draining], None] = lambda _: None,
    settings: NodeSettings | None = None,
) -> str:
    """Ask a node to finish what it has in hand and leave; its name, once it has left. `asked` is told what it answers.

    NoPeer when no node is there, Unavailable when it is still there after `wait_s`.
    """
    await _check_is_node(address)
    async with connected(address, f"what listens at {address}", settings or NodeSettings()) as connection:
        try:
            node = (await connection.request(Drain(), deadline_s=ANSWER_S)).expect(Draining)
        except DeadlineExceeded:
            await _check_is_node(address)  # its run may have ended meanwhile
            raise NoPeer(
                f"{address} takes connections and does not answer: is it the address in the node's first line, and not "
                "another of its ports? A node that hangs has to be killed"
            ) from None
        except ZsflError as error:
            raise NoPeer(f"{error}. Give the address in the first line of a node of this version of zsfl") from error
        asked(node)
        async with deadline(wait_s, f"{node.name} at {address} was asked to leave and is still there"):
            while True:
                if not await _is_there(connection, address, node.node):
                    return node.name
                await asyncio.sleep(LOOK_S)


async def _is_there(connection: Connection, address: Address, node: NodeId) -> bool:
    """Whether this node is still there, and not another one that has its address by now."""
    try:
        await connection.request(Drain(node=node), deadline_s=LOOK_S)
    except Rejected:
        return False
    except DeadlineExceeded:
        with suppress(TimeoutError):  # nobody says that it is gone
            return await mechanism_at(address, ANSWER_S) is not None
    return True


async def _check_is_node(address: Address) -> None:
    try:
        mechanism = await mechanism_at(address, ANSWER_S)
    except TimeoutError:
        raise NoPeer(
            f"{address} does not answer within {ANSWER_S:g} s: is it a zsfl node, and does the firewall let TCP pass?"
        ) from None
    if mechanism is None:
        raise NoPeer(f"nobody listens at {address}: has it left already? A node's first line says its address")
    if not mechanism:
        raise NoPeer(f"what listens at {address} is no zsfl node; a node's first line says its address")
