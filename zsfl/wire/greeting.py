"""What somebody who listens says first, before any key is shown: whether it speaks ZeroMQ, and whether with keys."""

from __future__ import annotations

import asyncio

from zsfl.errors import NO_DESCRIPTORS, NoPeer, lacks_descriptors
from zsfl.ids import Address

_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
_VERSION = b"\x03"
"""Of ZMTP; once it has heard that, the other side says its mechanism (ZMTP 3.1, section 3.2)."""
_FIRST, _LAST = 12, 32
"""Where the mechanism stands in a greeting."""


async def mechanism_at(address: Address, deadline_s: float) -> str | None:
    """`CURVE` (with keys) or `NULL` (without); empty: it is not ZeroMQ; None: nobody listens.

    TimeoutError when there is no telling, NoPeer when this process may open nothing to find out.
    """
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(deadline_s):
        try:
            reader, writer = await asyncio.open_connection(host, int(port))
        except (OSError, ValueError, OverflowError) as error:  # also of what is no name, or no port
            if lacks_descriptors(error):
                raise NoPeer(f"{address} cannot be asked: {NO_DESCRIPTORS}") from error
            return None
        try:
            writer.write(_SIGNATURE + _VERSION)
            greeting = await reader.readexactly(_LAST)
        except (OSError, asyncio.IncompleteReadError):
            return ""
        finally:
            writer.transport.abort()
    if (greeting[:1], greeting[9:10]) != (_SIGNATURE[:1], _SIGNATURE[-1:]):
        return ""
    return greeting[_FIRST:_LAST].rstrip(b"\0").decode(errors="replace")
