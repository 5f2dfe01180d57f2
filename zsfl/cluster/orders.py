"""What people and clusters tell nodes to do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from zsfl.errors import Unavailable
from zsfl.ids import Address
from zsfl.settings import NodeSettings
from zsfl.wire.messages import Train
from zsfl.wire.reaching import connected

ORDER_S = 30.0
"""What an order may take until it is answered."""


async def order(aggregator: Address | None, what: Train, settings: NodeSettings) -> None:
    """Give an order; Unavailable when nobody takes it."""
    if aggregator is None:
        raise Unavailable("the aggregator is not ready")
    async with connected(aggregator, "aggregator", settings) as connection:
        await connection.request(what, deadline_s=ORDER_S)


@asynccontextmanager
async def deadline(seconds: float, what: str) -> AsyncIterator[None]:
    """Unavailable, saying `what`, when the block takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Unavailable(f"{what} after {seconds:g} s") from None
