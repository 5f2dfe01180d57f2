"""How a node is, as it tells `zsfl doctor`."""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

from zsfl.discovery.table import PeerTable
from zsfl.ids import PROTOCOL, NodeCard
from zsfl.settings import NodeSettings
from zsfl.wire.examining import MAX_TOLD, Condition, Hearing, Wait
from zsfl.wire.fields import MAX_PEERS_EXCHANGED, fit_for_line

SAY_WAITS_S = 0.5
"""A lane that is busy for longer is not waited for."""
MOST_S = 86_400.0
PACKAGES = ("zsfl", "torch", "pyzmq", "zeroconf")


async def condition(
    card: NodeCard,
    settings: NodeSettings,
    facts: Mapping[str, str],
    table: PeerTable,
    waits: Awaitable[Sequence[tuple[str, float]]],
) -> Condition:
    """How a node is; never later than a moment, whatever it does."""
    asked = asyncio.ensure_future(waits)
    await asyncio.wait({asked}, timeout=SAY_WAITS_S)
    waited = asked.result() if asked.done() else ()
    versions, (free_bytes, writable) = await asyncio.to_thread(lambda: (versions_here(), room_in(settings.runs)))
    silences = table.silences(time.monotonic())
    refused = islice(table.refusals().items(), MAX_TOLD)
    return Condition(
        card=card,
        protocol=PROTOCOL,
        facts=dict(facts),
        clock_s=time.time(),
        mdns=settings.mdns,
        peers=len(silences),
        hears=tuple(
            Hearing(card=peer, heard_s=min(silences[peer.id], MOST_S)) for peer in table.to_tell(MAX_PEERS_EXCHANGED)
        ),
        refused={str(address)[:200]: fit_for_line(why) for address, why in refused},
        waits=tuple(Wait(what=fit_for_line(what), seconds=min(for_s, MOST_S)) for what, for_s in waited[:MAX_TOLD]),
        versions=versions,
        free_bytes=free_bytes,
        writable=writable,
    )


@cache
def versions_here() -> dict[str, str]:
    """Of Python and of what a node needs, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def room_in(folder: Path) -> tuple[int | None, bool]:
    """Free bytes where a folder is or will be, and whether one may write there."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    try:
        found = os.statvfs(there)
    except OSError:
        return None, False
    return found.f_bavail * found.f_frsize, os.access(there, os.W_OK)
