"""The right of an aggregator to commit, once somebody stands by who might take over."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from zsfl.aggregator.consent import Consent
from zsfl.aggregator.holders import Holders
from zsfl.aggregator.mirror import Source
from zsfl.aggregator.stage import Stage
from zsfl.aggregator.standing import Standing
from zsfl.errors import ConfigError, Fenced, RunFailed, StorageError
from zsfl.ids import NodeCard, NodeId, Role, Version
from zsfl.latest import Latest
from zsfl.lease import Lease, clock_s, most_of
from zsfl.node import Node
from zsfl.ranges import parse_shards
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import Beat, Committed, Reply, Request
from zsfl.wire.succession import FetchPiece, Follow, Grant, Granted
from zsfl.words import number_of

MIN_RENEWAL_S = 0.05
COPYING_S = 2.0
"""Whoever stands by and has asked for nothing so long does not copy any more."""
TOLD_LEASES = 2.0
"""How long it counts, in leases, that a client said that a later epoch has begun: it may be gone, or know better."""
RENEWALS = 4
"""How often a lease is renewed in its time."""


@dataclass(frozen=True, slots=True)
class _Aim:
    """A later epoch for whose promises the clients are asked, before it is led in."""

    epoch: int
    lease: Lease
    begun_s: float


class Reign:
    """Renews the promises of the clients, and knows how far those who stand by have come."""

    def __init__(self, node: Node, folder: Path, stage: Stage, *, shards: int, bound: int) -> None:
        """`bound`: how many versions a contribution may be late."""
        self._node = node
        self._folder = folder
        self._stage = stage
        self._shards = shards
        self._standing = Standing.of(folder)
        self._source = Source(folder, bound)
        self.holders = Holders(
            self._standing.holders,
            keyed=bool(node.card.key),
            most=node.settings.clients_per_key,
            reassign=parse_shards(node.settings.reassign, shards) if node.settings.reassign else (),
            trusts=lambda key: node.trusts(key, Role.CLIENT),
        )
        self._consent = Consent(node, self.holders)
        self._lease = Lease(shards)
        """Of the promises in whatever epoch: nobody else can be given that time."""
        aim = self._standing.aim
        # What an earlier process asked for, and may have been given, nobody else has.
        self._aim = _Aim(aim, Lease(shards), clock_s()) if aim > self._standing.epoch else None
        self._is_alone = node.settings.takeover == "always"
        """Nobody's consent is needed: a later epoch is all that ends an earlier one."""
        self._followers: Latest[dict[NodeId, Version]] = Latest({})
        """Of those who stand by, the newest version that each has."""
        self._promised = Latest(None)
        self._version = stage.state.version
        self._is_leaving = False
        """It gave up its lease, and records nothing more."""
        self._copied_s = -math.inf
        """When somebody who stands by asked for something last."""

    def begin(self, version: Version) -> None:
        """The run is at this version; blocking."""
        self._version = version
        self._keep(led=True, origin=self._standing.origin or self._standing.holder)

    def _keep(self, **changes: object) -> None:
        standing = msgspec.structs.replace(self._standing, **changes)
        if standing != self._standing or not standing.shared:
            standing.keep(self._folder)
        self._standing = standing
        self._stage.place(epoch=standing.epoch)

    # --- the lease --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Renew the lease, while there is one; Fenced when another has taken over."""
        while True:
            await self._followers.wait_for(lambda now: (bool(now) or self._standing.shared) and not self._is_leaving)
            if not self._standing.epoch:
                await self._node.persistently(lambda: self._keep(epoch=1))
            while await self._renew():
                pass
            if not self._standing.shared and self._lease.is_held(clock_s()):
                await self._node.persistently(lambda: self._keep(shared=True))
                self._node.note("another aggregator stands by, and may take over from now on")
            lasts_s = self._lease.lasts_s(clock_s()) or self._node.settings.lost_after_s
            await asyncio.sleep(max(MIN_RENEWAL_S, min(lasts_s, self._node.settings.lost_after_s) / RENEWALS))

    def _grant(self, lease_s: float) -> Grant:
        return Grant(
            holder=self._standing.holder,
            name=self._node.name,
            epoch=self._aim.epoch if self._aim else self._standing.epoch,
            known=self._standing.epoch,
            version=self._version,
            lease_s=lease_s,
        )

    async def _renew(self) -> bool:
        """Ask once; whether to do so again at once, in a later epoch."""
        asked_s, aim, lease_s = clock_s(), self._aim, self._node.settings.lost_after_s
        leases = (self._lease, aim.lease) if aim else (self._lease,)

        def took(answers: Sequence[Granted]) -> None:
            for lease in leases:
                lease.answered(answers, asked_s)
            self._promised.touch()

        await self._consent.ask(self._grant(lease_s), took, all_=self._is_alone and aim is not None)
        now_s = clock_s()
        if self._lease.is_succeeded(self._standing.epoch, now_s - TOLD_LEASES * lease_s, now_s, alone=self._is_alone):
            self._fenced()
        if aim is None:
            return await self._aim_beyond(self._standing.epoch, now_s)
        if aim.lease.is_held(now_s) or (self._is_alone and not aim.lease.is_contested(asked_s, now_s)):
            await self._node.persistently(lambda: self._keep(epoch=aim.epoch))
            self._aim = None
        elif now_s >= aim.begun_s + lease_s:  # by then whoever would answer has
            return await self._aim_beyond(aim.epoch - 1, now_s)
        return False

    async def _aim_beyond(self, epoch: int, now_s: float) -> bool:
        """Where clients know of a later epoch than this, ask for one after that from now on; whether it is so.

        They promised it to somebody who never led in it, and would hear nothing that is said before. An epoch that most
        have promised nobody else can have.
        """
        if (later := self._lease.epoch_for_all(epoch)) == epoch:
            return False
        await self._node.persistently(lambda: self._keep(aim=later))
        self._aim = _Aim(later, Lease(self._shards), now_s)
        return True

    def _fenced(self) -> None:
        with suppress(StorageError):  # whoever leads is found out from the clients anyway
            self._keep(led=False)
        raise Fenced("another aggregator has taken over meanwhile: what was not recorded by then is made again there")

    @property
    def is_held(self) -> bool:
        """Whether nobody else can lead now, so that a version may be recorded."""
        if self._is_leaving:
            return False
        return not self._standing.shared or self._is_alone or self._lease.is_held(clock_s())

    async def record(self, write: Callable[[], Awaitable[None]]) -> None:
        """Write a record once, while nobody else can lead; returns when that was so also after it was written.

        The disk may take longer than a lease. Where another has taken over meanwhile this ends with Fenced.
        """
        is_written = False

        async def keep() -> bool:
            nonlocal is_written
            if not is_written and self.is_held:
                await write()
                is_written = True
            return is_written and self.is_held

        while not await self._node.until_written(keep):
            await self._assured()

    async def _assured(self) -> None:
        """Returns once nobody else can lead; RunFailed when that does not come about in time."""
        patience_s = self._node.settings.patience_s
        try:
            with self._node.waiting(self._lacking):
                async with asyncio.timeout(patience_s):
                    await self._promised.wait_for(lambda _: self.is_held)
        except TimeoutError:
            raise RunFailed(
                f"for {patience_s:g} s there was no {self._lacking()}: with another aggregator standing by, a run goes "
                "on where most of its clients are. Start them, then go on with --resume"
            ) from None

    def _lacking(self) -> str:
        held = self._lease.held_of(clock_s())
        shards = number_of(self._shards, "shard")
        return f"consent of most clients ({held} of {shards}, {most_of(self._shards)} are needed)"

    async def abdicate(self, timeout_s: float) -> bool:
        """Record nothing more, and let the clients follow another at once; whether there is one who stands by.

        Whoever does is waited for, `timeout_s` at most, until it has what is recorded.
        """
        if not (self._standing.shared and self._followers.value):
            return False
        self._is_leaving = True
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._followers.wait_for(lambda now: not now or max(now.values()) >= self._version)
        if not self._followers.value:
            return False
        await self._consent.ask(self._grant(0.0), lambda _: None)
        there = max(self._followers.value.values(), default=0)
        self._node.note(f"leaving the run to whoever stands by, at version {there}")
        return True

    def mind(self, beat: Beat, job: str) -> None:
        """Of two aggregators the one of the earlier epoch gives way, or of equal ones that which has not begun.

        Two would make two histories of one job. Fenced when another has taken over, else ConfigError.
        """
        mine, theirs = self._stage.state, beat.state
        if theirs is None or theirs.epoch < mine.epoch:
            return
        if theirs.epoch > mine.epoch and self._standing.shared:
            self._fenced()
        if mine.phase == "waiting" and (theirs.phase != "waiting" or beat.card.id < self._node.card.id):
            raise ConfigError(f"{beat.card.name} at {beat.card.address} already aggregates job {job!r}; stop either")

    # --- those who stand by -----------------------------------------------------------------------------

    async def joined(self, card: NodeCard, shards: Sequence[int]) -> None:
        """A client has these shards from now on, and speaks for them; returns when that is kept."""
        if self.holders.take(card.key, shards):
            await self._node.persistently(lambda: self._keep(holders=self.holders.by_key()))

    def answer(self, request: Request) -> tuple[Reply, Sequence[Buffer]] | None:
        """Answer somebody who stands by; None: it was not asked by one."""
        match request:
            case Follow():
                self._copied_s = clock_s()
                epoch = self._standing.epoch if self._standing.shared else 0
                following = self._source.follow(request, self._version)
                following = msgspec.structs.replace(
                    following, origin=self._standing.origin, epoch=epoch, holders=self._standing.holders
                )
                if following.agrees and self._node.peer(request.node):
                    self._followers.value[request.node] = request.version
                    self._followers.touch()
                return following, ()
            case FetchPiece():
                self._copied_s = clock_s()
                return self._source.piece(request)
            case _:
                return None

    def lost(self, card: NodeCard) -> None:
        """A peer is gone."""
        if self._followers.value.pop(card.id, None) is None:
            return
        self._followers.touch()
        if not self._followers.value and self._node.settings.durability == "replica" and not self._is_leaving:
            self._node.note(
                f"{card.name} was the last that stood by, and durability is replica: no version is announced until one "
                "stands by again; start one with zsfl node standby JOB",
                "warning",
            )

    async def seen_off(self) -> None:
        """The run is over: returns when nobody copies its last files any more, or after `patience_s`."""
        ends_s = clock_s() + self._node.settings.patience_s
        while self._node.peers(Role.STANDBY) and clock_s() < min(ends_s, self._copied_s + COPYING_S):
            await self._followers.changed_within(MIN_RENEWAL_S)

    async def recorded(self, version: Version) -> None:
        """A version is recorded; returns when it is on as many machines as the settings ask for."""
        self._version = version
        if self._followers.value:
            self._node.publish(Committed(node=self._node.card.id, version=version))
        if self._node.settings.durability != "replica":
            return
        patience_s = self._node.settings.patience_s
        try:
            with self._node.waiting("another aggregator that stands by to have the version, as durability is replica"):
                async with asyncio.timeout(patience_s):
                    await self._followers.wait_for(lambda now: any(has >= version for has in now.values()))
        except TimeoutError:
            raise RunFailed(
                f"for {patience_s:g} s no aggregator that stands by had version {version}, and durability is replica: "
                "start one with zsfl node standby JOB, or use --durability power; then go on with --resume"
            ) from None
