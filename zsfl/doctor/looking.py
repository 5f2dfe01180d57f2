"""Looks at everything: this machine, the network, and whoever can be found on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from zsfl.bounds import is_address
from zsfl.discovery.announced import Announcement
from zsfl.discovery.dns import addresses_of
from zsfl.discovery.folder import Folder
from zsfl.doctor.asking import Asker
from zsfl.doctor.hearing import listen
from zsfl.doctor.here import here, look_at_disk, look_at_keys, look_at_store
from zsfl.doctor.nodes import PORTS
from zsfl.doctor.seen import Multicast, Reach, Seen, SeenNode, Torch
from zsfl.doctor.together import groups_of, unheard
from zsfl.ids import NodeCard, NodeId, Role
from zsfl.reports import ADDRESS
from zsfl.settings import NodeSettings
from zsfl.wire.door import is_loopback

MAX_ASKED = 256
"""Nodes; further ones are counted."""
ASKING_S = 15.0
"""What asking all of them may take together."""
SETTLE_S = 1.5
"""Nodes that were just started find one another in that time: those who do not hear one another are asked again."""
LOOPBACK = "127.0.0.1"


async def look(settings: NodeSettings, finding: Awaitable[Torch], job: str = "") -> Seen:
    """What there is to see, in a few seconds, besides what `finding` brings: PyTorch and the job file, if there is one.

    Otherwise `job` is the name of the one that is looked for; empty: whatever there is.
    """
    settled_s = time.monotonic() + SETTLE_S
    keys, door = look_at_keys(settings)
    asker = Asker(door)
    try:
        torch, disk, store, (nodes, left_out, multicast) = await asyncio.gather(
            finding,
            asyncio.to_thread(look_at_disk, settings),
            look_at_store(settings),
            _look_around(settings, asker),
        )
        seen = Seen(
            here=here(settings, disk, store, keys, torch, multicast),
            nodes=nodes,
            job=torch.job or job,
            cluster=settings.cluster,
            left_out=left_out,
        )
        return await _look_again(seen, asker, settled_s)
    finally:
        asker.close()


async def _look_around(settings: NodeSettings, asker: Asker) -> tuple[list[SeenNode], int, list[Multicast]]:
    crawl = Crawl(asker)
    for address in settings.peers:
        crawl.meet(address, "peer")
    for address, source in await asyncio.to_thread(_named, settings):
        crawl.meet(address, source)
    if not settings.named and (address := _newest_run(settings.runs)):
        crawl.meet(address, "run")
    hosts = (settings.host,) if is_loopback(settings.host) else (settings.host, LOOPBACK)
    multicast = await listen(hosts, crawl.announced, crawl.unannounced) if settings.mdns else []
    await crawl.ended()
    return await _with_ports(crawl.nodes(), asker), crawl.left_out, multicast


def _named(settings: NodeSettings) -> list[tuple[str, str]]:
    """Who is where by a name server, or in the folder where nodes meet."""
    found: list[tuple[str, str]] = []
    for place in settings.dns:
        with suppress(OSError, UnicodeError):
            found += [(address, "dns") for address in addresses_of(place)]
    if settings.meet:
        with suppress(OSError):
            found += [(seen.address, "folder") for seen in Folder(Path(settings.meet).expanduser()).look()]
    return found


def _newest_run(runs: Path) -> str:
    with suppress(OSError, ValueError):
        found = sorted(runs.glob(f"*/{ADDRESS}"), key=lambda path: path.stat().st_mtime)
        address = found[-1].read_text(encoding="utf-8").strip() if found else ""
        return address if is_address(address) else ""
    return ""


class Crawl:
    """Asks all nodes of whom is heard, and those of whom they tell."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker
        self._nodes: dict[str, SeenNode] = {}
        self._asking: set[asyncio.Task[None]] = set()
        self._ends_s = time.monotonic() + ASKING_S
        self.left_out = 0
        self._hidden: dict[NodeId, NodeCard] = {}
        """Behind NAT, as others say."""

    def announced(self, seen: Announcement) -> None:
        """By mDNS."""
        self.meet(seen.address, "mdns")
        if node := self._nodes.get(seen.address):
            said = (str(seen.node_id), seen.job_hash)
            self._nodes[seen.address] = msgspec.structs.replace(node, announced=said)

    async def unannounced(self) -> list[NodeId]:
        """Who should have been heard by multicast, and was not."""
        await self._asked()
        return [
            node.condition.card.id
            for node in self._nodes.values()
            if node.condition and node.condition.mdns and "mdns" not in node.sources
        ]

    def meet(self, address: str, source: str, card: NodeCard | None = None) -> None:
        """Ask whoever is there, the first time."""
        if known := self._nodes.get(address):
            sources = known.sources | {source}
            self._nodes[address] = msgspec.structs.replace(known, sources=sources, card=known.card or card)
        elif len(self._nodes) >= MAX_ASKED:
            self.left_out += 1
        else:
            self._nodes[address] = SeenNode(address=address, sources=frozenset({source}), silence="mute", card=card)
            self._asking.add(asyncio.create_task(self._ask(address)))

    async def _ask(self, address: str) -> None:
        node = self._nodes[address]
        told = await self._asker.ask(msgspec.structs.replace(node, silence=""), node.card.key if node.card else "")
        now = self._nodes[address]  # others may have told of it meanwhile
        self._nodes[address] = msgspec.structs.replace(
            told, sources=now.sources, announced=now.announced, card=told.card or now.card
        )
        for one in told.condition.hears if told.condition else ():
            if one.card.behind_nat:  # what it has for an address is somebody else's here
                self._hidden.setdefault(one.card.id, one.card)
            elif one.card.control_port and one.card.role not in (Role.OBSERVER, Role.OPERATOR):
                self.meet(one.card.address, address, one.card)

    async def _asked(self) -> None:
        """Returns once nobody is left to ask, or time is up."""
        while waited := [task for task in self._asking if not task.done()]:
            left_s = self._ends_s - time.monotonic()
            if left_s <= 0:
                break
            await asyncio.wait(waited, timeout=left_s)

    async def ended(self) -> None:
        """Ask nobody any more, once all are asked that are known."""
        await self._asked()
        for task in self._asking:
            task.cancel()
        for ended in await asyncio.gather(*self._asking, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended

    def nodes(self) -> list[SeenNode]:
        """Each once, though it was found at several addresses."""
        found = sorted(
            self._nodes.values(), key=lambda node: node.card is not None and node.card.address != node.address
        )
        once: dict[str, SeenNode] = {}
        for node in found:
            known = once.setdefault(node.condition.card.id if node.condition else node.address, node)
            if known is not node:
                once[known.condition.card.id if known.condition else known.address] = msgspec.structs.replace(
                    known, sources=known.sources | node.sources, announced=known.announced or node.announced
                )
        told = {node.condition.card.id for node in once.values() if node.condition}
        for card in self._hidden.values():
            if card.id not in told:
                hidden = SeenNode(address=card.address, sources=frozenset(), silence="behind NAT", card=card)
                once[card.id] = hidden
        order = [Role.AGGREGATOR, Role.STANDBY, Role.SPLIT_SERVER, Role.CLIENT]
        return sorted(
            once.values(),
            key=lambda node: (
                order.index(node.card.role) if node.card and node.card.role in order else len(order),
                node.card.name if node.card else node.address,
            ),
        )


async def _with_ports(nodes: Sequence[SeenNode], asker: Asker) -> list[SeenNode]:
    async def looked_at(node: SeenNode) -> SeenNode:
        card = node.card
        if card is None or node.silence == "behind NAT":
            return node
        named = {port: number for port, field in PORTS.items() if (number := getattr(card, field))}
        reached = await asyncio.gather(*(asker.reach(card.host, number) for number in named.values()))
        ports: dict[str, Reach] = dict(zip(named, reached, strict=True))
        return msgspec.structs.replace(node, ports=ports)

    return await asyncio.gather(*map(looked_at, nodes))


async def _look_again(seen: Seen, asker: Asker, settled_s: float) -> Seen:
    """Ask those again who do not hear each other yet."""
    deaf = {node.address for nodes in groups_of(seen)[0].values() for pair in unheard(nodes) for node in pair}
    if not deaf:
        return seen
    await asyncio.sleep(max(0.0, settled_s - time.monotonic()))

    async def again(node: SeenNode) -> SeenNode:
        if node.address not in deaf:
            return node
        told = await asker.ask(node, node.card.key if node.card else "")
        return told if told.condition else node

    return msgspec.structs.replace(seen, nodes=await asyncio.gather(*map(again, seen.nodes)))
