"""A node that only looks: it finds the others as all nodes do, hears their heartbeats, and tells a `Watch`."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace

from zsfl.dashboard.watch import Watch
from zsfl.errors import RemoteProtocolError, root_cause
from zsfl.front import Front
from zsfl.ids import NodeCard, Role
from zsfl.node import BeatExtras, Node, RoleShell
from zsfl.reports import AnyReport, Note
from zsfl.settings import NodeSettings
from zsfl.wire.door import door_for
from zsfl.wire.gatekeeper import kept
from zsfl.wire.messages import Beat, Broadcast, Reply, Request
from zsfl.wire.sockets import open_context


class ObserverRole:
    """Hears everybody, answers nobody."""

    data_port = 0

    def __init__(self, node: Node, watch: Watch, tell: Callable[[Callable[[float], None]], None]) -> None:
        """`tell` calls, where the watch is used, what it is given with the time."""
        self._node = node
        self._watch = watch
        self._tell = tell
        self.hears = frozenset(Role) - {Role.OBSERVER}

    async def run(self) -> None:
        """Look until cancelled."""
        await asyncio.get_running_loop().create_future()

    async def drain(self, timeout_s: float) -> None:
        """There is nothing to finish."""

    async def control(self, request: Request) -> Reply:
        """An observer answers nothing but HELLO."""
        raise RemoteProtocolError(f"{self._node.name} only looks, and does not answer {type(request).__name__}")

    def joined(self, card: NodeCard) -> None:
        """A peer is there."""
        if card.role in self.hears:
            self._tell(lambda now_s: self._watch.joined(card, now_s))

    def lost(self, card: NodeCard, reason: str) -> None:
        """A peer is gone."""
        if card.role in self.hears:
            self._tell(lambda now_s: self._watch.lost(card, reason, now_s))

    def heard(self, broadcast: Broadcast) -> None:
        """A peer said something."""
        if isinstance(broadcast, Beat):
            self._tell(lambda now_s: self._watch.said(broadcast, now_s))

    def beat(self) -> BeatExtras:
        """It has nothing to add."""
        return BeatExtras()


@asynccontextmanager
async def observing(
    settings: NodeSettings,
    facts: Mapping[str, str],
    note: Callable[[str], None],
    is_new: Callable[[], None],
    watch: Watch | None = None,
) -> AsyncGenerator[Watch, None]:
    """What is seen, from now on; `is_new` is called whenever that changes. A `watch` that is given sees on.

    Of the job only those `facts` have to agree that are given: its `name`, without which mDNS finds nobody. Several may
    look at once, so that each has a name of its own, and they do not show one another.
    """
    watch, loop = watch or Watch(settings.beat_s), asyncio.get_running_loop()
    # In a container of a node the environment has that node's own port.
    settings = replace(settings, mdns=settings.mdns and "name" in facts, port=0)

    def report(said: AnyReport) -> None:
        if isinstance(said, Note):
            note(said.message)

    def tell(of: Callable[[float], None]) -> None:
        def told() -> None:
            of(time.monotonic())
            is_new()

        loop.call_soon_threadsafe(told)

    door = door_for(settings, "observer", note)
    context = open_context(settings.io_threads)
    with kept(context, door):
        front = Front(
            Role.OBSERVER, name=f"observer-{secrets.token_hex(3)}", settings=settings, facts=facts, codecs=(),
            report=report, context=context, door=door,
        )  # fmt: skip

        async def make(node: Node) -> RoleShell:
            return ObserverRole(node, watch, tell)

        try:
            async with asyncio.TaskGroup() as tasks:
                looking = tasks.create_task(front.run(make))
                yield watch
                looking.cancel()
        except BaseExceptionGroup as group:
            raise root_cause(group) from group
        finally:
            context.destroy(linger=0)


async def changed_within(news: asyncio.Event, seconds: float) -> None:
    """Wait for news, for so long at most."""
    news.clear()
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            await news.wait()
    except TimeoutError:
        pass
