"""The client's shell: joins a run, makes its steps at every version, tests every version it is asked to."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import torch

from zsfl.client.driver import Batch, StepDriver
from zsfl.client.local import LocalParts
from zsfl.client.noise import Noise, noise_key
from zsfl.client.remote import RemoteBody
from zsfl.client.shard import ShardData
from zsfl.errors import ConfigError, Held, RemoteProtocolError, StaleWeights, Unavailable, ZsflError
from zsfl.ids import Cid, NodeCard, Role, RunId, Version, step_cid
from zsfl.learning.cuts import Cuts
from zsfl.learning.dryrun import check_shapes
from zsfl.learning.job import Job
from zsfl.learning.modes import Async, max_staleness
from zsfl.learning.skew import logit_shift
from zsfl.member import Answer, Member
from zsfl.node import BeatExtras, Node
from zsfl.spill.coded import SpillCoder
from zsfl.tensors.plan import CodecPlan
from zsfl.weights.follower import WeightsFollower
from zsfl.wire.fields import MAX_JOINED
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import Beat, Broadcast, Evaluated, Join, Ok, Remake, Reply, Request, RunState
from zsfl.wire.succession import Grant

DRY_RUN_SAMPLES = 2
HELD_TIMES = 3.0
"""How long a shard that somebody else holds is waited for, in times of how long it takes to know that one is gone."""
AT_ONCE, AT_ONCE_BYTES = 8, 4 << 20
"""Steps of one window that a shard has under way, and their activations together: enough to keep a server busy while
others travel. How many a server takes is a matter of its slots."""
PAUSE = 2.0
"""Async: before another step at the same version, how long the next version is waited for, in times of the step before.

