"""Listens to mDNS as nodes do, and hears whether what this machine itself says there comes back."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import zeroconf as zc
from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf

from zsfl.discovery.announced import Announcement
from zsfl.discovery.mdns import ASKING, SERVICE, announce, open_network, resolved
from zsfl.doctor.seen import Multicast
from zsfl.errors import Unavailable
from zsfl.ids import NodeId

PROBE = "_zsfl-probe._tcp.local."
LISTEN_S = 2.0
"""Answers take a few tenths of a second, or a second where somebody else has just asked."""
MAX_RESOLVING = 256
Took = Callable[[Announcement], None]
Missing = Callable[[], Awaitable[Iterable[NodeId]]]


async def listen(hosts: Sequence[str], took: Took, missing: Missing) -> list[Multicast]:
    """For some seconds, on the interfaces with these addresses; `took` is given every node that is announced there.

    Nodes that are `missing` then are asked for by name.
    """
    usable: list[str] = []
    unusable: list[Multicast] = []
    for host in hosts:
        try:
            async with open_network(host):
                usable.append(host)
        except Unavailable as error:
            unusable.append(Multicast(host=host, error=str(error)))
    if not usable:
        return unusable
    async with AsyncExitStack() as stack:
        ears = await stack.enter_async_context(open_network(*usable))
        mouths = {host: await stack.enter_async_context(open_network(host)) for host in usable}
        heard = await stack.enter_async_context(_browsing(ears, took))
        probes = {host: await _say(mouth, host) for host, mouth in mouths.items()}
        await asyncio.sleep(LISTEN_S)
        names = [f"{node_id}.{SERVICE}" for node_id in await missing()]
        for seen in await asyncio.gather(*(resolved(ears.zeroconf, name) for name in names)):
            if seen is not None:
                took(seen)
        return [*unusable, *(Multicast(host=host, came_back=probe in heard) for host, probe in probes.items())]


async def _say(mouth: AsyncZeroconf, host: str) -> str:
    label = secrets.token_hex(6)
    await announce(
        mouth, zc.ServiceInfo(PROBE, f"{label}.{PROBE}", port=1, server=f"{label}.local.", parsed_addresses=[host])
    )
    return f"{label}.{PROBE}"


@asynccontextmanager
async def _browsing(ears: AsyncZeroconf, took: Took) -> AsyncGenerator[set[str], None]:
    """Names of all that is heard."""
    heard: set[str] = set()
    resolving: set[asyncio.Task[None]] = set()

    async def resolve(name: str) -> None:
        if (seen := await resolved(ears.zeroconf, name)) is not None:
            took(seen)

    def found(zeroconf: zc.Zeroconf, service_type: str, name: str, state_change: zc.ServiceStateChange) -> None:
        if state_change is zc.ServiceStateChange.Removed or len(resolving) >= MAX_RESOLVING:
            return
        heard.add(name)
        if service_type == SERVICE:
            resolving.add(asyncio.create_task(resolve(name)))

    browser = AsyncServiceBrowser(ears.zeroconf, [SERVICE, PROBE], handlers=[found], question_type=ASKING)
    try:
        yield heard
    finally:
        await browser.async_cancel()
        for task in resolving:
            task.cancel()
        await asyncio.gather(*resolving, return_exceptions=True)
