"""What a client and a split server share: one aggregator whose versions they follow, and spills they offer it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zsfl.errors import NoPeer, RemoteProtocolError, RunFailed, StorageError, Unavailable
from zsfl.ids import Cid, NodeCard, PartName, Role, RunId, Version, parse_cid
from zsfl.latest import Latest
from zsfl.lease import Candidate, Promise, clock_s
from zsfl.node import STATE_TOPIC, Node
from zsfl.reports import Following
from zsfl.spill.coded import SpillCoder
from zsfl.spill.index import Key
from zsfl.spill.objects import store_for
from zsfl.spill.store import SpillStore
from zsfl.spill.stored import NOT_DELETED, StoredSpills
from zsfl.weights.follower import WeightsFollower
from zsfl.wire.fields import MAX_CARRIED_BYTES, MAX_OFFERS
from zsfl.wire.framing import Buffer
from zsfl.wire.holding import Holder, WhoHolds
from zsfl.wire.messages import (
    Announcement,
    Beat,
    Broadcast,
    CheckNeed,
    FetchSpills,
    Offers,
    Ok,
    Recheck,
    ReleaseSpills,
    Reply,
    Request,
    RunState,
    SpillOffer,
    Spills,
)
from zsfl.wire.succession import Grant, Granted
from zsfl.words import number_of

Answer = tuple[Reply, Sequence[Buffer]]
OFFERS_BYTES = 256 << 10
"""Spills that travel with one digest of offers: they fit one frame."""
NOT_PUT = "steps are refused until their spills can be written"
PROGRESS_S = 1.0
"""How often a member says at most how far the run is."""
COUNTERS_S = 0.05
"""How often digests of offers tell the node's counters too."""


