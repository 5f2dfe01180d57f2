"""Fetches what peers offer, verifies it, and tells holders what is settled."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import msgspec

from zsfl.aggregator.adoption import Adoption
from zsfl.aggregator.faults import Faults
from zsfl.aggregator.gathering import Gathering, Key
from zsfl.aggregator.holder import Holder, batch_of, parts_of
from zsfl.aggregator.holders import Holders
from zsfl.aggregator.journal import Journal
from zsfl.aggregator.refusals import Refusals
from zsfl.aggregator.roster import Roster
from zsfl.aggregator.stage import Stage
from zsfl.errors import (
    BadShape,
    DeadlineExceeded,
    NoPeer,
    RemoteProtocolError,
    SpillCorrupt,
    StorageError,
    Unavailable,
    ZsflError,
)
from zsfl.ids import Cid, NodeCard, NodeId, PartName, Role, SpillKind, parse_cid
from zsfl.latest import Latest
from zsfl.learning.averaging import Contribution
from zsfl.node import Node
from zsfl.spill.layout import decode_contribution
from zsfl.spill.objects import ObjectStore
from zsfl.wire.fields import MAX_CARRIED_BYTES, MAX_OFFERS
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import CheckNeed, FetchSpills, Recheck, ReleaseSpills, Remake, SpillOffer, Spills

REFUSALS = 3
"""So often a contribution that cannot be counted may come before its step is given up."""
MOST_GONE = 1024
"""Former holders whose names are remembered."""
MOST_REFUSED = 4096
"""Remembered, until those are forgotten that cannot count any more."""


class Collector:
    """Keeps one fetch under way per holder; whatever is wanted meanwhile travels in the next."""

    def __init__(
        self,
        node: Node,
        gathering: Gathering,
        journal: Journal,
        took: Callable[[Contribution], None],
        roster: Latest[Roster],
        refusals: Refusals | None = None,
    ) -> None:
        """`took` is told of every part that is news, once it is in the journal; `roster` touched when one is lost.

        `refusals` say what cannot be counted, and are told of those for which making them again did not help.
        """
        self._node = node
        self._gathering = gathering
        self._journal = journal
        self._took = took
        self._roster = roster
        self._judge = refusals
        self._refusals: Counter[Key] = Counter()
        """Of what may still count, how often it came and could not be counted."""
        self._holders: dict[NodeId, Holder] = {}
        self._gone: dict[NodeId, Holder] = {}
        """Who left what is in the store."""
        self._store: Adoption | None = None
        self._lost: set[tuple[Cid, PartName]] = set()
        """Acknowledged and lost: asked for until they come, or do not count any more."""
        self._remaking: asyncio.Task[None] | None = None
        self._minding: asyncio.Task[None] | None = None
        self._is_full = False
        self._faults = Faults()

    def look_into(self, store: ObjectStore, stage: Stage, holders: Holders) -> None:
        """Have spills read from this store, and what nodes that are gone left there."""
        of = self._gathering, self._roster, holders, self._judge
        self._store = Adoption(self._node, store, stage, *of, self._adopt)

    def joined(self, card: NodeCard) -> None:
        """A peer that may hold spills is there."""
        if not card.data_port:
            return
        self._gone.pop(card.id, None)
        holder = self._holders[card.id] = Holder(card)
        holder.connection = self._node.connect(card, card.data_port)
        holder.task = self._node.start(self._serve(card, holder), f"collect from {card.name}")
        if self._minding is None:
            self._minding = self._node.start(self._mind_halves(), "mind steps that are not whole")
            if self._store is not None:
                self._node.start(self._store.run(), "look for what nodes left")

    def lost(self, card: NodeCard) -> None:
        """A holder is gone, and with it whatever was only offered, unless that is in a store."""
        if holder := self._holders.pop(card.id, None):
            holder.task.cancel()
            holder.connection.close("is gone")
            if self._store is not None:
                self._gone[card.id] = holder
                while len(self._gone) > MOST_GONE:
                    del self._gone[next(iter(self._gone))]
                self._store.lost()
        self._gathering.not_delivered(card.id)

    def _adopt(self, node: NodeId, name: str, offer: SpillOffer, data: Buffer) -> bool:
        """Take what a node left in the store, or has just put there."""
        holder = self._holders.get(node) or self._gone.get(node)
        if holder is None:
            role = Role.CLIENT if offer.part == "client" else Role.SPLIT_SERVER
            name = re.sub(r"[^\w.-]", "?", name) or node
            holder = Holder(NodeCard(id=node, name=name, role=role, host="0.0.0.0", control_port=0))  # noqa: S104  # none
        return self._take(holder, (offer.cid, offer.kind), data, offer)

    async def over(self) -> None:
        """The run is over, and nobody else is there: nothing that is left in the store is of use."""
        if self._store is not None:
            await self._store.clear()

    def offered(self, node: NodeId, offers: Sequence[SpillOffer], carried: Sequence[Buffer] = ()) -> None:
        """A holder offers spills; those in `carried` (in the order of the offers, empty where not) came along."""
        holder = self._holders.get(node)
        if holder is None or not offers:
            return
        if carried and (len(carried) != len(offers) or max(map(len, carried)) > MAX_CARRIED_BYTES):
            raise RemoteProtocolError(f"{node} sends {len(carried)} spills along with {len(offers)} offers")
        sizes = {(offer.cid, offer.kind): offer.size_bytes for offer in offers}
        try:
            for offer, data in zip(offers, carried, strict=False):
                if (
                    data
                    and self._may_hold(holder, offer)
                    and self._gathering.lacks(offer)
                    and self._take(holder, (offer.cid, offer.kind), data, offer)
                ):
                    sizes.pop((offer.cid, offer.kind), None)
            if not sizes:
                return
            left = [offer for offer in offers if (offer.cid, offer.kind) in sizes]
            verdict = self._gathering.offered(node, left, lambda offer: self._may_hold(holder, offer))
        except BadShape as error:
            raise RemoteProtocolError(f"{node} offers what is no spill: {error}") from error
        holder.fetch.update({key: sizes[key] for key in verdict.fetch})
        holder.at |= {key: offer.at for offer in left if offer.at and (key := (offer.cid, offer.kind)) in holder.fetch}
        of = {(offer.cid, offer.kind): offer.members for offer in left if offer.members}
        holder.members.update({key: of[key] for key in verdict.fetch if key in of})
        if (judge := self._judge) is not None:
            for offer in left:
                if (offer.cid, offer.kind) in holder.fetch and (why := judge.too_long(offer)):
                    del holder.fetch[offer.cid, offer.kind]
                    holder.members.pop((offer.cid, offer.kind), None)
                    self._refuse(holder, (offer.cid, offer.kind), offer.part, offer.members, why, judge)
        holder.let_go(verdict.release)
        if holder.fetch or holder.release:
            holder.todo.set()

    def _may_hold(self, holder: Holder, offer: SpillOffer) -> bool:
        """Client parts are with whoever holds the shard, body parts with split servers, and nobody's shard has any."""
        nodes = [self._roster.value.node_of(parse_cid(cid).shard) for cid in offer.members or (offer.cid,)]
        if offer.part == "client":
            return not offer.members and nodes == [holder.card.id]
        return holder.card.role is Role.SPLIT_SERVER and None not in nodes

    async def _serve(self, card: NodeCard, holder: Holder) -> None:
        while True:
            await holder.todo.wait()
            holder.todo.clear()
            while holder.fetch:
                await self._fetch(card, holder, batch_of(holder.fetch))
            if holder.release:
                cids = tuple(sorted(holder.release))
                holder.release.clear()
                await self._release(card, holder, ReleaseSpills(cids=cids))

    async def _fetch(self, card: NodeCard, holder: Holder, keys: list[Key]) -> None:
        try:
            whole = {key for key, data in await self._stored(holder, keys) if self._take(holder, key, data)}
            if rest := tuple(key for key in keys if key not in whole):
                request, deadline_s = FetchSpills(wanted=rest), self._node.settings.request_s
                answer = await holder.connection.request(request, deadline_s=deadline_s)
                whole |= {
                    key
                    for key, data in zip(answer.expect(Spills).found, answer.parts, strict=False)
                    if key in rest and self._take(holder, key, data)  # what was not offered may be anybody's
                }
            await self._remake(holder, [key for key in keys if key not in whole])
        except NoPeer:
            pass  # presence decides whether it is gone; if not, it will offer again
        except ZsflError as error:
            self._complain(card, holder, keys, error)
            if isinstance(error, DeadlineExceeded) and card.role is not Role.CLIENT:
                self._remake_soon(parts_of(holder, keys))
        self._gathering.not_delivered(card.id, keys)
        for key in keys:
            if key not in holder.fetch:
                holder.members.pop(key, None)
                holder.at.pop(key, None)

    async def _stored(self, holder: Holder, keys: Sequence[Key]) -> list[tuple[Key, Buffer]]:
        """Those of these that are in the store; what is not there, the holder may have all the same."""
        if self._store is None or not (wanted := {key: holder.at[key] for key in keys if key in holder.at}):
            return []
        try:
            return await self._store.fetch(holder.card.id, wanted)
        except StorageError as error:
            self._complain(holder.card, holder, list(wanted), error)
            return []

    async def _remake(self, holder: Holder, keys: list[Key]) -> None:
        """What a holder offered and cannot hand over is made again, if it may still count."""
        keys = [key for key in keys if self._gathering.expects(key[0])]
        if not keys:
            return
        deadline_s = self._node.settings.request_s
        answer = await holder.connection.request(Recheck(wanted=tuple(keys)), deadline_s=deadline_s)
        if lost := parts_of(holder, answer.expect(Spills).found):
            others = f" and {len(lost) - 1} others" if len(lost) > 1 else ""
            self._node.note(f"{holder.name} lost its spill of {lost[0][0]}{others}: made again", "warning")
        self._remake_soon(lost)

    async def _mind_halves(self) -> None:
        """Have body parts made again that do not come: it may be that clients alone reach the server that has them."""
        settings, since_s = self._node.settings, dict[Cid, float]()
        while True:
            await asyncio.sleep(settings.beat_s)
            now_s = time.monotonic()
            since_s = {cid: since_s.get(cid, now_s) for cid in self._gathering.halves()}
            late = [cid for cid, at_s in since_s.items() if now_s >= at_s + settings.lost_after_s]
            if late and self._store is not None:  # it may be there, whoever put it
                await self._store.looked()
                late = [cid for cid in self._gathering.halves() if cid in late]
            self._remake_soon([(cid, "body") for cid in late])

    def _remake_soon(self, lost: Sequence[tuple[Cid, PartName]]) -> None:
        if not self._lost.issuperset(lost):
            self._lost.update(lost)
            self._roster.touch()
        if self._lost and (self._remaking is None or self._remaking.done()):
            self._remaking = self._node.start(self._have_remade(), "have lost spills made again")

    @property
    def has_lost(self) -> bool:
        """Whether something that may still count was acknowledged and lost."""
        return any(self._gathering.is_missing(*one) for one in self._lost)

    async def answer(self, request: CheckNeed) -> Spills:
        """Those that are not here and may still count, nor in the store."""
        if self._store is not None and any(self._gathering.may_need(*one) for one in request.parts):
            await self._store.looked()
        return Spills(found=tuple(one for one in request.parts if self._gathering.may_need(*one)))

    async def _have_remade(self) -> None:
        """Ask for what is lost until it is here: a client may be about to take the step in hand, or be away."""
        while self._lost:
            wanted: dict[NodeId | None, list[tuple[Cid, PartName]]] = {}
            for one in sorted(self._lost):
                wanted.setdefault(self._roster.value.node_of(parse_cid(one[0]).shard), []).append(one)
            # All at once: one that does not answer holds up nobody else.
            await asyncio.gather(*(self._ask_for(lost, of) for of, lost in wanted.items() if of is not None))
            await asyncio.sleep(2 * self._node.settings.beat_s)
            self._lost = {one for one in self._lost if self._gathering.is_missing(*one)}

    async def _ask_for(self, lost: list[tuple[Cid, PartName]], of: NodeId) -> None:
        if client := self._holders.get(of):
            with suppress(ZsflError):
                deadline_s = 2 * self._node.settings.lost_after_s
                await client.connection.request(Remake(lost=tuple(lost[:MAX_OFFERS])), deadline_s=deadline_s)

    def _complain(self, card: NodeCard, holder: Holder, keys: list[Key], error: ZsflError) -> None:
        """Say why spills do not come: once each, since they are asked for again as often as they are offered."""
        holder.complained = {key for key in holder.complained if self._gathering.expects(key[0])}
        if holder.complained.issuperset(keys):
            return
        holder.complained.update(keys)
        others = f" and {len(keys) - 1} others" if len(keys) > 1 else ""
        self._node.note(f"{card.name} does not hand over {keys[0][1]} of {keys[0][0]}{others}: {error}", "warning")

    async def _release(self, card: NodeCard, holder: Holder, request: ReleaseSpills) -> None:
        try:
            await holder.connection.request(request, deadline_s=self._node.settings.request_s)
        except Unavailable:
            pass  # it will offer again what it still holds
        except ZsflError as error:
            self._node.note(f"{card.name} does not let go of its spills: {error}", "warning")

    def _take(self, holder: Holder, key: Key, data: Buffer, offer: SpillOffer | None = None) -> bool:
        """Take a spill, unless it is corrupt, or another than was offered; whether it is whole."""
        try:
            found = decode_contribution(data, None if self._judge is None else self._judge.most_bytes)
            kind: SpillKind = "merged" if found.members else found.part
            if (found.cid, kind) != key:
                raise SpillCorrupt(f"it is {kind} of {found.cid} where {key[1]} of {key[0]} was asked for")
            offered = offer.members if offer is not None else holder.members.get(key, ())
            if found.members and tuple(member.cid for member in found.members) != offered:
                raise SpillCorrupt(f"the steps of {key[1]} {key[0]} are others than were offered")
        except Exception as error:
            said = self._faults.said(error)
            self._node.counters.add("spills_corrupt")
            if key not in holder.complained:
                holder.complained.add(key)
                self._node.note(f"{holder.name} handed over a corrupt spill of {key[0]}: {said}", "warning")
            return False
        found = self._named(found, holder)
        try:
            if self._gathering.takes(found):
                if self._judge is not None and (why := self._judge.objection(found)):
                    members = [member.cid for member in found.members]
                    self._refuse(holder, key, found.part, members, why, self._judge)
                    return True
                found = self._journal.keep(found, data)
        except StorageError as error:  # it stays where it is, and is offered again
            if not self._is_full:
                self._node.note(f"contributions wait until they can be kept: {error}", "warning")
            self._is_full = True
            return True
        self._is_full = False
        if self._gathering.arrived(found):
            self._took(found)
        return True

    def _named(self, one: Contribution, holder: Holder) -> Contribution:
        """With the names of who handed it over and who holds the shard, whatever it says: people are told of them."""
        of = [self._roster.value.client_of(parse_cid(cid).shard) for cid in (one.cid, *(m.cid for m in one.members))]
        members = [
            msgspec.structs.replace(member, client=name) for member, name in zip(one.members, of[1:], strict=True)
        ]
        return replace(one, node=holder.name, client=of[0], members=tuple(members))

    def _refuse(
        self, holder: Holder, key: Key, part: PartName, members: Sequence[Cid], why: str, judge: Refusals
    ) -> None:
        """What cannot be counted is made again, by another server if it is a body part; in vain, it is given up."""
        cids = members or [key[0]]
        self._node.counters.add("spills_refused")
        self._gathering.not_delivered(holder.card.id, [key])
        if not self._refusals[key]:
            self._node.note(f"refused what {holder.name} holds of {key[0]}: {why}", "warning")
        self._refusals[key] += 1
        if self._refusals[key] >= REFUSALS:
            del self._refusals[key]
            judge.give_up(cids, why)
        elif part == "body":
            holder.let_go(cids)
            holder.todo.set()
            self._remake_soon([(cid, "body") for cid in cids])
        if len(self._refusals) > MOST_REFUSED:
            self._refusals = Counter({one: n for one, n in self._refusals.items() if self._gathering.expects(one[0])})
