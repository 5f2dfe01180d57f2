"""What a cluster tells its aggregator to do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import zmq.asyncio

from zsfl.errors import Unavailable
from zsfl.ids import Address
from zsfl.metrics import Counters
from zsfl.settings import WireLimits
from zsfl.wire.connection import Connection
from zsfl.wire.messages import Train

ORDER_S = 10.0
"""What an order may take until it is answered."""


async def order(aggregator: Address | None, what: Train) -> None:
    """Give an order; Unavailable when nobody takes it."""
    if aggregator is None:
        raise Unavailable("the aggregator is not ready")
    context = zmq.asyncio.Context()
    connection = Connection(
        context,
        f"tcp://{aggregator}",
        peer="aggregator",
        own_id="cluster",
        limits=WireLimits(),
        counters=Counters(),
    )
    try:
        await connection.request(what, deadline_s=ORDER_S)
    finally:
        connection.close()
        context.destroy(linger=0)


@asynccontextmanager
async def deadline(seconds: float, what: str) -> AsyncIterator[None]:
    """Unavailable, saying `what`, when the block takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Unavailable(f"{what} after {seconds:g} s") from None