class Member:
    """Membership in a run: its state, its weights, and what this node contributes to it."""

    def __init__(
        self,
        node: Node,
        weights: Collection[WeightsFollower[Any]],
        spills: Path,
        coder: SpillCoder | None = None,
    ) -> None:
        """`weights` follow the same aggregator; `spills` is where these go, unless the settings name a store, and
        `coder` packs them.
        """
        self._node = node
        self.state: Latest[RunState | None] = Latest(None)
        self.aggregator: Latest[NodeCard | None] = Latest(None)
        self._weights = weights
        self._listening: asyncio.Task[None] | None = None
        limit_bytes = node.settings.spill_mib << 20
        store = store_for(node.settings, node.facts["name"]) if node.settings.spill else None
        self.spills = (
            SpillStore(spills, coder, limit_bytes)
            if store is None
            else StoredSpills(store, node, coder, limit_bytes, trouble=self._cannot)
        )
        self.promise = Promise(clock_s(), node.settings.lost_after_s)
        self.followed = 0
        """How often this node began to follow an aggregator: what an earlier one asked for is asked anew."""
        self._run: RunId | None = None
        """The run whose spills count."""
        self._former: set[RunId] = set()
        self._new: list[SpillOffer] = []
        """Put in this turn of the event loop."""
        self._told_s = 0.0
        self._progress_s = -math.inf
        self._troubles: set[str] = set()
        """What the disk refuses, and was said to."""
        self.deleted: list[Callable[[], None]] = []
        """To be called whenever spills were deleted."""
        self.following: list[Callable[[], None]] = []
        """To be called whenever another aggregator is followed, or the same one again."""

    @property
    def run(self) -> RunId | None:
        """The run whose spills count; None before one has begun."""
        return self._run

    async def aclose(self) -> None:
        """Let go of the spills' files, which stay; to be called when the role ends."""
        await self.spills.aclose()

    def joined(self, card: NodeCard) -> None:
        """Follow the first aggregator there is."""
        if card.role is not Role.AGGREGATOR:
            return
        if self.aggregator.value is None:
            ear = self._node.listen(card, [STATE_TOPIC], lambda broadcast, _: self.heard(broadcast))
            self._listening = self._node.start(ear.run(), f"state of {card.name}")
            for follower in self._weights:
                follower.follow(card)
            self.followed += 1
            self.aggregator.set(card)
            for call in self.following:
                call()
        else:
            self._node.note(f"{card.name} is a second aggregator; staying with {self.aggregator.value.name}", "warning")

    def lost(self, card: NodeCard, reason: str) -> None:
        """Follow another aggregator, if there is one, when this was ours."""
        if self.aggregator.value is None or card.id != self.aggregator.value.id:
            return
        self._leave(card, f"is gone: {reason}")
        for other in self._node.peers(Role.AGGREGATOR):
            self.joined(other)
            return

    def _leave(self, card: NodeCard, why: str) -> None:
        """Follow this aggregator no more."""
        if self.state.value is None or self.state.value.phase not in ("finished", "failed"):
            self._node.note(f"{card.name} {why}", "warning")
        if self._listening is not None:
            self._listening.cancel()
        for follower in self._weights:
            follower.unfollow()
        self.state.set(None)
        self.aggregator.set(None)

    def heard(self, broadcast: Broadcast) -> None:
        """Take over what the aggregator says of the run; release what its commit names."""
        ours = self.aggregator.value
        match broadcast:
            case Beat(state=RunState() as state) if ours and broadcast.card.id == ours.id:
                if state != self.state.value and state.epoch >= self.promise.epoch:
                    self._take(state)
            case Beat(state=RunState() as state) if ours:
                self._mind_successor(ours, broadcast.card, state)
            case Announcement() if ours and broadcast.node == ours.id and broadcast.state.epoch >= self.promise.epoch:
                self._take(broadcast.state)
                self._release((*broadcast.counted, *broadcast.dropped))
            case _:
                pass

    def _mind_successor(self, ours: NodeCard, other: NodeCard, state: RunState) -> None:
        """Follow another aggregator that has taken over, though ours is there still, or again."""
        known = self.state.value
        if other.role is Role.AGGREGATOR and state.epoch > (0 if known is None else known.epoch):
            self._leave(ours, f"is succeeded by {other.name}")
            self.joined(other)

    def _take(self, state: RunState) -> None:
        """Take part in this run; once it has begun, nothing that was made for another one counts any more.

        Before, it may still turn out to be a second aggregator's.
        """
        known = self.state.value
        if known is not None and known.run == state.run and state.serial <= known.serial:
            return
        self.promise.heard_of(state.epoch, state.version)
        self.state.set(state)
        self._say_progress(state)
        if state.phase == "finished":
            self._node.note(f"the run is finished, at version {state.version}")
            # All that counts is recorded: a second copy of a step is of no use any more.
            self._release([cid for offer in self.pending() for cid in offer.members or (offer.cid,)])
        if state.phase == "waiting" or state.run == self._run:
            return
        if self._run is not None:
            self._former.add(self._run)
        self._former.discard(state.run)
        self._run = state.run
        with self._deleting():
            if deleted := self.spills.keep_only(state.run):
                what = "of another run or an earlier start: what they were of is made again"
                self._node.note(f"deleted {number_of(deleted, 'spill')} {what}")

    def _say_progress(self, state: RunState) -> None:
        now_s = time.monotonic()
        if state.phase == "training" and now_s >= self._progress_s + PROGRESS_S:
            self._progress_s = now_s
            self._node.report(
                Following(
                    node=self._node.name,
                    round=state.round + 1,
                    rounds=state.rounds,
                    window=state.window,
                    windows=state.windows,
                    version=state.version,
                )
            )

    async def until_aggregator(self, *, other_than: NodeCard | None) -> NodeCard:
        """The aggregator that this node follows, once it is not `other_than`; NoPeer when none comes in time."""
        settings = self._node.settings
        if self.aggregator.value is None:
            allowed_s = settings.join_s if other_than is None else settings.patience_s
            try:
                with self._node.waiting("an aggregator", lambda: self._node.hints_of_gone(Role.AGGREGATOR)):
                    async with asyncio.timeout(allowed_s):
                        await self.aggregator.wait_for(lambda now: now is not None)
            except TimeoutError:
                raise NoPeer(
                    f"no aggregator came within {allowed_s:g} s; start one with: zsfl node aggregator JOB"
                ) from None
        found = await self.aggregator.wait_for(lambda now: now is None or now != other_than)
        return found if found is not None else await self.until_aggregator(other_than=other_than)

    def offer(self, spilled: SpillOffer) -> asyncio.Future[None] | None:
        """Tell the aggregator of a spill once it is in place; heartbeats repeat it until it is released.

        What to wait for until it is in place, before it is acknowledged; None where it is.
        """
        placing = self.spills.placing(spilled)
        if placing is None:
            self._offer(spilled)
        else:
            placing.add_done_callback(lambda done: done.exception() or self._offer(spilled))
        return placing

    def _offer(self, spilled: SpillOffer) -> None:
        self._troubles.discard(NOT_PUT)
        if self._former and parse_cid(spilled.cid).run in self._former:  # its step was under way when the run changed
            self._release(spilled.members or (spilled.cid,))
            return
        self._node.counters.add("spills")
        self._node.counters.add("spilled_bytes", spilled.size_bytes)
        self._new.append(self.spills.as_held(spilled))
        if len(self._new) == 1:
            asyncio.get_running_loop().call_soon(self._say_new)

    def _say_new(self) -> None:
        """Offer what was put in one turn of the loop together, the small ones with their bytes."""
        new, self._new = self._new, []
        offers: list[SpillOffer] = []
        carried: list[bytes] = []
        room = OFFERS_BYTES
        for offer in new:
            data = self.spills.fresh((offer.cid, offer.kind)) or b""
            data = data if len(data) <= MAX_CARRIED_BYTES else b""
            if len(offers) == MAX_OFFERS or len(data) > room:
                self._say(offers, carried)
                offers, carried, room = [], [], OFFERS_BYTES
            offers.append(offer)
            carried.append(data)
            room -= len(data)
        self._say(offers, carried)

    def _say(self, offers: Sequence[SpillOffer], carried: Sequence[bytes]) -> None:
        now_s = time.monotonic()
        counters: dict[str, float] = {}
        if now_s >= self._told_s + COUNTERS_S:
            counters, self._told_s = self._node.counted(), now_s
        digest = Offers(node=self._node.card.id, offers=tuple(offers), counters=counters)
        self._node.publish(digest, carried if any(carried) else ())

    def pending(self) -> tuple[SpillOffer, ...]:
        """The spills held, oldest first, for heartbeats."""
        state = self.state.value
        return () if state is None else tuple(self.spills.offers(state.run))

    def answer(self, request: Request) -> Answer | Awaitable[Answer]:
        """Answer what an aggregator asks of a holder of spills."""
        match request:
            case FetchSpills():
                found = self.spills.read_all(request.wanted)
                return _handed(found) if isinstance(found, list) else _when_read(found)
            case Recheck():
                gone = self.spills.set_aside_all(request.wanted)
                return self._said_lost(gone) if isinstance(gone, list) else self._when_rechecked(gone)
            case ReleaseSpills():
                self._release(request.cids)
                return Ok(), ()
            case _:
                raise RemoteProtocolError(f"{self._node.name} does not answer {type(request).__name__}")

    def _said_lost(self, gone: Sequence[Key]) -> Answer:
        self._node.counters.add("spills_lost", len(gone))
        return Spills(found=tuple(gone)), ()

    async def _when_rechecked(self, gone: Awaitable[Sequence[Key]]) -> Answer:
        return self._said_lost(await gone)

    async def needed(self, parts: Sequence[tuple[Cid, PartName]]) -> list[tuple[Cid, PartName]]:
        """Those that the aggregator has not got, and that may still count; Unavailable when it does not say."""
        aggregator = self.aggregator.value
        if aggregator is None:
            raise NoPeer("there is no aggregator to ask")
        found: list[tuple[Cid, PartName]] = []
        for first in range(0, len(parts), MAX_OFFERS):
            request = CheckNeed(parts=tuple(parts[first : first + MAX_OFFERS]))
            answer = await self._node.link(aggregator).request(request, deadline_s=self._node.settings.request_s)
            wanted: set[tuple[str, str]] = set(answer.expect(Spills).found)
            found += [one for one in parts[first : first + MAX_OFFERS] if one in wanted]
        return found

    async def holder_of(self, shard: int) -> str:
        """The key of the machine that holds a shard, empty where none does; Unavailable when nobody can say."""
        aggregator = self.aggregator.value
        if aggregator is None:
            raise NoPeer(f"there is no aggregator to ask who holds shard {shard}")
        link, deadline_s = self._node.link(aggregator), self._node.settings.request_s
        return (await link.request(WhoHolds(shard=shard), deadline_s=deadline_s)).expect(Holder).key

    @property
    def is_rid(self) -> bool:
        """Whether nothing is held that an aggregator who is there may still release."""
        return self.aggregator.value is None or not self.pending()

    async def has_handed_over(self) -> bool:
        """Whether nothing is held here that an aggregator who is there has not got, and may still count."""
        parts: list[tuple[Cid, PartName]]
        parts = [(cid, offer.part) for offer in self.pending() for cid in offer.members or (offer.cid,)]
        if not parts or self.aggregator.value is None:
            return True
        try:
            return not await self.needed(parts)
        except Unavailable:
            return self.aggregator.value is None

    def _release(self, cids: Sequence[Cid]) -> None:
        if cids and any(self.spills.holds(cid) for cid in cids):
            with self._deleting():
                self.spills.release(cids)

    @contextmanager
    def _deleting(self) -> Generator[None, None, None]:
        """Spills are settled, whether or not the disk lets go of them."""
        try:
            yield
        except StorageError as error:
            self.in_trouble(NOT_DELETED, error)
        else:
            self._troubles.discard(NOT_DELETED)
        for call in self.deleted:
            call()

    def promised(self, grant: Grant, shards: Sequence[int]) -> Granted:
        """Follow nobody else for so long, if that can be promised for these shards."""
        by = Candidate(
            holder=grant.holder, name=grant.name, epoch=grant.epoch, known=grant.known, version=grant.version
        )
        epoch, version = self.promise.newest
        refused = self.promise.ask(by, grant.lease_s, clock_s())
        return Granted(
            shards=tuple(shards),
            refused=refused,
            lease_s=min(grant.lease_s, self._node.settings.lost_after_s),
            epoch=self.promise.epoch,
            newest=(epoch, Version(version)),
        )

    def _cannot(self, what: str, error: StorageError | None) -> None:
        if error is None:
            self._troubles.discard(what)
        else:
            self.in_trouble(what, error)

    def in_trouble(self, what: str, error: StorageError) -> None:
        """Say what the disk, or the store, refuses, once until it does not any more."""
        if what not in self._troubles:
            self._troubles.add(what)
            self._node.note(f"{what}: {error}", "warning")

    def check(self, state: RunState) -> bool:
        """Whether the run is over; RunFailed when it failed."""
        if state.phase == "failed":
            raise RunFailed(state.reason)
        return state.phase == "finished"


def _handed(found: Sequence[tuple[Key, bytes]]) -> Answer:
    return Spills(found=tuple(key for key, _ in found)), [data for _, data in found]


async def _when_read(found: Awaitable[Sequence[tuple[Key, bytes]]]) -> Answer:
    return _handed(await found)
