"""Stands by: keeps a copy of the run, and takes over when its aggregator is gone."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from zsfl.aggregator.consent import Consent
from zsfl.aggregator.holders import Holders
from zsfl.aggregator.mirror import Mirror
from zsfl.aggregator.standing import Elected, Standing
from zsfl.errors import (
    ConfigError,
    NoPeer,
    Rejected,
    RemoteProtocolError,
    RunFailed,
    Unavailable,
    ZsflError,
)
from zsfl.ids import NodeCard, NodeId, Role
from zsfl.latest import Latest
from zsfl.lease import HANDOVER_S, Lease, clock_s, most_of
from zsfl.node import STATE_TOPIC, BeatExtras, Node
from zsfl.ranges import parse_shards
from zsfl.wire.connection import Connection
from zsfl.wire.framing import nbytes
from zsfl.wire.messages import Announcement, Beat, Broadcast, Committed, Reply, Request, RunState
from zsfl.wire.succession import MAX_FILES, PIECE_BYTES, FetchPiece, FileInfo, Following, Grant, Granted, Piece
from zsfl.words import number_of

RIVAL_LEASES = (0.5, 3.0)
"""How long whoever finds another standing too asks nobody, in leases: the promises that each has run out meanwhile."""
FIRST_LEASES = 2.0
"""How long an aggregator is waited for after a start, before this node stands, in leases."""


class StandbyRole:
    """One node that stands by. Its run ends when it is elected, or the training run ends."""

    def __init__(
        self, node: Node, mirror: Mirror, standing: Standing, *, shards: int, warm_up: Callable[[], None]
    ) -> None:
        """`warm_up` does beforehand, in a thread, what would hold up a takeover."""
        self._node = node
        self._mirror = mirror
        self._standing = standing
        self._shards = shards
        self._warm_up = warm_up
        self._lease = Lease(shards)
        self._epoch = standing.epoch if standing.led else standing.epoch + 1
        """That it would lead in."""
        self._begun_s = clock_s()
        """When it asked for it first."""
        self._has_rival = False
        """Whether another stood in the same epoch, or a later one, when it was asked last."""
        self._known = (0, 0)
        """Epoch and version, the newest that clients knew of. One's word is enough: if it lies, a few steps are made
        again; if it were not heeded, steps made with weights that were lost might count.
        """
        self._states: Latest[dict[NodeId, RunState]] = Latest({})
        """Of the aggregators that are there."""
        self._rounds = standing.rounds
        self._ears: dict[NodeId, asyncio.Task[None]] = {}
        self._followed: tuple[NodeId, Connection] | None = None
        self._has_followed = False
        """Whether it ever did."""
        self._ended: RunState | None = None
        """How whoever was followed ended the run, though this node could not fetch all that it left."""
        self._noted = ""
        self._random = random.Random(node.card.id)
        self.elected: Elected | None = None
        self.hears = frozenset({Role.AGGREGATOR})

    @property
    def data_port(self) -> int:
        """It answers nobody."""
        return 0

    async def drain(self, timeout_s: float) -> None:
        """Nothing to wait for: the copy is on the disk."""

    async def control(self, request: Request) -> Reply:
        """It answers nobody; who asks may take it for the aggregator that it was a moment ago, at the same address."""
        raise NoPeer(f"{self._node.name} stands by and does not answer {type(request).__name__}; ask the aggregator")

    def joined(self, card: NodeCard) -> None:
        """A peer is there."""
        if card.role is Role.AGGREGATOR:
            ear = self._node.listen(card, [STATE_TOPIC], lambda broadcast, _: self._heard_of(card, broadcast))
            self._ears[card.id] = self._node.start(ear.run(), f"state of {card.name}")
        self._states.touch()

    def lost(self, card: NodeCard, reason: str) -> None:
        """A peer is gone."""
        if ear := self._ears.pop(card.id, None):
            ear.cancel()
            state = self._states.value.pop(card.id, None)
            if state is not None and state.epoch >= self._standing.epoch and state.phase in ("finished", "failed"):
                self._ended = state
            if self._followed is not None and self._followed[0] == card.id:
                self._followed[1].close(f"is gone ({reason})")
            self._node.note(f"{card.name} is gone: {reason}", "warning")
        self._states.touch()

    def heard(self, broadcast: Broadcast) -> None:
        """Take in where the run stands."""
        if isinstance(broadcast, Beat) and broadcast.state is not None:
            self._take(broadcast.card.id, broadcast.state)

    def _heard_of(self, card: NodeCard, broadcast: Broadcast) -> None:
        match broadcast:
            case Announcement() if broadcast.node == card.id:
                self._take(card.id, broadcast.state)
            case Committed():
                self._states.touch()
            case _:
                pass

    def _take(self, node: NodeId, state: RunState) -> None:
        if node in self._ears:
            self._states.value[node] = state
            self._rounds = state.rounds or self._rounds
            self._states.touch()

    def beat(self) -> BeatExtras:
        """Nothing but that it is there."""
        return BeatExtras()

    # --- the run ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Follow whoever aggregates, and stand for it when nobody does."""
        warming = self._node.start(asyncio.to_thread(self._warm_up), "warm up")
        try:
            await self._until_over()
        finally:
            await warming  # a thread cannot be left

    async def _until_over(self) -> None:
        if not self._standing.led:  # the others may start at the same time
            await self._states.changed_within(FIRST_LEASES * self._node.settings.lost_after_s)
        while True:
            if (active := self._active()) is not None:
                if await self._follow(active):
                    return
            elif self._ended is not None:
                return await self._end(self._ended)
            elif self._standing.shared and self._mirror.is_usable and self._node.settings.takeover != "never":
                if await self._stand():
                    return
            else:
                await self._until_active()

    def _active(self) -> NodeCard | None:
        """The aggregator of the latest epoch, unless that is an earlier one than what is known here."""
        known = {node: state for node, state in self._states.value.items() if state.epoch >= self._standing.epoch}
        return self._node.peer(max(known, key=lambda node: (known[node].epoch, node))) if known else None

    async def _until_active(self) -> None:
        settings = self._node.settings
        allowed_s = settings.patience_s if self._has_followed else settings.join_s
        advice = "Start one with: zsfl node aggregator JOB"
        if self._has_followed:
            advice = "Start it again with --resume"
        if self._standing.shared and self._mirror.is_usable:  # and takes over never
            copy = self._mirror.folder
            advice += (
                ". This one does not take over by itself (--takeover never): if you know that the other is gone for "
                f"good, stop this one and go on from its copy {copy} with: zsfl node aggregator JOB --run {copy.name} "
                "--resume (and --takeover always, where no more than half of the shards have their clients left)"
            )
            self._node.note(f"there is no aggregator. {advice}", "warning")
        elif self._has_followed:
            advice += ". This one had not stood by for long enough to take over"
        try:
            with self._node.waiting("an aggregator to stand by"):
                async with asyncio.timeout(allowed_s):
                    await self._states.wait_for(lambda _: self._active() is not None)
        except TimeoutError:
            raise NoPeer(f"for {allowed_s:g} s there was no aggregator. {advice}") from None

    # --- following --------------------------------------------------------------------------------------

    async def _follow(self, active: NodeCard) -> bool:
        """Keep the copy up to date while this one aggregates; whether the run is over."""
        connection = self._node.connect(active, active.data_port)
        self._followed, self._has_followed = (active.id, connection), True
        said = False
        try:
            while self._active() == active:
                state = self._states.value[active.id]
                try:
                    await self._node.until_written(lambda: self._catch_up(connection))
                except (Unavailable, Rejected, RemoteProtocolError) as error:
                    if self._active() == active:
                        self._note_once(f"{active.name} cannot be followed for the moment: {error}")
                        await asyncio.sleep(self._node.settings.beat_s)
                    continue
                if not said:
                    self._node.note(f"standing by {active.name}, at version {self._mirror.version}")
                    said = True
                if state.phase in ("finished", "failed"):
                    await self._end(state)
                    return True
                await self._states.changed_within(self._node.settings.beat_s)
        finally:
            self._followed = None
            connection.close("is not followed any more")
        return False

    async def _end(self, state: RunState) -> None:
        """The run is over; RunFailed when it failed."""
        if state.phase == "failed":
            raise RunFailed(state.reason)
        await self._node.persistently(lambda: self._keep(shared=False))  # or it would stand for the run after this
        if self._mirror.version < state.version:
            self._node.note(
                f"the run is finished, and its aggregator left before all of it was here: this copy ends at version "
                f"{self._mirror.version} of {state.version}",
                "warning",
            )

    def _note_once(self, message: str) -> None:
        if message != self._noted:
            self._noted = message
            self._node.note(message, "warning")

    async def _catch_up(self, connection: Connection) -> None:
        """Fetch what there is."""
        while True:
            request = self._mirror.wish(self._node.card.id)
            answer = await connection.request(request, deadline_s=self._node.settings.request_s)
            following = answer.expect(Following)
            self._check(following.origin)
            if not following.agrees:
                if not self._mirror.version:
                    raise RemoteProtocolError("it says that nothing was published, and nothing is here")
                self._node.note(f"version {request.version} as it is here was never published: going back", "warning")
                self._mirror.go_back()
                continue
            wanted = [info for info in following.files if self._mirror.lacks(info)]
            for info in wanted:
                await self._fetch(connection, info)
            if len(following.files) < MAX_FILES:  # else the ledger may be among what was not named
                self._learn(following)
            if not wanted:
                return

    def _check(self, origin: str) -> None:
        """ConfigError when what is here is a copy of another run."""
        if not self._standing.origin:
            self._keep(origin=origin)
        elif origin != self._standing.origin:
            raise ConfigError(
                f"{self._mirror.folder} has a copy of another run of this job: move it away, or give this node another "
                "name with --name"
            )

    def _learn(self, following: Following) -> None:
        """Of whom we follow, once its history is here; from then on a takeover is possible."""
        epoch = following.epoch
        if following.holders != self._standing.holders:
            self._keep(holders=following.holders)
        if epoch and (epoch > self._standing.epoch or self._standing.led or not self._standing.shared):
            self._keep(epoch=epoch, led=False, shared=True)
            self._epoch = epoch + 1
        if self._rounds != self._standing.rounds:
            self._keep(rounds=self._rounds)

    def _keep(self, **changes: object) -> None:
        standing = msgspec.structs.replace(self._standing, **changes)
        standing.keep(self._mirror.folder)
        self._standing = standing

    async def _fetch(self, connection: Connection, info: FileInfo) -> None:
        """Fetch a file, as long as it was when it was named; Unavailable when it is gone by now."""
        offset = self._mirror.begins_at(info)
        with self._mirror.receiving(info) as write:
            while offset < info.size_bytes:
                size = min(PIECE_BYTES, info.size_bytes - offset)
                request = FetchPiece(name=info.name, offset=offset, size_bytes=size)
                answer = await connection.request(request, deadline_s=self._node.settings.request_s)
                answer.expect(Piece)
                came = sum(map(nbytes, answer.parts))
                if not came:
                    raise Unavailable(f"{info.name} is gone there")
                if len(answer.parts) > 1 or came > size:
                    raise RemoteProtocolError(f"{came} bytes of {info.name} came where {size} were asked for")
                write(answer.parts[0])
                offset += came

    # --- taking over ------------------------------------------------------------------------------------

    async def _stand(self) -> bool:
        """Ask the clients for their consent until somebody leads; whether it is us."""
        settings = self._node.settings
        ends_s = time.monotonic() + settings.patience_s
        self._begun_s = clock_s()
        with self._node.waiting(self._lacking):
            while time.monotonic() < ends_s:
                if self._active() is not None:
                    return False
                if await self._asked():
                    return True
                await self._pause()
        if rivals := self._node.peers(Role.AGGREGATOR):
            raise RunFailed(
                f"{rivals[0].name} aggregates what an earlier epoch had come to, and {self._mirror.folder} has version "
                f"{self._mirror.version} of epoch {self._standing.epoch}: stop that one and start it again while this "
                "one runs; or, if that is what you want, move this copy away"
            )
        raise RunFailed(
            f"for {settings.patience_s:g} s there was not {self._lacking()}. Start the aggregator again, or more of "
            "its clients; or, if you know that it is gone for good, this one with --takeover always. But look first at "
            "the copies of others that stood by: the run may have gone on there, or ended"
        )

    async def _pause(self) -> None:
        """Until it is worth asking again: where another stands too, long enough for one of both to come to nothing."""
        settings = self._node.settings
        if self._has_rival:
            await asyncio.sleep(self._random.uniform(*RIVAL_LEASES) * settings.lost_after_s)
            self._begun_s = clock_s()
        else:
            await self._states.changed_within(self._random.uniform(0.5, 1.0) * settings.beat_s)

    def _lacking(self) -> str:
        held = self._lease.held_of(clock_s())
        return (
            f"an aggregator, or the consent of most clients to take over ({held} of "
            f"{number_of(self._shards, 'shard')}, {most_of(self._shards)} are needed)"
        )

    async def _asked(self) -> bool:
        """Ask once; whether most clients agree."""
        lease_s = self._node.settings.lost_after_s
        if not await self._has_majority(lease_s):
            return False
        await self._node.persistently(self._mirror.tidy)
        is_behind = self._known > (self._standing.epoch, self._mirror.version)
        await self._node.persistently(lambda: self._keep(epoch=self._epoch, led=True))
        with suppress(ZsflError):
            await self._has_majority(HANDOVER_S)  # until the versions since the checkpoint are made again
        self.elected = Elected(
            is_behind=is_behind, known=self._known[1], rounds=self._rounds, has_followed=self._has_followed
        )
        self._node.note(f"taking over at version {self._mirror.version}, in epoch {self._epoch}", "warning")
        return True

    async def _has_majority(self, lease_s: float) -> bool:
        grant = Grant(
            holder=self._standing.holder,
            name=self._node.name,
            epoch=self._epoch,
            known=self._standing.epoch,
            version=self._mirror.version,
            lease_s=lease_s,
        )
        reassign = self._node.settings.reassign
        holders = Holders(
            self._standing.holders,
            keyed=bool(self._node.card.key),
            reassign=parse_shards(reassign, self._shards) if reassign else (),
            trusts=lambda key: self._node.trusts(key, Role.CLIENT),
        )
        consent = Consent(self._node, holders)
        lease, asked_s = self._lease, clock_s()

        def took(answers: Sequence[Granted]) -> None:
            lease.answered(answers, asked_s)
            self._known = max(self._known, *(granted.newest for granted in answers), (0, 0))

        is_alone = self._node.settings.takeover == "always"
        all_answered = await consent.ask(grant, took, all_=is_alone)  # whose silence then counts as consent
        now_s, epoch = clock_s(), lease.next_epoch(self._epoch)
        if lease.is_held(now_s) or (is_alone and not lease.is_contested(asked_s, now_s)):
            return True
        is_told = all_answered or asked_s >= self._begun_s + self._node.settings.lost_after_s
        self._has_rival = is_told and epoch > self._epoch
        if self._has_rival:
            self._epoch, self._lease, self._begun_s = epoch, Lease(self._shards), now_s
        return False
