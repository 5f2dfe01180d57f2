"""Makes versions: opens a window, gathers its steps, commits them, publishes the weights, and again."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Literal

import msgspec
from torch import Tensor

from zsfl.aggregator.closing import closing_for
from zsfl.aggregator.collector import Collector
from zsfl.aggregator.commit import Ledger, check_losses, record_of
from zsfl.aggregator.gathering import Gathering
from zsfl.aggregator.holdup import HoldUp
from zsfl.aggregator.journal import Journal
from zsfl.aggregator.meanwhile import Meanwhile
from zsfl.aggregator.pacing import Slices
from zsfl.aggregator.refusals import Refusals
from zsfl.aggregator.reign import Reign
from zsfl.aggregator.replay import Made, Recovered
from zsfl.aggregator.roster import Attendance, Roster
from zsfl.aggregator.rules import Rules
from zsfl.aggregator.run_folder import RunFolder
from zsfl.aggregator.sifting import Sieve
from zsfl.aggregator.stage import Stage
from zsfl.aggregator.tally import Tally
from zsfl.bounds import SYNCED
from zsfl.errors import RunFailed
from zsfl.ids import Cid, Portion, Role, RunId, Version, step_cid
from zsfl.latest import Latest
from zsfl.learning.averaging import Contribution
from zsfl.learning.job import Job
from zsfl.learning.master import Master
from zsfl.learning.modes import Async, max_staleness
from zsfl.learning.plan import Plan, Sizes
from zsfl.node import Node
from zsfl.weights.packing import Packed
from zsfl.weights.shelf import Shelf

Outcome = Literal["enough", "idle", "deserted", "alone", "broken"]
"""How the gathering of a window ended: idle when those who are there have no steps in it (deserted where others, who
left, had been asked for some), alone when nobody is there."""


class Training:
    """One run's way from version to version, in whatever mode its job says."""

    def __init__(
        self,
        node: Node,
        job: Job,
        folder: RunFolder,
        stage: Stage,
        master: Master,
        roster: Latest[Roster],
        shelf: Shelf,
        reign: Reign,
    ) -> None:
        self._node = node
        self._job = job
        self._folder = folder
        self._stage = stage
        self._master = master
        self._roster = roster
        self._shelf = shelf
        self._reign = reign
        syncs = node.settings.durability in SYNCED
        self.ledger = Ledger(folder, sync=syncs)
        self.journal = Journal(folder.journal_path, syncs=syncs)
        self.rules = Rules(job)
        self._gathering = Gathering(
            stage.run,
            max_staleness=max_staleness(job.how),
            steps_per_version=self.rules.steps * self.rules.attempts,
            shards=job.shards,
        )
        self._closing = closing_for(job.how, self.rules.steps)
        self._sieve = Sieve(job, master.check, lambda said: node.note(said, "warning"))
        self._pacer = self.rules.pacer
        self.meanwhile = Meanwhile()
        self._refusals = Refusals(self._gathering, master, roster, job, is_exact=self.rules.is_exact)
        self.collector = Collector(node, self._gathering, self.journal, self._took, roster, self._refusals)
        self.version = stage.state.version
        """Of the master; peers hear of it only together with what is asked of them at it."""
        self.round = 0
        """Rounds that are done."""
        self.newest: tuple[Version, dict[str, Tensor]]
        self.proven: tuple[Version, dict[str, Tensor]]
        """The newest version that gave finite losses and gradients (the first one is taken on trust)."""
        self._packed: dict[Portion, Packed] = {}
        self._tally: Tally
        self._sizes: Sizes = {}
        self._attempt = self._place = 0
        self._attendance, self.holdup = Attendance(), HoldUp(node, roster, self._missing)
        self.left: frozenset[int] = frozenset()
        """Shards whose clients had left before this process began."""
        self._retold: Sequence[Made] = ()
        """Versions of the round in progress that a former process made."""
        self._awaited: frozenset[int] = frozenset()
        """Shards that take part in the window, when that was looked at last."""
        self._progress_s = self._alarm_s = 0.0
        """When the window is looked at again, if nothing happens."""

    def begin_at(self, version: Version, round_: int) -> None:
        """The master is at this version, and so many rounds are done; blocking."""
        self.version, self.round = version, round_
        self._take_state(version)
        self.proven = self.newest

    def resume(self, at: Recovered, run: str) -> None:
        """Go on where a former process ended, to which the master was brought; blocking.

        What peers hold of the run counts further on, unless versions were lost that it may belong to.
        """
        self._retold = at.windows
        self.rules.restore(at.memory)
        if run and not at.lost and not self.rules.merges:  # a merged batch may be one of others the next time
            self._stage.resume(RunId(run))
            records = [line.record for line in self.ledger.records()]
            settled = [cid for record in records for cid in (*record.counted, *record.dropped)]
            self._gathering.resume(self._stage.run, [cid for cid in settled if cid.startswith(run)])
            if records:  # it may be that nobody was told of the last one any more
                self._stage.settle(records[-1].counted, records[-1].dropped)
        self.begin_at(at.version, at.round)

    def cut_after(self, version: Version, begin_another: Callable[[], object]) -> None:
        """Later versions are no good; blocking. `begin_another` has a resume take no steps of them from peers."""
        self._gathering.stop()
        if self.version > version:  # which peers were told of
            begin_another()
        self.journal.drop_after(version)
        self.ledger.cut_after(version)

    @property
    def is_in_round(self) -> bool:
        """Whether a former process has begun the round that comes next."""
        return bool(self._retold)

    def publish_weights(self) -> None:
        """Hand the newest version to everybody who listens."""
        for portion, (body, parts) in self._packed.items():
            self._node.publisher.publish(portion.encode(), body, parts)

    # --- rounds and windows -----------------------------------------------------------------------------

    async def train_round(
        self, rounds: int, made: Callable[[Version], Awaitable[bool]], ends: Callable[[], bool]
    ) -> Tally:
        """One round, of so many in all; what it adds up to.

        `made` is told of every version but the last; the round ends there when it says so, or when `ends` does.
        """
        there = await self._until_somebody_is_there()
        samples = self._roster.value.samples(there)
        plan = Plan.of(self._job, samples)
        self._tally = Tally(
            node=self._node.name,
            round_=self.round + 1,
            rounds=rounds,
            windows=plan.windows,
            now_s=time.monotonic(),
        )
        self._stage.place(round=self.round, rounds=rounds, windows=plan.windows)
        window = self._retell()
        while self._goes_on(window, plan, samples) and not (window and ends()):
            match await self._make_version(plan, window):
                case "alone":
                    await self._until_somebody_is_there()
                case "idle":
                    window, self.rules.skipped = window + 1, self.rules.skipped + 1
                case "enough":
                    window += 1
                    await self._report(window)
                    if self._goes_on(window, plan, samples) and await made(self.version):
                        break
        self.round += 1
        return self._tally

    def _retell(self) -> int:
        """Count what a former process made of this round; the window that comes next."""
        retold, self._retold = self._retold, ()
        for record, window in ((made.record, made.window) for made in retold):
            self._tally.counted(window, Version(record.version - 1), record.dropped, record.refused)
        return retold[-1].record.window + 1 if retold else 0

    def _goes_on(self, window: int, plan: Plan, samples: Mapping[int, int]) -> bool:
        """Whether the round has another window; in async mode, until its samples have been gone through in number."""
        return self._tally.gone_through < sum(samples.values()) if self.rules.is_async else window < plan.windows

    async def _until_somebody_is_there(self) -> Sequence[int]:
        """Shards that take part, once there are any."""
        await self._until(Role.CLIENT, lambda roster: bool(roster.present()))
        return self._roster.value.taking_part(time.monotonic())

    async def _until(self, role: Role, fits: Callable[[Roster], bool]) -> None:
        """Wait for a peer that the run cannot go on without."""
        if not fits(self._roster.value):
            await self.meanwhile.done()
        await self.holdup.until(role, fits)

    async def _make_version(self, plan: Plan, window: int) -> Literal["enough", "idle", "alone"]:
        """Gather one window and commit it, if there is anybody who has steps in it."""
        for attempt in range(self.rules.attempts):
            match await self._gather(plan, window, attempt):
                case "enough":
                    await self._commit(window)
                    return "enough"
                case "broken":
                    self._gathering.void("the merged batch that it was part of fell apart")
                case "deserted":  # a version of nothing, so that the next window's steps have names of their own
                    self._gathering.void("its client left in the middle of it")
                    await self._commit(window)
                    return "idle"
                case outcome:
                    return outcome
        raise RunFailed(
            f"the merged batch of version {self.version} fell apart {self.rules.attempts} times, as clients and split "
            "servers came and went; go on with --resume when they are there to stay"
        )

    async def _gather(self, plan: Plan, window: int, attempt: int) -> Outcome:
        """Ask for the steps of one window, and wait until there are enough."""
        if not self.rules.is_exact or self._pacer is not None:  # time that passes while steps are made says something
            await self.meanwhile.done()
        if self.rules.merges:
            await self._until(Role.SPLIT_SERVER, lambda _: bool(self._node.peers(Role.SPLIT_SERVER)))
        there = self._roster.value.taking_part(time.monotonic())
        if not there:
            return "alone"
        for said in self._attendance.now(there, self._roster.value.label):
            self._node.note(*said)
        self._attempt, self._place = attempt, self.version + self.rules.skipped if self.rules.is_async else window
        slices = self._pace(there)
        sizes = plan.sizes(self._roster.value.samples(there), self._place % plan.windows)
        self._sizes = {shard: [size] * self._job.steps for shard, (_, size) in slices.items()} or sizes
        if not self._participants(there):
            return "idle"
        self.rules.there(self._roster.value.samples(there))
        await self._node.persistently(lambda: self.journal.begin(self.version))
        late = self._gathering.begin(self.version, None if self.rules.is_async else self._cids(self._sizes))
        now_s = self.holdup.began()
        self._closing.began(self.version, self._sizes, now_s)
        for step in late:
            self._closing.arrived(step, self._gathering.samples(step), now_s)
        self._stage.enter(
            phase="training",
            version=self.version,
            window=self._place,
            attempt=attempt,
            slices=tuple((shard, start, size) for shard, (start, size) in slices.items()),
            **self._asked(there, plan),
        )
        await self.meanwhile.done()
        self._progress_s = time.monotonic()
        with self._node.waiting(self.holdup.unusual, self.holdup.hints):
            return await self._until_closed(plan)

    def _pace(self, there: Sequence[int]) -> Slices:
        """What the clients' speeds make of this version; nothing where sizes do not follow speed."""
        if self._pacer is None:
            return {}
        roster = self._roster.value
        classes = {shard: roster.classes([shard]) for shard in roster.samples()}
        return self._pacer.began(self.version, there, classes, time.monotonic())

    def _asked(self, there: Sequence[int], plan: Plan) -> dict[str, object]:
        """What else a version's state says."""
        asked: dict[str, object] = {}
        if isinstance(self._job.how, Async):
            asked["each"] = self._job.how.each(sum(self._roster.value.samples(there).values()), plan.windows)
        if self._job.adjust_logits is not None:
            roster = self._roster.value
            asked |= {"present_classes": roster.classes(there), "all_classes": roster.classes()}
        if self.rules.merges:
            servers = self._node.peers(Role.SPLIT_SERVER)
            steps = [sum(batches[k] > 0 for batches in self._sizes.values()) for k in range(self._job.steps)]
            asked |= {"merger": servers[self.version % len(servers)].id, "merged": tuple(steps)}
        return asked

    def _is_broken(self, there: Collection[int]) -> bool:
        """Whether what was merged cannot come about any more as it was asked for."""
        if not self.rules.merges:
            return self.rules.is_exact and self._gathering.is_stuck(there)
        merger = self._stage.state.merger
        fell_apart = merger is None or self._node.peer(merger) is None or set(there) != self._sizes.keys()
        return fell_apart or self.collector.has_lost

    def _cids(self, sizes: Sizes) -> list[Cid]:
        return [
            step_cid(self._stage.run, shard, self.version, self._attempt * self._job.steps + k)
            for shard, batches in sizes.items()
            for k, size in enumerate(batches)
            if size
        ]

    def _participants(self, there: Sequence[int]) -> list[int]:
        """Those who are there and have steps in the window."""
        return [shard for shard in there if any(self._sizes.get(shard, ()))]

    async def _until_closed(self, plan: Plan) -> Outcome:
        """Wait until there is enough for a version, or it is clear that there never will be."""
        patience_s = self._node.settings.patience_s
        while True:
            now_s, roster = time.monotonic(), self._roster.value
            there = roster.taking_part(now_s)
            self._refusals.check(there)
            if self._is_broken(there):
                return "broken"
            self._admit(there, plan)
            if self._closing.closes(there, now_s):
                return "enough"
            if there and not self._participants(there):
                return "deserted"
            if now_s >= self._progress_s + patience_s:
                raise RunFailed(
                    f"round {self.round + 1} stood still for {patience_s:g} s without the steps of "
                    f"{self.holdup.names()}. Start what is missing, or stands still, anew; then go on with --resume"
                )
            alarms = (self._closing.next_deadline_s(), roster.next_leave_s(now_s), self._progress_s + patience_s)
            self._awaited, self._alarm_s = frozenset(there), min(alarm for alarm in alarms if alarm > now_s)
            await self._roster.changed_within(self._alarm_s - now_s)

    def _admit(self, there: Sequence[int], plan: Plan) -> None:
        """Let those who joined since the window began take part in it, unless it was cut to those who were there."""
        if self._pacer is not None:
            return
        if new := [shard for shard in there if shard not in self._sizes]:
            sizes = plan.sizes(self._roster.value.samples(new), self._place % plan.windows)
            self._sizes |= sizes
            self._gathering.expect(self._cids(sizes))
            self._closing.expect(sizes)

    def _took(self, one: Contribution) -> None:
        """A part of a step is here, or of several."""
        now_s = self._progress_s = time.monotonic()
        if not (steps := self._gathering.completed(one.cid)):
            somebody_left = not self._sizes.keys() <= set(self._awaited)
            if somebody_left and self._is_broken(self._awaited):
                self._roster.touch()  # what just came is merged with what never will
            return
        for step in steps:
            self._refusals.counted(step)
            self._closing.arrived(step, self._gathering.samples(step), now_s)
            if self._pacer is not None:
                self._pacer.arrived(step, now_s)
        # Most arrivals change nothing: the window wakes only for those that end it, or make it end sooner.
        if self._closing.closes(self._awaited, now_s) or self._closing.next_deadline_s() < self._alarm_s:
            self._roster.touch()

    def _missing(self) -> list[int]:
        return self._closing.missing(self._roster.value.taking_part(time.monotonic()))

    # --- versions ---------------------------------------------------------------------------------------

    async def _commit(self, place_in_round: int) -> None:
        """Make the next version of what has come, record it, publish it; of nothing, one with the same weights."""
        sifted = self._sieve.sift(*self._gathering.take(), self.version, self._sizes)
        self._gathering.end()
        window, dropped = self.rules.weigh(sifted.window, self.version, self._sizes), sifted.dropped
        state = self._stage.state
        window_of = "" if self.rules.is_async else f", window {state.window + 1} of {state.windows}"
        roster = self._roster.value
        without = sorted((roster.samples().keys() | self.left) - set(roster.taking_part(time.monotonic())))
        said = f"round {self.round + 1}{window_of} (version {self.version})"
        chosen: Sequence[int] = ()
        try:
            check_losses(window, said)
            if window:
                chosen = self._master.step(window, version=self.version, sequential=self._job.local_lr is not None)
        except RunFailed:
            self.newest = self.proven
            raise
        self.proven = self.newest
        place = {"round": self.round, "window": place_in_round, "without": without, "memory": self.rules.state()}
        record = record_of(self.version, window, dropped, self._master.digest())
        how = {"clipped": sifted.clipped, "chosen": chosen, "refused": sifted.refused}
        record = msgspec.structs.replace(record, epoch=state.epoch, **place, **how)
        await self._node.persistently(self.journal.sync)
        await self._reign.record(lambda: self.ledger.put(record))
        self._take_state(Version(self.version + 1))
        await self._reign.recorded(self.newest[0])
        self._gathering.recorded()
        self._tally.counted(window, self.version, dropped, sifted.refused)
        self.version = Version(self.version + 1)
        self.publish_weights()
        self._stage.settle(dict.fromkeys(one.cid for one in window), dropped)

    def _take_state(self, version: Version) -> None:
        """The master is at this version now; blocking."""
        self.newest = version, self._master.state()
        self._packed = self._shelf.put(*self.newest)

    async def _report(self, windows: int) -> None:
        """Progress inside a round, if some is due."""
        if report := self._tally.window_report(windows, self.version, time.monotonic()):
            await self._node.persistently(lambda: self._folder.append_metrics(report))
            self._node.report(report)
