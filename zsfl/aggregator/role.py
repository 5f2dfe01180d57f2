"""The aggregator's shell: assembles the run, trains its rounds, has them tested, keeps what they leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import msgspec

from zsfl.aggregator.assembly import Assembly
from zsfl.aggregator.held_out import HeldOut
from zsfl.aggregator.keeping import Keeping
from zsfl.aggregator.progress import Place, Progress
from zsfl.aggregator.reign import Reign
from zsfl.aggregator.replay import recover
from zsfl.aggregator.roster import Roster
from zsfl.aggregator.run_folder import RunFolder
from zsfl.aggregator.stage import Stage
from zsfl.aggregator.standing import Elected
from zsfl.aggregator.stored_run import StoredRun
from zsfl.aggregator.tally import PeerCounters
from zsfl.aggregator.training import Training
from zsfl.aggregator.trials import Trials
from zsfl.bounds import SYNCED
from zsfl.errors import Busy, ConfigError, NoPeer, RemoteProtocolError, RunFailed, StorageError
from zsfl.ids import NodeCard, NodeId, Role, Version, parse_cid
from zsfl.latest import Latest, first_of
from zsfl.learning.cuts import Cuts
from zsfl.learning.job import Job
from zsfl.learning.master import Master
from zsfl.learning.modes import Exact, max_staleness
from zsfl.node import OFFERS_TOPIC, BeatExtras, Node
from zsfl.reports import Assembled
from zsfl.spill.objects import store_for
from zsfl.tensors.plan import CodecPlan
from zsfl.weights.shelf import Shelf
from zsfl.wire.fields import fit_to_say
from zsfl.wire.framing import Buffer
from zsfl.wire.holding import Holder, WhoHolds
from zsfl.wire.messages import (
    SAID_GOODBYE,
    Beat,
    Broadcast,
    CheckNeed,
    Evaluated,
    FetchWeights,
    Join,
    Offers,
    Ok,
    Phase,
    Reply,
    Request,
    Train,
)
from zsfl.words import number_of

FAREWELL_S = 30.0
"""How long the aggregator of a finished run stays for peers that are there and have not heard of the end: busy ones."""


class AggregatorRole:
    """Runs one job from its first version to its last."""

    def __init__(
        self,
        node: Node,
        job: Job,
        cuts: Cuts,
        folder: RunFolder,
        stored: StoredRun | None = None,
        elected: Elected | None = None,
    ) -> None:
        """`stored`: the run in a store, if it is kept there. `elected`: how this node came to aggregate, where it stood
        by before.
        """
        self._node = node
        self._job = job
        self._cuts = cuts
        self._folder = folder
        self._master = master = Master(cuts.first, job.optimizer, job.average, frozen_norms=job.batch_norm == "frozen")
        bound = max_staleness(job.how)
        plan = CodecPlan.parse(node.settings.codec or job.codec)
        self._shelf = Shelf(cuts.portions(), bound, codec=plan.weights[0], differences=plan.delta)
        self._return_s = job.how.return_s if isinstance(job.how, Exact) else 0.0
        self._roster: Latest[Roster] = Latest(Roster(job.shards, self._return_s))
        self._counters = PeerCounters()
        self._orders: asyncio.Queue[int | None] = asyncio.Queue(maxsize=16)
        self._stage = Stage(node)
        self._reign = Reign(node, folder.path, self._stage, shards=job.shards, bound=bound)
        self._elected = elected
        # Versions that depend on who was quick may have been others where they were not handed on.
        self._forks = (
            elected and not isinstance(job.how, Exact) and node.settings.durability not in ("replica", "store")
        )
        self._training = Training(node, job, folder, self._stage, master, self._roster, self._shelf, self._reign)
        if (store := store_for(node.settings, job.name)) is not None:
            self._training.collector.look_into(store, self._stage, self._reign.holders)
        syncs = node.settings.durability in SYNCED
        self._progress = Progress(folder, job, cuts, master, self._training.journal, syncs=syncs)
        self._keeping = Keeping(node, folder, self._progress, self._training, self._stage, self._roster, stored)
        self._held_out = HeldOut(node, self._stage, self._shelf, self._roster, job)
        self._trials = Trials(node, job, folder, self._progress, self._training, self._held_out)
        start_with = 0 if node.settings.resume or elected else node.settings.start_with
        self._assembly = Assembly(node, self._roster, self._reign.holders, start_with)
        self._resumed: Place | None = None
        self._before_s = 0.0  # how long earlier processes trained what this one goes on with
        self._server = node.serve(self._answer)
        self._ears: dict[NodeId, asyncio.Task[None]] = {}
        self.hears = frozenset(Role)

    @property
    def data_port(self) -> int:
        """Where weights are fetched."""
        return self._server.port

    def prepare(self) -> None:
        """Restore what is to be resumed, and have the first version ready."""
        training = self._training
        if self._node.settings.resume or self._elected:
            self._resume(self._progress.restore())
        else:
            training.begin_at(Version(0), 0)
        for warning in self._job.warnings():
            self._node.note(warning, "warning")
        if self._job.protect is not None:
            rounds = self._node.settings.rounds or self._job.rounds
            self._node.note(self._job.protect.statement(self._job, self._cuts, rounds))
        self._stage.place(version=training.version, round=training.round)
        self._reign.begin(training.version)

    def _resume(self, place: Place) -> None:
        """Go on from a checkpoint, and from what was committed after it."""
        self._resumed, training = place, self._training
        at = recover(
            place,
            self._master,
            training.ledger,
            training.journal.kept(since=place.version - max_staleness(self._job.how)),
            self._progress.restore,
            sequential=self._job.local_lr is not None,
        )
        if self._elected and self._elected.is_behind:
            at = replace(at, lost="later ones were published by one that did not hand them on")
        if at.lost:
            self._node.note(
                f"going on from version {at.version}, as later ones cannot be made again: {at.lost}", "warning"
            )
        self._master.take_options()
        training.left = at.without
        self._assembly.resume(at.without)
        counted = [cid for made in at.windows for cid in made.record.counted]
        is_another = self._forks or not place.run
        training.resume(at, "" if is_another else parse_cid(counted[-1]).run if counted else place.run)
        if place.run != self._stage.run:
            self._progress.rename_run(place, self._stage.run)
        for version, state in self._trials.resume(at, place.round):
            self._shelf.put(version, state)
        if not self._node.settings.hold:
            self._before_s = sum(report.seconds for report in self._folder.rounds() if report.round <= at.round)

    # --- what the node asks -----------------------------------------------------------------------------

    async def drain(self, timeout_s: float) -> None:
        """The run is on the disk, and steps can be made again; whoever stands by is handed it."""
        await self._reign.abdicate(timeout_s)

    async def control(self, request: Request) -> Reply:
        """Answer a client or an observer."""
        match request:
            case Join():
                await self._join(request)
            case Evaluated():
                self._held_out.heard(request)
            case CheckNeed():
                return await self._training.collector.answer(request)
            case WhoHolds():
                return Holder(key=self._reign.holders.key_of(request.shard))
            case Train():
                if not self._node.settings.hold:
                    raise ConfigError("this aggregator trains by itself; start it with --hold to give it orders")
                if self._orders.full():
                    raise Busy(f"{self._orders.qsize()} orders wait already; give this one when one of them is done")
                self._orders.put_nowait(request.rounds)
            case _:
                raise RemoteProtocolError(f"an aggregator does not answer {type(request).__name__} here")
        return Ok()

    async def _join(self, request: Join) -> None:
        card = self._node.peer(request.node)
        if card is None or card.role is not Role.CLIENT:
            raise NoPeer("only a client joins, and after its HELLO")
        shards = [info.shard for info in request.shards]
        self._reign.holders.check(card, shards)
        self._roster.value.join(card.id, card.name, request.shards)
        self._roster.touch()
        await self._reign.joined(card, shards)

    def joined(self, card: NodeCard) -> None:
        """A peer is there."""
        self._training.collector.joined(card)
        if card.news_port:
            ear = self._node.listen(card, [OFFERS_TOPIC], lambda offers, parts: self._heard_of(card, offers, parts))
            self._ears[card.id] = self._node.start(ear.run(), f"offers of {card.name}")
        if card.role not in (Role.OBSERVER, Role.STANDBY) and card.key == self._node.card.key:
            self._node.note(f"{card.name} joined from {card.whereabouts}")  # of another machine `Met` says more
        self._roster.value.returned(card.id)
        self._roster.touch()

    def lost(self, card: NodeCard, reason: str) -> None:
        """A peer is gone."""
        self._training.collector.lost(card)
        self._reign.lost(card)
        if ear := self._ears.pop(card.id, None):
            ear.cancel()
        self._roster.value.lost(card.id, time.monotonic(), said_goodbye=reason.endswith(SAID_GOODBYE))
        self._roster.touch()
        if card.role is not Role.OBSERVER and self._stage.state.phase not in ("finished", "failed"):
            self._node.note(f"{card.name} is gone: {reason}", "warning")
            if card.role is Role.SPLIT_SERVER and not self._node.peers(card.role):
                start = self._node.hints_of_gone(card.role)[-1]
                self._node.note(f"no split server is left, and without one no step can be made; {start}", "warning")

    def heard(self, broadcast: Broadcast) -> None:
        """Take in everybody's counters, and digests of spills again, should one have been lost."""
        if isinstance(broadcast, Beat):
            self._counters.heard(broadcast.card.id, broadcast.card.name, broadcast.counters)
            self._training.collector.offered(broadcast.card.id, broadcast.offers)
            self._reign.mind(broadcast, self._job.name)
            if (state := self._stage.state).merger == broadcast.card.id:
                steps = map(parse_cid, broadcast.merging)
                at = state.run, state.version
                self._training.holdup.merging(step.shard for step in steps if (step.run, step.version) == at)

    def _heard_of(self, card: NodeCard, offers: Broadcast, parts: Sequence[Buffer]) -> None:
        if isinstance(offers, Offers) and self._node.peer(card.id):
            if offers.counters:
                self._counters.heard(card.id, card.name, offers.counters)
            self._training.collector.offered(card.id, offers.offers, parts)

    def beat(self) -> BeatExtras:
        """Heartbeats carry the state of the run, so that a lost announcement is no loss."""
        return BeatExtras(state=self._stage.state)

    def _answer(self, request: Request, _parts: Sequence[Buffer]) -> tuple[Reply, Sequence[Buffer]]:
        if isinstance(request, FetchWeights):
            return self._shelf.answer(request)
        if answer := self._reign.answer(request):
            return answer
        raise RemoteProtocolError(f"an aggregator does not answer {type(request).__name__} here")

    # --- the run ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Train what was ordered, or what the job says, then see everybody off."""
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(self._server.run(), name="data")
            try:
                await first_of(self._run_job(), self._held_out.run(), self._reign.run(), self._keeping.run())
            except StorageError as error:
                if not await self._reign.abdicate(FAREWELL_S):
                    await self._fail(error)
                else:  # another disk may be better
                    error.args = (f"{error}. Another aggregator stands by and may go on; with --resume this one does",)
                raise
            except RunFailed as error:
                await self._fail(error)
                raise
            finally:
                serving.cancel()
                self._keeping.close()

    async def _run_job(self) -> None:
        await self._assemble()
        self._training.publish_weights()
        await self._trials.begin()
        if not self._node.settings.hold:
            await self._train(self._rounds_left())
            await self._farewell("finished")
            await self._training.collector.over()
            return
        self._stage.enter(phase="idle")
        while True:
            ordered = await self._orders.get()
            await self._train(self._rounds_left() if ordered is None else max(0, ordered - self._training.round))

    def _rounds_left(self) -> int:
        """Rounds that are still to do of those that the settings, or else the job, ask for."""
        return max(0, (self._node.settings.rounds or self._job.rounds) - self._training.round)

    async def _assemble(self) -> None:
        """Wait for as many clients as the run begins with, and at least one split server."""
        if self._elected and (self._elected.has_followed or not self._node.settings.resume):
            await self._assembly.until_back(max(self._return_s, self._node.settings.lost_after_s))
        self._training.left |= await self._assembly.until_there()
        samples = self._roster.value.samples()
        before = {} if self._resumed is None else self._resumed.samples
        if any(before.get(shard, count) != count for shard, count in samples.items()):
            raise ConfigError("the shards have other sizes than when the run began; resume it with the same data")
        await self._keeping.begin(is_new=self._resumed is None)
        machine, held = self._reign.holders.largest()
        if self._job.average != "mean" and 2 * held >= self._job.shards:
            self._node.note(
                f"the machine {machine} holds {held} of {self._job.shards} shards, and with them what "
                f"{self._job.average} says; --clients-per-key bounds that",
                "warning",
            )
        clients, servers = (len(self._node.peers(role)) for role in (Role.CLIENT, Role.SPLIT_SERVER))
        folder, rounds, name = str(self._folder.path), self._training.round, self._node.name
        self._node.report(Assembled(node=name, clients=clients, split_servers=servers, folder=folder, rounds=rounds))

    async def _train(self, rounds: int) -> None:
        begun_s, total = time.monotonic(), self._training.round + rounds
        if not rounds:
            self._node.note(f"the run has its {number_of(total, 'round')} already; ask for more: --rounds", "warning")
        while self._training.round < total and (self._training.is_in_round or not self._trials.is_enough):
            await self._train_round(total)
        self._stage.enter(phase="idle", version=self._training.version)
        await self._training.meanwhile.done()
        await self._held_out.all_done()
        await self._node.persistently(self._folder.write_plot)
        finished = self._trials.finished(total, time.monotonic() - begun_s + self._before_s)
        await self._node.persistently(lambda: self._folder.append_metrics(finished))
        await self._keeping.end()
        self._node.report(finished)

    async def _train_round(self, total: int) -> None:
        self._counters.heard(self._node.card.id, self._node.name, self._node.counted())
        before = () if self._resumed is None else [card.id for role in Role for card in self._node.peers(role)]
        self._counters.begin(lambda node: node == self._node.card.id or self._node.peer(node) is not None, before)
        tally = await self._training.train_round(total, self._trials.made, lambda: self._trials.is_enough)
        self._counters.heard(self._node.card.id, self._node.name, self._node.counted())
        roster, added = self._roster.value, self._counters.added()
        report = tally.round_report(self._training.version, added, time.monotonic(), roster.label)
        report = msgspec.structs.replace(report, without=roster.without())
        keep, newest, made_s = self._keeping.of_round(report), self._training.newest, time.monotonic()

        async def end_round() -> None:
            await self._node.persistently(keep)
            await self._trials.order(report, *newest, made_s)

        await self._training.meanwhile.leave(end_round)
        if self._trials.may_take_long:
            await self._training.meanwhile.done()

    async def _fail(self, error: Exception) -> None:
        """Keep the last good version, and tell everybody why the run ends."""
        version, is_kept = self._training.newest[0], await self._keeping.fail(error)
        self._stage.place(reason=fit_to_say(error))
        if is_kept:
            error.args = (f"{error} (version {version} is kept in {self._folder.path})",)
        await self._farewell("failed")

    async def _farewell(self, phase: Phase) -> None:
        """Stay until the peers have heard of the end."""
        self._stage.enter(phase=phase)
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                others = (Role.CLIENT, Role.SPLIT_SERVER, Role.STANDBY)
                await self._roster.wait_for(lambda _: not any(map(self._node.peers, others)))
        await self._reign.seen_off()
