"""What people and clusters tell nodes to do."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from zsfl.errors import Unavailable
from zsfl.ids import Address
from zsfl.metrics import Counters
from zsfl.settings import WireLimits
from zsfl.wire.connection import Connection
from zsfl.wire.messages import Train
from zsfl.wire.sockets import open_context

ORDER_S = 30.0
"""What an order may take until it is answered."""


async def order(aggregator: Address | None, what: Train) -> None:
    """Give an order; Unavailable when nobody takes it."""
    if aggregator is None:
        raise Unavailable("the aggregator is not ready")
    async with connected(aggregator, "aggregator") as connection:
        await connection.request(what, deadline_s=ORDER_S)


@asynccontextmanager
async def connected(address: Address, peer: str) -> AsyncIterator[Connection]:
    """A connection to a node's control socket for somebody who is no node; errors call it `peer`."""
    context = open_context()
    try:
        connection = Connection(
            context,
            f"tcp://{address}",
            peer=peer,
            own_id=f"orders-{os.urandom(4).hex()}",
            limits=WireLimits(),
            counters=Counters(),
        )
        try:
            yield connection
        finally:
            connection.close()
    finally:
        context.destroy(linger=0)


@asynccontextmanager
async def deadline(seconds: float, what: str) -> AsyncIterator[None]:
    """Unavailable, saying `what`, when the block takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Unavailable(f"{what} after {seconds:g} s") from None
