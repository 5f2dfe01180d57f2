"""The aggregator's shell: gathers a window, steps, commits, publishes, and again."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import msgspec
from torch import Tensor

from zsfl.aggregator.collector import Collector
from zsfl.aggregator.commit import Ledger, check_losses
from zsfl.aggregator.progress import Place, Progress
from zsfl.aggregator.roster import Roster, ranges
from zsfl.aggregator.run_folder import RunFolder
from zsfl.aggregator.schedule import Schedule
from zsfl.aggregator.tally import PeerCounters, Tally, pooled
from zsfl.compute import compute
from zsfl.errors import ConfigError, NoPeer, RemoteProtocolError, RunFailed, StorageError
from zsfl.ids import Cid, NodeCard, NodeId, PartName, Role, RunId, Version
from zsfl.latest import Latest
from zsfl.learning.job import Job
from zsfl.learning.master import Master
from zsfl.learning.model import SplitModel
from zsfl.node import BeatExtras, Node
from zsfl.reports import Assembled, Finished, RoundReport
from zsfl.weights.shelf import Packed, Shelf
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import (
    Announcement,
    Beat,
    Broadcast,
    Evaluated,
    FetchWeights,
    Join,
    Offers,
    Ok,
    Phase,
    Reply,
    Request,
    RunState,
    Train,
)

FAREWELL_S = 2.0
"""How long the aggregator of a finished run stays for peers that have not heard of the end."""


class AggregatorRole:
    """Runs one job from its first version to its last, in exact mode."""

    def __init__(self, node: Node, job: Job, model: SplitModel, folder: RunFolder) -> None:
        self._node = node
        self._job = job
        self._folder = folder
        self._master = Master(model, job.optimizer)
        self._progress = Progress(folder, job, model, self._master)
        self._shelf = Shelf()
        self._roster: Latest[Roster] = Latest(Roster(job.shards))
        self._ledger = Ledger(folder)
        self._counters = PeerCounters()
        self._orders: asyncio.Queue[int | None] = asyncio.Queue(maxsize=16)
        self._evaluated: Latest[dict[int, Evaluated]] = Latest({})
        self._evaluations = 0
        self._tally: Tally
        self._schedule: Schedule
        self._collector = Collector(
            node, lambda cid: self._schedule.expects(cid), lambda meta: self._tally.served(meta)
        )
        self._state = RunState(
            run=RunId(secrets.token_hex(3)), phase="waiting", version=Version(0), round=0, rounds=0, window=0, windows=0
        )
        self._version = self._state.version
        """Of the master; peers hear of it only together with what is asked of them at it (`_enter`)."""
        self._packed: dict[PartName, Packed] = {}
        self._newest: tuple[Version, dict[str, Tensor]]
        self._proven: tuple[Version, dict[str, Tensor]]
        """The newest version that gave finite losses and gradients (the first one is taken on trust)."""
        self._settled: tuple[Cid, ...] = ()
        self._resumed: Place | None = None
        self._server = node.serve(self._answer)
        self._publisher = node.publisher()
        self.data_port = self._server.port
        self.weights_port = self._publisher.port

    async def prepare(self) -> None:
        """Restore what is to be resumed, and have the first version ready."""
        if self._node.settings.resume:
            place = await compute(self._progress.restore)
            self._resumed, self._version = place, place.version
            self._state = msgspec.structs.replace(self._state, version=place.version, round=place.round)
            await compute(self._ledger.resume, place.commit)
        self._take_state(self._version)
        self._proven = self._newest

    # --- what the node asks -----------------------------------------------------------------------------

    async def drain(self, timeout_s: float) -> None:
        """Nothing to wait for: the last checkpoint and the ledger are on disk, and steps can be made again."""

    async def control(self, request: Request) -> Reply:
        """Answer a client or an observer."""
        match request:
            case Join():
                card = self._node.peer(request.node)
                if card is None:
                    raise NoPeer("say HELLO before joining")
                self._roster.value.join(card.id, card.name, request.shards)
                self._roster.touch()
            case Evaluated():
                if (self._state.phase, self._state.version) == ("evaluating", request.version):
                    self._evaluated.value[request.shard] = request
                    self._evaluated.touch()
            case Train():
                if not self._node.settings.hold:
                    raise ConfigError("this aggregator trains by itself; start it with --hold to give it orders")
                self._orders.put_nowait(request.rounds)
            case _:
                raise RemoteProtocolError(f"an aggregator does not answer {type(request).__name__} here")
        return Ok()

    def joined(self, card: NodeCard) -> None:
        """A peer is there."""
        self._collector.joined(card)
        if card.role is not Role.OBSERVER:
            self._node.note(f"{card.name} joined from {card.address}")
        self._roster.value.returned(card.id)
        self._roster.touch()

    def lost(self, card: NodeCard, reason: str) -> None:
        """A peer is gone."""
        self._collector.lost(card)
        self._roster.value.lost(card.id)
        self._roster.touch()
        if card.role is not Role.OBSERVER and self._state.phase not in ("finished", "failed"):
            self._node.note(f"{card.name} is gone: {reason}", "warning")

    def heard(self, broadcast: Broadcast) -> None:
        """Take in digests of spills, and everybody's counters."""
        match broadcast:
            case Beat():
                self._counters.heard(broadcast.card.id, broadcast.card.name, broadcast.counters)
                self._collector.offered(broadcast.card.id, broadcast.offers)
                self._mind_rival(broadcast)
            case Offers():
                if card := self._node.peer(broadcast.node):
                    self._counters.heard(card.id, card.name, broadcast.counters)
                    self._collector.offered(card.id, broadcast.offers)
            case _:
                pass

    def beat(self) -> BeatExtras:
        """Heartbeats carry the state of the run, so that a lost announcement is no loss."""
        self._count_own()
        return BeatExtras(state=self._state)

    def _present(self, node: NodeId) -> bool:
        return node == self._node.card.id or self._node.peer(node) is not None

    def _count_own(self) -> None:
        self._counters.heard(self._node.card.id, self._node.name, self._node.counters.snapshot())

    def _mind_rival(self, beat: Beat) -> None:
        """Two aggregators would make two histories of one job: the one that has not begun leaves."""
        if beat.state is None or self._state.phase != "waiting":
            return
        if beat.state.phase != "waiting" or beat.card.id < self._node.card.id:
            raise ConfigError(
                f"{beat.card.name} at {beat.card.address} already aggregates job {self._job.name!r}; stop either"
            )

    async def _answer(self, request: Request, _parts: Sequence[Buffer]) -> tuple[Reply, Sequence[Buffer]]:
        if isinstance(request, FetchWeights):
            return self._shelf.answer(request)
        raise RemoteProtocolError(f"an aggregator does not answer {type(request).__name__} here")

    # --- the run ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Train what was ordered, or what the job says, then see everybody off."""
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(self._server.run(), name="data")
            try:
                await self._run_job()
            except (RunFailed, StorageError) as error:
                await self._fail(error)
                raise
            finally:
                serving.cancel()
                self._publisher.close()

    async def _run_job(self) -> None:
        self._schedule = await self._assemble()
        self._publish_weights()
        settings = self._node.settings
        if not settings.hold:
            await self._train(self._rounds_left())
            await self._farewell("finished")
            return
        self._enter("idle")
        while True:
            ordered = await self._orders.get()
            await self._train(self._rounds_left() if ordered is None else ordered)
            self._enter("idle")

    @property
    def _rounds_done(self) -> int:
        return self._schedule.place(self._version)[0]

    def _rounds_left(self) -> int:
        """Rounds that are still to do of those that the settings, or else the job, ask for."""
        return max(0, (self._node.settings.rounds or self._job.rounds) - self._rounds_done)

    async def _assemble(self) -> Schedule:
        """Wait for a client for every shard and at least one split server."""
        try:
            with self._node.waiting(self._missing):
                async with asyncio.timeout(self._node.settings.join_s):
                    await self._roster.wait_for(lambda _: not self._missing())
        except TimeoutError:
            raise NoPeer(f"after {self._node.settings.join_s:g} s there is still no {self._missing()}") from None
        samples = dict(self._roster.value.samples())
        if self._resumed is not None and self._resumed.samples != samples:
            raise ConfigError("the shards have other sizes than when the run began; resume it with the same data")
        clients, servers = (len(self._node.peers(role)) for role in (Role.CLIENT, Role.SPLIT_SERVER))
        self._node.report(Assembled(node=self._node.name, clients=clients, split_servers=servers))
        return Schedule(run=self._state.run, samples=samples, batch_size=self._job.batch_size)

    def _missing(self) -> str:
        """What the run cannot begin without, for people."""
        missing = self._roster.value.missing()
        wanted = [f"clients for shards {ranges(missing)}"] if missing else []
        if not self._node.peers(Role.SPLIT_SERVER):
            wanted.append("a split server")
        return " and ".join(wanted)

    async def _train(self, rounds: int) -> None:
        begun_s = time.monotonic()
        last: RoundReport | None = None
        total = self._rounds_done + rounds
        while self._rounds_done < total:
            last = await self._train_round(self._rounds_done, total)
        await compute(self._folder.write_plot)
        finished = Finished(
            node=self._node.name,
            rounds=self._rounds_done,
            version=self._version,
            accuracy=last.accuracy if last else None,
            loss=last.loss if last else None,
            seconds=time.monotonic() - begun_s,
            folder=str(self._folder.path),
        )
        self._node.report(finished)

    async def _train_round(self, round_: int, total: int) -> RoundReport:
        self._count_own()
        windows = self._schedule.windows
        self._tally = Tally(
            node=self._node.name, round_=round_ + 1, rounds=total, windows=windows, now_s=time.monotonic()
        )
        self._counters.begin(self._present)
        gathering = self._collector.gathering
        while self._rounds_done == round_:
            _, window = self._schedule.place(self._version)
            gathering.begin(self._version, self._schedule.expected(self._version))
            self._enter("training", round=round_, rounds=total, window=window, windows=windows)
            await self._progressing(
                lambda: f"the steps of {self._names(gathering.missing())}",
                lambda: gathering.complete,
                self._collector.more,
            )
            await self._commit(self._version)
            if report := self._tally.window_report(window + 1, self._version, time.monotonic()):
                await compute(self._folder.append_metrics, report)
                self._node.report(report)
        trained_s = time.monotonic()
        await self._evaluate()
        self._count_own()
        report = self._tally.round_report(
            self._version, self._evaluated.value, self._counters.added(), trained_s, time.monotonic()
        )
        await compute(self._keep, report)
        self._node.report(report)
        return report

    async def _progressing(
        self, what: Callable[[], str], done: Callable[[], bool], more: Callable[[], Awaitable[object]]
    ) -> None:
        """Wait until `done`, for as long as there is always `more` in time."""
        patience_s = self._node.settings.patience_s
        with self._node.waiting(what):
            while not done():
                try:
                    async with asyncio.timeout(patience_s):
                        await more()
                except TimeoutError:
                    raise RunFailed(
                        f"round {self._state.round + 1} stood still for {patience_s:g} s without {what()}; in exact "
                        "mode every client is needed. Start what is missing, then go on with --resume"
                    ) from None

    def _names(self, shards: Sequence[int]) -> str:
        """Who holds these shards, for people."""
        names = ", ".join(self._roster.value.name(shard) for shard in shards[:8])
        return f"{names} and others" if len(shards) > 8 else names

    async def _commit(self, version: Version) -> None:
        """Make version + 1 of the window, record it, publish it."""
        window = self._collector.gathering.window()
        place = f"round {self._state.round + 1}, window {self._state.window + 1} of {self._state.windows}"

        def step() -> None:
            check_losses(window, f"{place} (version {version})")
            self._master.step(window)
            self._proven = self._newest
            self._ledger.commit(version, window, self._master.digest())
            self._take_state(Version(version + 1))

        try:
            await compute(step)
        except RunFailed:
            self._newest = self._proven
            raise
        self._tally.counted(window)
        self._version = Version(version + 1)
        self._publish_weights()
        self._settled = tuple(self._schedule.expected(version))
        # From here on a late copy of one of these steps is to be released, whatever the run does next.
        self._collector.gathering.begin(self._version, {})

    def _take_state(self, version: Version) -> None:
        """The master is at this version now; blocking."""
        self._newest = version, self._master.state()
        self._packed = self._shelf.put(*self._newest)

    def _publish_weights(self) -> None:
        for part, (body, parts) in self._packed.items():
            self._publisher.publish(part.encode(), body, parts)

    async def _evaluate(self) -> None:
        """Have every client with held-out samples test this version."""
        self._evaluated.set({})
        self._evaluations += 1
        tested = self._roster.value.tested()
        self._enter("evaluating")

        def late() -> list[int]:
            return sorted(tested - self._evaluated.value.keys())

        async def more() -> None:
            before = len(late())
            await self._evaluated.wait_for(lambda _: len(late()) < before)

        await self._progressing(lambda: f"the held-out test of {self._names(late())}", lambda: not late(), more)
        loss, _ = pooled(self._evaluated.value)
        if loss is not None and not math.isfinite(loss):
            self._newest = self._proven
            place = f"round {self._state.round + 1} (version {self._version})"
            raise RunFailed(
                f"the held-out loss became {loss} after {place}: lower the learning rate, or look for bad samples"
            )

    def _enter(self, phase: Phase, **place: int) -> None:
        """Say what is asked of everybody now, and what the last commit settled."""
        counted, self._settled = self._settled, ()
        now = {"phase": phase, "version": self._version, "evaluation": self._evaluations, **place}
        self._state = msgspec.structs.replace(self._state, **now)
        self._node.publish(Announcement(node=self._node.card.id, state=self._state, counted=counted))

    # --- what the run leaves ----------------------------------------------------------------------------

    def _keep(self, report: RoundReport) -> None:
        """Metrics, model and checkpoint of a round; blocking."""
        self._folder.append_metrics(report)
        self._progress.keep_model(self._newest[1])
        self._progress.save(self._version, self._rounds_done, self._schedule.samples, self._ledger.last)

    async def _fail(self, error: Exception) -> None:
        """Keep the last good version, and tell everybody why the run ends."""
        with suppress(StorageError):
            await compute(self._progress.keep_model, self._newest[1])
            await compute(self._folder.write_plot)
        self._state = msgspec.structs.replace(self._state, reason=str(error)[:2000])
        error.args = (f"{error} (version {self._newest[0]} is kept in {self._folder.path})",)
        await self._farewell("failed")

    async def _farewell(self, phase: Phase) -> None:
        """Stay until the peers have heard of the end."""
        self._enter(phase)
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                await self._roster.wait_for(
                    lambda _: not self._node.peers(Role.CLIENT) and not self._node.peers(Role.SPLIT_SERVER)
                )