Measured with 20 equal clients on two cores: 72 of 2,836 steps were a client's second at a version, and 8 % of all were
late. With 1.0 it was 787 of 2,869 and 30 %, and it took a fifth longer to the same accuracy.
"""

OVER = -1
"""The attempt of a run that is over: nothing more is asked for."""
Asked = tuple[int, RunId, Version, int]
"""Of which aggregator, run and version, and at which attempt."""


class ClientRole:
    """One node with one or many shards; each shard is a client of its own as far as learning goes."""

    def __init__(
        self,
        node: Node,
        job: Job,
        cuts: Cuts,
        shards: Sequence[int],
        device: torch.device,
        spills: Path,
    ) -> None:
        self._node = node
        self._job = job
        self._cuts = cuts
        self._shards = shards
        plan = CodecPlan.parse(node.settings.codec or job.codec)
        self._remote = RemoteBody(node, plan, random.Random(node.card.id))
        parts = {
            cut: LocalParts(job, cuts.model(cut), device, cuts.names(cut), self._noise())
            for cut in sorted({cuts.of(shard) for shard in shards})
        }
        weights = {
            cut: WeightsFollower(node, cuts.portion(cut), local.load, differences=plan.delta)
            for cut, local in parts.items()
        }
        self._member = Member(node, weights.values(), spills, SpillCoder(plan.spill[0], feedback=plan.feedback))
        self._drivers = {
            cut: StepDriver(node, local, weights[cut], self._remote, self._member) for cut, local in parts.items()
        }
        self._bound = max_staleness(job.how)
        self._begun_at: tuple[RunId, Version] | None = None
        self._tried: dict[int, tuple[RunId, Version, int]] = {}
        """By shard, at which attempt its steps of which version were begun last."""
        self._data: list[ShardData] = []
        self._server = node.serve(self._answer)
        self.hears = frozenset({Role.AGGREGATOR, Role.SPLIT_SERVER})

    def _noise(self) -> Noise | None:
        """What is added to activations, where the job protects them."""
        if self._job.protect is None:
            return None
        path = self._node.settings.runs / "noise" / f"{self._node.name}.key"
        return Noise(self._job.protect, noise_key(path) if self._job.protect.secret else b"")

    @property
    def data_port(self) -> int:
        """Where its spills are fetched."""
        return self._server.port

    def prepare(self) -> None:
        """Load the data and run the model's shapes dry; ConfigError when either does not fit."""
        self._data = [ShardData(self._job, shard) for shard in self._shards]
        rows = torch.arange(min(DRY_RUN_SAMPLES, len(self._data[0].train)))
        x, y = self._data[0].train[rows]
        for cut, driver in self._drivers.items():
            check_shapes(self._cuts.model(cut), x, y, self._job.loss, f"shard {self._shards[0]}")
            for warning in driver.local.warnings():
                self._node.note(warning, "warning")

    async def run(self) -> None:
        """Take part until the run is finished."""
        async with aclosing(self._member):
            await self._take_part()

    async def _take_part(self) -> None:
        run_shard = self._run_freely if isinstance(self._job.how, Async) else self._run_windows
        async with asyncio.TaskGroup() as tasks:
            others = [
                tasks.create_task(self._server.run(), name="data"),
                tasks.create_task(self._join(), name="join"),
                *(tasks.create_task(self._test(data), name=f"test {data.shard}") for data in self._data if data.test),
            ]
            shards = [tasks.create_task(run_shard(data), name=f"shard {data.shard}") for data in self._data]
            await asyncio.gather(*shards)
            for other in others:
                other.cancel()

    async def drain(self, timeout_s: float) -> None:
        """Nothing to hand over: a step in hand is made again, under the same cid, by whoever takes the shard."""

    async def control(self, request: Request) -> Reply:
        """Answer an aggregator, or somebody who would be one."""
        if isinstance(request, Grant):
            return self._member.promised(request, self._shards)
        raise RemoteProtocolError(f"{self._node.name} is a client and does not answer {type(request).__name__}")

    def joined(self, card: NodeCard) -> None:
        """A peer is there."""
        self._member.joined(card)
        if card.role is Role.SPLIT_SERVER:
            self._remote.joined(card)

    def lost(self, card: NodeCard, reason: str) -> None:
        """A peer is gone."""
        self._member.lost(card, reason)
        if card.role is Role.SPLIT_SERVER:
            self._remote.lost(card, reason)
            for driver in self._drivers.values():
                driver.lost(card.id)

    def heard(self, broadcast: Broadcast) -> None:
        """A peer said something."""
        self._member.heard(broadcast)
        if isinstance(broadcast, Beat) and broadcast.load is not None:
            self._remote.heard(broadcast.card.id, broadcast.load)

    def beat(self) -> BeatExtras:
        """Heartbeats repeat what is still offered."""
        return BeatExtras(offers=self._member.pending())

    def _answer(self, request: Request, _parts: Sequence[Buffer]) -> Answer | Awaitable[Answer]:
        if not isinstance(request, Remake):
            return self._member.answer(request)
        for cid, part in request.lost:
            for driver in self._drivers.values():
                driver.remake(cid, part)
        return Ok(), ()

    # --- joining ----------------------------------------------------------------------------------------

    async def _join(self) -> None:
        """Tell every aggregator that this node follows, one after another, which shards it holds."""
        told: NodeCard | None = None
        while True:
            aggregator = await self._member.until_aggregator(other_than=told)
            pieces = [self._data[first : first + MAX_JOINED] for first in range(0, len(self._data), MAX_JOINED)]
            if all([await self._joined_run(aggregator, piece) for piece in pieces]):
                told = aggregator

    async def _joined_run(self, aggregator: NodeCard, shards: Sequence[ShardData]) -> bool:
        """Whether the aggregator counts on these shards; ConfigError when it does not want them."""
        request = Join(node=self._node.card.id, shards=tuple(data.info for data in shards))
        settings = self._node.settings
        given_up_s = time.monotonic() + HELD_TIMES * settings.lost_after_s
        while True:
            try:
                answer = await self._node.link(aggregator).request(request, deadline_s=settings.request_s)
                answer.expect(Ok)
            except Held as held:
                # Whoever holds them may be gone without its being known yet.
                if time.monotonic() >= given_up_s:
                    raise ConfigError(str(held)) from held
                with self._node.waiting(f"its shards: {held}"):
                    await asyncio.sleep(settings.beat_s)
            except Unavailable:
                await asyncio.sleep(settings.beat_s)
                return False
            except ZsflError as error:
                raise ConfigError(str(error)) from error
            else:
                return True

    # --- steps ------------------------------------------------------------------------------------------

    async def _run_windows(self, data: ShardData) -> None:
        """Exact and elastic: make the steps of every window, each once."""
        done: Asked | None = None
        while True:
            state = await self._member.state.wait_for(lambda now, done=done: self._asked(now) not in (None, done))
            if state is None or self._member.check(state):
                return
            asked = self._asked(state)  # said now: who asks may be another one when the attempt is over
            if await self._attempt(self._make_window(data, state), state):
                done = asked

    def _driver_of(self, data: ShardData) -> StepDriver:
        return self._drivers[self._cuts.of(data.shard)]

    async def _make_window(self, data: ShardData, state: RunState) -> None:
        """Make the steps of a window: several at a time, unless each begins where the one before ended."""
        again = self._is_again(data, state)
        if self._job.local_lr is not None:
            await self._make_locally(data, state, self._job.local_lr, again)
            return
        steps = iter(range(self._job.steps))

        async def make_some() -> None:
            for k in steps:
                if (batch := self._batch(data, state, k)) is not None:
                    await self._make_step(data, state, batch, k, again)

        step_bytes = self._driver_of(data).local.step_bytes or AT_ONCE_BYTES  # of the first nothing is known
        at_once = min(AT_ONCE, self._job.steps, max(1, AT_ONCE_BYTES // step_bytes))
        makers = [asyncio.ensure_future(make_some()) for _ in range(at_once)]
        try:
            await asyncio.gather(*makers)
        finally:
            for maker in makers:
                maker.cancel()
            await asyncio.gather(*makers, return_exceptions=True)

    async def _make_locally(self, data: ShardData, state: RunState, rate: float, again: bool) -> None:
        driver = self._driver_of(data)
        weights = await driver.weights.get(state.version)
        for k in range(self._job.steps):
            if (batch := self._batch(data, state, k)) is not None:
                cid = self._cid(data, state, k)
                step = await driver.make(cid, state, k, weights, batch, self._shift(data, state), again=again)
                weights = driver.local.moved(weights, step, rate)

    def _cid(self, data: ShardData, state: RunState, k: int) -> Cid:
        return step_cid(state.run, data.shard, state.version, state.attempt * self._job.steps + k)

    def _is_again(self, data: ShardData, state: RunState) -> bool:
        """Whether steps of this version may have been made before: by this client, or by one that ran in its place.

        Of the latter only at the first version that this client hears of: those that come are made by it alone.
        """
        version = state.run, state.version
        if self._begun_at is None:
            self._begun_at = version
        asked = *version, state.attempt
        tried = self._tried.get(data.shard)
        again = version == self._begun_at or (tried is not None and tried[:2] == version and state.attempt <= tried[2])
        self._tried[data.shard] = asked
        return again

    def _batch(self, data: ShardData, state: RunState, k: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The samples of the k-th step of this window; None when this shard sits it out."""
        if not state.slices:
            return data.batch(state.round, state.window * self._job.steps + k, state.windows)
        start, size = next(((start, size) for shard, start, size in state.slices if shard == data.shard), (0, 0))
        return data.stream(start + k * size, size)

    async def _run_freely(self, data: ShardData) -> None:
        """Async: make one step after another, at the newest version, up to the quota."""
        mode = self._job.how
        quota = mode.quota if isinstance(mode, Async) else 1
        made: tuple[Asked | None, int] = None, 0
        while True:
            state = await self._member.state.wait_for(
                lambda now, made=made: self._asked(now) is not None and (self._asked(now) != made[0] or made[1] < quota)
            )
            if state is None or self._member.check(state):
                return
            asked = self._asked(state)
            k = made[1] if asked == made[0] else 0
            begun_s = time.monotonic()
            if (batch := data.free_batch(state.window, k, state.windows)) is None:
                made = asked, quota  # it sits this version out
            elif await self._attempt(self._make_step(data, state, batch, k, again=True), state):
                made = asked, k + 1
                if k + 1 < state.each:
                    continue
                with suppress(TimeoutError):  # a step at the next version, if that is near, is worth more
                    async with asyncio.timeout(PAUSE * (time.monotonic() - begun_s)):
                        await self._member.state.wait_for(lambda now, asked=asked: self._asked(now) != asked)

    async def _make_step(self, data: ShardData, state: RunState, batch: Batch, k: int, again: bool) -> None:
        driver = self._driver_of(data)
        weights = driver.weights.held(state.version) or await driver.weights.get(state.version)
        cid = self._cid(data, state, k)
        await driver.make(cid, state, k, weights, batch, self._shift(data, state), again=again)

    def _shift(self, data: ShardData, state: RunState) -> torch.Tensor | None:
        """What is added to the logits, where the job adjusts them."""
        if self._job.adjust_logits is None or not state.all_classes:
            return None
        seen = data.classes if self._job.adjust_logits == "client" else state.present_classes
        return logit_shift(seen, state.all_classes)

    def _asked(self, now: RunState | None) -> Asked | None:
        """What `now` asks for, if anything; of another aggregator, or the same one found again, it is asked anew."""
        if now is None or now.phase in ("waiting", "idle"):
            return None
        # Also where the steps of its last version were made already.
        attempt = OVER if now.phase in ("finished", "failed") else now.attempt
        return self._member.followed, now.run, now.version, attempt

    def _still_counts(self, state: RunState, followed: int, now: RunState | None) -> bool:
        """Whether steps made at `state` would still count."""
        if now is None or self._member.followed != followed or now.run != state.run:
            return False
        if now.version == state.version:
            return now.attempt == state.attempt
        return now.version - state.version <= self._bound

    async def _attempt(self, work: Coroutine[Any, Any, None], state: RunState) -> bool:
        """Do `work` while steps made at `state` count; False when it has to be asked for anew."""
        followed = self._member.followed
        try:
            await self._while_true(lambda now: self._still_counts(state, followed, now), work)
        except StaleWeights:
            pass  # the run moved on; the news may still be coming
        except Unavailable:
            if self._still_counts(state, followed, self._member.state.value) and state.merger is None:
                raise
        else:
            return True
        await asyncio.sleep(self._node.settings.beat_s)
        return False

    async def _while_true(self, holds: Callable[[RunState | None], bool], work: Coroutine[Any, Any, None]) -> None:
        """Do `work`, but give it up as soon as the run's state is such that it no longer matters."""
        working = asyncio.ensure_future(work)
        moot = asyncio.ensure_future(self._member.state.wait_for(lambda now: not holds(now)))
        try:
            await asyncio.wait({working, moot}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            working.cancel()
            moot.cancel()
            await asyncio.gather(working, moot, return_exceptions=True)

    # --- held-out test ----------------------------------------------------------------------------------

    async def _test(self, data: ShardData) -> None:
        """Test every version that is to be tested, whatever else goes on."""
        done: tuple[int, int] | None = None
        while True:
            state = await self._member.state.wait_for(
                lambda now, done=done: (
                    now is not None and now.tested is not None and (self._member.followed, now.evaluation) != done
                )
            )
            if state is None or state.tested is None:
                continue
            wanted, followed = state.evaluation, self._member.followed
            try:
                await self._while_true(
                    lambda now, wanted=wanted: now is not None and now.tested is not None and now.evaluation == wanted,
                    self._test_version(data, state.tested),
                )
                done = followed, wanted
            except (StaleWeights, Unavailable) as error:
                self._node.note(f"version {state.tested} could not be tested: {error}; trying again", "warning")
                await asyncio.sleep(self._node.settings.beat_s)

    async def _test_version(self, data: ShardData, version: Version) -> None:
        driver = self._driver_of(data)
        loss_sum, correct, weight, samples = await driver.test(data.shard, version, data.test_batches())
        result = Evaluated(
            node=self._node.card.id,
            shard=data.shard,
            version=version,
            samples=samples,
            weight=weight,
            correct=correct,
            loss_sum=loss_sum,
        )
        if aggregator := self._member.aggregator.value:
            await self._node.link(aggregator).request(result, deadline_s=self._node.settings.request_s)
