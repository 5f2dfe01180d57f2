"""Fetches what peers offer, verifies it, and tells holders what is settled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import torch

from zsfl.aggregator.gathering import Gathering, Key
from zsfl.errors import BadShape, NoPeer, RemoteProtocolError, SpillCorrupt, Unavailable, ZsflError
from zsfl.ids import Cid, NodeCard, NodeId
from zsfl.learning.averaging import Contribution
from zsfl.node import Node
from zsfl.spill.layout import SpillMeta, decode
from zsfl.wire.connection import Connection
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import MAX_OFFERS, FetchSpills, ReleaseSpills, SpillOffer, Spills

FETCH_BYTES = 64 << 20
"""Asked for in one request, unless a single spill is larger: bounds the memory of a reply."""


class _Holder:
    """One peer that holds spills."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.fetch: dict[Key, int] = {}
        self.release: set[Cid] = set()
        self.complained: set[Key] = set()
        """Of the version that is gathered: it was said why they do not come."""
        self.todo = asyncio.Event()
        self.task: asyncio.Task[None]


class Collector:
    """Keeps one fetch under way per holder; whatever is wanted meanwhile travels in the next."""

    def __init__(self, node: Node, gathering: Gathering, took: Callable[[SpillMeta], None]) -> None:
        """`took` is told of every part that is news."""
        self._node = node
        self._gathering = gathering
        self._took = took
        self._holders: dict[NodeId, _Holder] = {}

    def joined(self, card: NodeCard) -> None:
        """A peer that may hold spills is there."""
        if not card.data_port:
            return
        holder = _Holder(self._node.connect(card, card.data_port))
        self._holders[card.id] = holder
        holder.task = self._node.start(self._serve(card, holder), f"collect from {card.name}")

    def lost(self, card: NodeCard) -> None:
        """A holder is gone, and with it whatever was only offered."""
        if holder := self._holders.pop(card.id, None):
            holder.task.cancel()
            holder.connection.close("is gone")
        self._gathering.not_delivered(card.id)

    def offered(self, node: NodeId, offers: Sequence[SpillOffer]) -> None:
        """A holder offers spills."""
        holder = self._holders.get(node)
        if holder is None or not offers:
            return
        sizes = {(offer.cid, offer.part): offer.size_bytes for offer in offers}
        try:
            verdict = self._gathering.offered(node, offers)
        except BadShape as error:
            raise RemoteProtocolError(f"{node} offers what is no spill: {error}") from error
        holder.fetch.update({key: sizes[key] for key in verdict.fetch})
        holder.release.update(verdict.release)
        if holder.fetch or holder.release:
            holder.todo.set()

    async def _serve(self, card: NodeCard, holder: _Holder) -> None:
        while True:
            await holder.todo.wait()
            holder.todo.clear()
            while holder.fetch:
                await self._fetch(card, holder, _batch(holder.fetch))
            if holder.release:
                cids = tuple(sorted(holder.release))[:MAX_OFFERS]
                holder.release.clear()  # what is still held will be offered again by the next heartbeat
                await self._release(card, holder, ReleaseSpills(cids=cids))

    async def _fetch(self, card: NodeCard, holder: _Holder, keys: list[Key]) -> None:
        request = FetchSpills(wanted=tuple(keys))
        try:
            answer = await holder.connection.request(request, deadline_s=self._node.settings.request_s)
            for key, data in zip(answer.expect(Spills).found, answer.parts, strict=False):
                await self._take(card, key, data)
        except NoPeer:
            pass  # presence decides whether it is gone; if not, it will offer again
        except ZsflError as error:
            self._complain(card, holder, keys, error)
        self._gathering.not_delivered(card.id, keys)

    def _complain(self, card: NodeCard, holder: _Holder, keys: list[Key], error: ZsflError) -> None:
        """Say why spills do not come: once each, since they are asked for again as often as they are offered."""
        holder.complained = {key for key in holder.complained if self._gathering.expects(key[0])}
        if holder.complained.issuperset(keys):
            return
        holder.complained.update(keys)
        others = f" and {len(keys) - 1} others" if len(keys) > 1 else ""
        self._node.note(f"{card.name} does not hand over {keys[0][1]} of {keys[0][0]}{others}: {error}", "warning")

    async def _release(self, card: NodeCard, holder: _Holder, request: ReleaseSpills) -> None:
        try:
            await holder.connection.request(request, deadline_s=self._node.settings.request_s)
        except Unavailable:
            pass  # it will offer again what it still holds
        except ZsflError as error:
            self._node.note(f"{card.name} does not let go of its spills: {error}", "warning")

    async def _take(self, card: NodeCard, key: Key, data: Buffer) -> None:
        try:
            meta, tensors = decode(data)
            if (meta.cid, meta.part) != key:
                raise SpillCorrupt(f"it is {meta.part} of {meta.cid} where {key[1]} of {key[0]} was asked for")
        except SpillCorrupt as error:
            self._node.counters.add("spills_corrupt")
            self._node.note(f"{card.name} handed over a corrupt spill: {error}", "warning")
            return
        if self._gathering.arrived(contribution(meta, tensors)):
            self._took(meta)


def _batch(wanted: dict[Key, int]) -> list[Key]:
    """Take keys out of `wanted` until their bytes fill one request."""
    keys: list[Key] = []
    room = FETCH_BYTES
    for key, size in list(wanted.items()):
        if keys and (size > room or len(keys) == MAX_OFFERS):
            break
        keys.append(key)
        room -= wanted.pop(key)
    return keys


def contribution(meta: SpillMeta, tensors: Mapping[str, torch.Tensor]) -> Contribution:
    """A spill as the averaging takes it."""
    grads, buffers = (
        {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
        for kind in ("grad/", "buffer/")
    )
    return Contribution(
        cid=meta.cid,
        part=meta.part,
        version=meta.version,
        n=meta.n,
        loss_sum=meta.loss_sum,
        samples=meta.samples,
        grads=grads,
        buffers=buffers,
        node=meta.node,
    )
