"""mDNS by zeroconf: announce this node, and turn what others announce into candidates.

A hint only (DESIGN M1): notices of removal are ignored, for presence is decided by heartbeats.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from types import TracebackType
from typing import Self

import zeroconf as zc
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from zsfl.discovery.announced import Announcement, Recogniser, opaque
from zsfl.discovery.events import Candidate
from zsfl.errors import Unavailable
from zsfl.ids import Address, NodeCard, NodeId

SERVICE = "_zsfl._tcp.local."
MAX_RESOLVING = 256
"""Names looked up at once; a further one is ignored and counted."""
MAX_QUEUED = 1024
"""Candidates not yet taken from `events()`; a further one is ignored and counted."""
MAX_OTHERS = 64
"""Addresses of other jobs and protocols kept for people to see."""
RESOLVE_S = 3.0
ASKING = zc.DNSQuestionType.QM
"""For answers by multicast. Others go to whichever process of this machine comes first, so that one waits for more."""
GOODBYE_S = 1.0


def read_announcement(info: zc.ServiceInfo) -> Announcement | None:
    """What a resolved service says of itself; None when it is not one of ours or makes no sense."""
    try:
        job_hash = (info.properties[b"job"] or b"").decode()
        node_id = info.name.partition(".")[0]
        host = ipaddress.IPv4Address(info.addresses_by_version(zc.IPVersion.V4Only)[0])
    except (KeyError, ValueError, IndexError):
        return None
    usable = not (host.is_unspecified or host.is_multicast) and info.port
    if not usable or not node_id or not (node_id + job_hash).isprintable():
        return None
    return Announcement(address=Address(f"{host}:{info.port}"), node_id=NodeId(node_id), job_hash=job_hash)


class Mdns:
    """Announces `card` while open, on the interface of `card.host` alone, and hears the other nodes there.

    Raises `Unavailable` on entry where mDNS cannot work.
    """

    def __init__(
        self, card: NodeCard, job: str, protocol: int, keys: Callable[[], Iterable[str]] = lambda: ("",)
    ) -> None:
        """`keys` are those of the machines whose nodes may be peers; one that is empty stands for no keys."""
        self._card = card
        self._job = job
        self._protocol = protocol
        self._ours = Recogniser(job, protocol, keys)
        self._strangers: dict[Address, Announcement] = {}
        self._found: asyncio.Queue[Candidate] = asyncio.Queue(MAX_QUEUED)
        self._resolving: set[asyncio.Task[None]] = set()
        self._running: AbstractAsyncContextManager[None] | None = None
        self.others: dict[Address, str] = {}
        """Nodes that cannot be peers, as text for whoever waits in vain."""
        self.ignored = 0
        """Announcements that were malformed, not resolved in time, or beyond a bound."""

    async def events(self) -> AsyncIterator[Candidate]:
        """Every other node of this job, whenever it is announced; ends only by cancellation."""
        while True:
            yield await self._found.get()

    async def __aenter__(self) -> Self:
        self._running = self._run()
        await self._running.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._running is not None  # noqa: S101  # for the type alone
        await self._running.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def _run(self) -> AsyncGenerator[None, None]:
        async with open_network(self._card.host) as network:
            announcing = await announce(network, self._service())
            browser = AsyncServiceBrowser(network.zeroconf, SERVICE, handlers=[self._on_change], question_type=ASKING)
            try:
                yield
            finally:
                await browser.async_cancel()
                tasks: list[asyncio.Future[None]] = [announcing, *self._resolving]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _service(self) -> zc.ServiceInfo:
        card = self._card
        about = {"job": opaque(card.id, self._job, self._protocol, card.role, card.key)}
        return zc.ServiceInfo(
            SERVICE,
            f"{card.id}.{SERVICE}",
            port=card.control_port,
            properties=about,
            server=f"{card.id}.local.",
            parsed_addresses=[card.host],
        )

    def _on_change(
        self, zeroconf: zc.Zeroconf, service_type: str, name: str, state_change: zc.ServiceStateChange
    ) -> None:
        if state_change is zc.ServiceStateChange.Removed or name == f"{self._card.id}.{service_type}":
            return
        if len(self._resolving) >= MAX_RESOLVING:
            self.ignored += 1
            return
        task = asyncio.create_task(self._resolve(zeroconf, name))
        self._resolving.add(task)
        task.add_done_callback(self._resolving.discard)

    async def _resolve(self, zeroconf: zc.Zeroconf, name: str) -> None:
        announcement = await resolved(zeroconf, name)
        if announcement is None:
            self.ignored += 1
        else:
            self._take(announcement)

    def _take(self, seen: Announcement) -> None:
        if seen.node_id == self._card.id:
            return
        known = self._ours.candidate(seen, "mdns")
        if isinstance(known, str):
            if seen.address in self.others or len(self.others) < MAX_OTHERS:
                self.others[seen.address] = f"mDNS sees a node {known} at {seen.address}"
                self._strangers[seen.address] = seen
            else:
                self.ignored += 1
            return
        self.others.pop(seen.address, None)
        self._strangers.pop(seen.address, None)
        try:
            self._found.put_nowait(known)
        except asyncio.QueueFull:
            self.ignored += 1

    def look_again(self) -> None:
        """Other keys are trusted now: whom that makes a candidate."""
        for seen in list(self._strangers.values()):
            self._take(seen)


async def resolved(zeroconf: zc.Zeroconf, name: str) -> Announcement | None:
    """What the node that is announced by this name says of itself; None where it says nothing, or makes no sense."""
    try:
        info = AsyncServiceInfo(SERVICE, name)
        told = await info.async_request(zeroconf, RESOLVE_S * 1000, ASKING)
    except zc.Error:
        return None
    return read_announcement(info) if told else None


@asynccontextmanager
async def open_network(*hosts: str) -> AsyncGenerator[AsyncZeroconf, None]:
    """An open zeroconf on the interfaces that have these IPv4 addresses; Unavailable where there can be none."""
    try:
        addresses = [str(ipaddress.IPv4Address(host)) for host in hosts]
        for address in addresses:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as trial:
                # zeroconf leaks its listening socket when the address is not one of this machine.
                trial.bind((address, 0))
        network = AsyncZeroconf(interfaces=addresses, ip_version=zc.IPVersion.V4Only)
    except (ValueError, OSError) as error:
        raise _unavailable(", ".join(hosts), str(error)) from error
    try:
        await _started(network, ", ".join(hosts))
        yield network
    finally:
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(GOODBYE_S):
                    await network.async_unregister_all_services()
        finally:
            await network.async_close()


async def announce(network: AsyncZeroconf, service: zc.ServiceInfo) -> asyncio.Future[None]:
    """Begin to announce a service."""
    # The name is unique, so nobody is asked for it first: probing takes about a second.
    register = network.async_register_service  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    sending: Awaitable[None] = await register(service, cooperating_responders=True)  # pyright: ignore[reportUnknownVariableType]
    return asyncio.ensure_future(sending)


async def _started(network: AsyncZeroconf, host: str) -> None:
    try:
        await network.zeroconf.async_wait_for_start()
    except zc.NotRunningException as error:
        raise _unavailable(host, "its sockets did not open") from error
    if not network.zeroconf.engine.senders:
        raise _unavailable(host, "its interface has no multicast")


def _unavailable(host: str, why: str) -> Unavailable:
    return Unavailable(f"mDNS cannot work on {host}: {why}; name another node with --peer host:port instead")
