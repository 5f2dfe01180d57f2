"""The split server's shell."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import assert_never

import torch

from zsfl.errors import (
    BadShape,
    ConfigError,
    Rejected,
    RemoteProtocolError,
    StaleWeights,
    StorageError,
    Unavailable,
    ZsflError,
)
from zsfl.ids import BODY, Cid, NodeCard, Role, StepId, parse_cid
from zsfl.latest import Latest
from zsfl.learning.blame import said_of
from zsfl.learning.cuts import Cuts
from zsfl.learning.job import Job
from zsfl.learning.part import Part, PartWeights
from zsfl.learning.plan import attempts_of, steps_of
from zsfl.member import NOT_PUT, Member
from zsfl.node import BeatExtras, Node
from zsfl.spill.coded import SpillCoder
from zsfl.split_server.admission import Admission
from zsfl.split_server.body import BodyWorker, Done
from zsfl.split_server.holders import Holders
from zsfl.split_server.meeting import Meetings, Places
from zsfl.split_server.merging import MergePolicy
from zsfl.split_server.placing import Placing
from zsfl.split_server.queue import Answer, Waiting, Weights, WorkQueue, unpacked_size
from zsfl.tensors.codec import SPELLINGS, unpack
from zsfl.tensors.plan import CodecPlan
from zsfl.weights.follower import WeightsFollower
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import Backward, Broadcast, Forward, Infer, Output, Reply, Request, Spilled, Step

HAND_OVER_S = 0.02
"""How often a server that leaves asks whether the aggregator has got all that it holds."""
MAX_MET_BYTES = 4 << 30
"""Of requests that wait to be merged, which take no slots."""
BACKWARD_S = 1.0
"""How long a server that leaves waits for the backwards of forwards that it made: some may never be asked for."""
RELEASE_S = 2.0
"""And how long until the version of what it handed over is recorded, so that it leaves nothing on its disk; else it
deletes that when it starts again.
"""


class SplitServerRole:
    """Takes requests of any client while it has slots; holds nothing that cannot vanish."""

    def __init__(self, node: Node, job: Job, cuts: Cuts, device: torch.device, spills: Path) -> None:
        self._node = node
        self._cuts = cuts
        parts = {
            cut: Part(
                cuts.model(cut).body,
                "body",
                device,
                batch_norm=job.batch_norm,
                autocast=job.autocast,
                names=cuts.names(cut),
            )
            for cut in cuts.all
        }
        self._warnings = dict.fromkeys(warning for part in parts.values() for warning in part.warnings(job.steps))
        plan = CodecPlan.parse(node.settings.codec or job.codec)
        self._weights: WeightsFollower[Weights] = WeightsFollower(
            node, BODY, lambda state: {cut: part.load(state) for cut, part in parts.items()}, differences=plan.delta
        )
        self._member = Member(node, [self._weights], spills, SpillCoder(plan.spill[0], feedback=plan.feedback))
        self._admission = Admission(node.settings.slots)
        self._workers = {
            cut: BodyWorker(job, part, self._member.spills, node=node.name, slots=node.settings.slots)
            for cut, part in parts.items()
        }
        self._policy = MergePolicy()
        self._placing = Placing(self._member)
        self._queue = WorkQueue(
            cuts,
            self._weights,
            self._admission,
            self._work,
            may_merge=lambda cut: self._workers[cut].merges,
            pays=self._policy.pays,
            went_with=lambda cut, cid: self._workers[cut].went_with(cid),
            left=self._touched,
            placing=self._placing.of_turn,
            is_behind=self._member.spills.is_behind,
            same_k=job.local_lr is not None,
        )
        self._merges, self._shards = job.batch_norm == "merged", job.shards
        self._batches, self._width = job.steps, steps_of(job) * attempts_of(job)
        self._places = Places(MAX_MET_BYTES, job.steps, job.shards)
        self._forwards = Meetings(self._merge_forwards)
        self._backwards = Meetings(self._merge_backwards)
        self._steps = Meetings(self._merge_steps)
        self._news = Latest(None)
        """Touched whenever a drain may have come to its end."""
        holders = Holders(self._member.holder_of, job.shards)
        self._member.following.append(holders.forget)
        self._server = node.serve(self._answer, holders.permit)
        self.hears = frozenset({Role.AGGREGATOR})

    @property
    def data_port(self) -> int:
        """Where steps are taken, and spills fetched."""
        return self._server.port

    def prepare(self) -> None:
        """Say what makes the run inexact."""
        for warning in self._warnings:
            self._node.note(warning, "warning")

    async def run(self) -> None:
        """Serve until the run is finished."""
        async with aclosing(self._member), asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(self._server.run(), name="data")
            present = tasks.create_task(self._mind_the_aggregator(), name="aggregator")
            await self._member.state.wait_for(lambda now: now is not None and self._member.check(now))
            serving.cancel()
            present.cancel()

    async def drain(self, timeout_s: float) -> None:
        """Finish what is in hand, and stay until the aggregator has got what was spilled."""
        self._admission.drain()
        self._forwards.drain()
        self._steps.drain()
        try:
            async with asyncio.timeout(timeout_s):
                with suppress(TimeoutError):
                    async with asyncio.timeout(BACKWARD_S):
                        await self._news.wait_for(lambda _: self._is_idle and not self._awaits_backwards)
                await self._news.wait_for(lambda _: self._is_idle)
                while self._server.has_unsent or not await self._member.has_handed_over():
                    await self._news.changed_within(HAND_OVER_S)
                with suppress(TimeoutError):
                    async with asyncio.timeout(RELEASE_S):
                        await self._news.wait_for(lambda _: self._member.is_rid)
        except TimeoutError:
            self._node.note(
                f"leaving after {timeout_s:g} s, before all was finished and fetched: clients make those steps again",
                "warning",
            )

    @property
    def _is_idle(self) -> bool:
        """Whether no request is in hand."""
        return self._admission.idle and all(one.idle for one in (self._forwards, self._backwards, self._steps))

    @property
    def _awaits_backwards(self) -> bool:
        """Whether clients are about to ask for what only this server can do without beginning anew."""
        return self._member.aggregator.value is not None and any(one.cached for one in self._workers.values())

    async def control(self, request: Request) -> Reply:
        """A split server answers no control requests."""
        raise RemoteProtocolError(f"{self._node.name} is a split server and does not answer {type(request).__name__}")

    def joined(self, card: NodeCard) -> None:
        """A peer is there."""
        self._member.joined(card)

    def lost(self, card: NodeCard, reason: str) -> None:
        """A peer is gone."""
        self._member.lost(card, reason)
        self._news.touch()

    def heard(self, broadcast: Broadcast) -> None:
        """A peer said something."""
        self._member.heard(broadcast)
        self._news.touch()

    def beat(self) -> BeatExtras:
        """Heartbeats advertise slots, repeat what is still offered, and say who is there to be merged."""
        state = self._member.state.value
        meetings = (self._forwards, self._backwards, self._steps) if self._merges and state is not None else ()
        here = max((one.here(state.run, state.version) for one in meetings if state), key=len, default=())
        return BeatExtras(load=self._admission.load, offers=self._member.pending(), merging=here)

    async def _mind_the_aggregator(self) -> None:
        """Waiting aloud while there is none; giving up when none comes."""
        followed: NodeCard | None = None
        while True:
            followed = await self._member.until_aggregator(other_than=followed)

    # --- requests ---------------------------------------------------------------------------------------

    def _check(self, step: StepId) -> None:
        """A step that is never asked for would lie on this disk for ever."""
        if step.shard >= self._shards:
            raise RemoteProtocolError(f"there is no shard {step.shard}: the job has {self._shards}")
        if step.k >= self._width:
            raise RemoteProtocolError(f"there is no step {step.k} at a version: each shard has {self._width} at most")
        if self._member.run not in (None, step.run):  # whoever asks, or this server, is to hear of another run yet
            raise Unavailable(f"{self._node.name} takes steps of the run {self._member.run}, not of {step.run}")

    def _answer(self, request: Request, parts: Sequence[Buffer]) -> Answer | Awaitable[Answer]:
        if isinstance(request, Forward | Backward | Step):
            self._check(parse_cid(request.cid))
        match request:
            case Forward() | Backward() | Step() | Infer() if request.reply_codec not in SPELLINGS:
                raise BadShape(f"a reply is wanted as {request.reply_codec!r}, which {self._node.name} does not know")
            case Forward() | Backward() | Step() if request.merged:
                return self._answer_merged(request, parts)
            case Forward() | Backward() | Step():
                return self._queue.put(request, parts)
            case Infer():
                return self._queue.put(request, parts, self._server.asked_by or str(request.shard))
            case _:
                return self._member.answer(request)

    def _work(self, chosen: Sequence[Waiting], weights: PartWeights | None) -> list[Answer | ZsflError]:
        """The answers to requests of one kind, made in one pass where there are several."""
        worker, samples, start_s = self._workers[chosen[0].cut], 0, time.perf_counter()
        answers: list[Answer | ZsflError]
        with self._computing(0 if chosen[0].is_test else len(chosen)):
            match chosen[0].request:
                case Infer() as request:
                    x = unpack(request.input, chosen[0].parts[0])
                    answers = [self._output(worker.infer(_given(weights), x), request)]
                case Forward():
                    asked = [
                        (one.request, unpack(one.request.input, one.parts[0]))
                        for one in chosen
                        if isinstance(one.request, Forward)
                    ]
                    outputs = worker.forward_all(_given(weights), asked)
                    answers = [self._output(output, one) for output, (one, _) in zip(outputs, asked, strict=True)]
                    samples = sum(len(x) for _, x in asked)
                case Backward():
                    given = [
                        (
                            one.request,
                            unpack(one.request.grad, one.parts[0]),
                            None if one.request.input is None else unpack(one.request.input, one.parts[1]),
                        )
                        for one in chosen
                        if isinstance(one.request, Backward)
                    ]
                    answers = self._outcomes(worker.backward_all(weights, given), chosen)
                    samples = sum(len(grad) for _, grad, _ in given)
                case Step():
                    steps = [
                        (one.request, unpack(one.request.input, one.parts[0]), unpack(one.request.target, one.parts[1]))
                        for one in chosen
                        if isinstance(one.request, Step)
                    ]
                    answers = self._outcomes(worker.step_all(_given(weights), steps), chosen)
                    samples = sum(len(x) for _, x, _ in steps)
        kind, seconds = type(chosen[0].request).__name__, time.perf_counter() - start_s
        self._policy.measured(kind, len(chosen) > 1, samples, seconds)
        if len(chosen) > 1:
            self._node.counters.add("merged", len(chosen))
        if kind != "Infer":
            self._node.counters.add("queue_s", sum(start_s - one.came_s for one in chosen))
            self._node.counters.add("body_s", seconds)
        return answers

    def _output(self, output: torch.Tensor, request: Forward | Infer) -> Answer:
        spec, data = SPELLINGS[request.reply_codec].pack("output", output)
        self._node.counters.add("forwards")
        return Output(output=spec, load=self._admission.load), [data]

    def _outcomes(self, results: Sequence[Done | ZsflError], chosen: Sequence[Waiting]) -> list[Answer | ZsflError]:
        return [
            done if isinstance(done, ZsflError) else self._acknowledged(done, one.request.reply_codec)
            for done, one in zip(results, chosen, strict=True)
        ]

    def _acknowledged(self, done: Done, reply_codec: str) -> Answer:
        """The answer to a step, for when its spill is in place."""
        if done.offer is not None:
            self._placing.offer(done.offer)
        self._node.counters.add("steps")
        spec, parts = None, list[Buffer]()
        if done.grad is not None:
            spec, data = SPELLINGS[reply_codec].pack("grad", done.grad)
            parts.append(data)
        return Spilled(grad=spec, loss_sum=done.loss_sum, load=self._admission.load), parts

    def _touched(self) -> None:
        self._news.touch()

    @contextmanager
    def _computing(self, count: int = 1) -> Iterator[None]:
        """Learn from how long so many steps took, and tell the client what is wrong with batch or server."""
        start_s = time.perf_counter()
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise Unavailable(f"{self._node.name} is out of memory: {error}") from error
        except StorageError as error:
            self._member.in_trouble(NOT_PUT, error)
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, ConfigError) as error:
            raise Rejected(f"the body fails on this batch: {said_of(error)}") from error
        if count:
            self._admission.measured((time.perf_counter() - start_s) / count)

    # --- merged batches ---------------------------------------------------------------------------------

    async def _answer_merged(self, request: Forward | Backward | Step, parts: Sequence[Buffer]) -> Answer:
        """Wait for the other steps of the merged batch, without a slot; see `Meetings`."""
        step = parse_cid(request.cid)
        if step.version != request.version:
            raise RemoteProtocolError(f"step {request.cid} cannot be of version {request.version}")
        if not self._merges or request.merged > self._shards:
            raise Rejected(f"{request.merged} steps are to be merged, and this job merges none, or has fewer clients")
        try:
            self._admission.tests.stepped()
            with self._places.taken(step.shard, unpacked_size(request, parts)):
                await self._until_asked_for(step, request.merged)
                match request:
                    case Forward():
                        return await self._attend_forward(request, parts)
                    case Backward():
                        return await self._attend_backward(request, parts)
                    case Step():
                        return await self._attend_step(request, parts)
                    case _:
                        assert_never(request)
        finally:
            self._news.touch()

    async def _until_asked_for(self, step: StepId, merged: int) -> None:
        """Wait for the aggregator to ask for a step, as one of so many: whoever says otherwise keeps nobody waiting."""
        attempt, k = divmod(step.k, self._batches)
        at = step.version, attempt
        state = await self._member.state.wait_for(
            lambda now: now is not None and (now.run != step.run or (now.version, now.attempt) >= at)
        )
        if state is None or state.run != step.run or state.merger != self._node.card.id:
            raise Unavailable(f"{self._node.name} is not asked to merge steps of the run {step.run}")
        if (state.version, state.attempt) != at:
            raise StaleWeights(f"the merged batch of version {step.version} is over; redo the step at {state.version}")
        if k >= len(state.merged) or state.merged[k] != merged:
            raise Unavailable(f"the aggregator asks for no batch of {merged} steps at version {step.version}")

    async def _attend_forward(self, request: Forward, parts: Sequence[Buffer]) -> Answer:
        x = unpack(request.input, parts[0])
        return self._output(await self._forwards.attend(request.cid, request.merged, (request, x)), request)

    async def _attend_backward(self, request: Backward, parts: Sequence[Buffer]) -> Answer:
        grad = unpack(request.grad, parts[0])
        x = None if request.input is None else unpack(request.input, parts[1])
        done = await self._backwards.attend(request.cid, request.merged, (request, grad, x))
        return self._acknowledged(done, request.reply_codec)

    async def _attend_step(self, request: Step, parts: Sequence[Buffer]) -> Answer:
        x, target = unpack(request.input, parts[0]), unpack(request.target, parts[1])
        done = await self._steps.attend(request.cid, request.merged, (request, x, target))
        return self._acknowledged(done, request.reply_codec)

    async def _weights_of(self, step: StepId) -> tuple[PartWeights, BodyWorker]:
        cut = self._cuts.of(step.shard)
        return (await self._weights.get(step.version))[cut], self._workers[cut]

    async def _merge_forwards(self, given: Mapping[Cid, tuple[Forward, torch.Tensor]]) -> dict[Cid, torch.Tensor]:
        weights, worker = await self._weights_of(parse_cid(next(iter(given))))
        with self._computing():
            return worker.forward_merged(weights, given)

    async def _merge_backwards(
        self, given: Mapping[Cid, tuple[Backward, torch.Tensor, torch.Tensor | None]]
    ) -> dict[Cid, Done]:
        first = parse_cid(next(iter(given)))
        worker = self._workers[self._cuts.of(first.shard)]
        whole = all(x is not None for _, _, x in given.values())
        weights = (await self._weights_of(first))[0] if whole else None
        with self._computing():
            done = worker.backward_merged(weights, given)
        return await self._placing.placed(done)

    async def _merge_steps(self, given: Mapping[Cid, tuple[Step, torch.Tensor, torch.Tensor]]) -> dict[Cid, Done]:
        weights, worker = await self._weights_of(parse_cid(next(iter(given))))
        with self._computing():
            done = worker.step_merged(weights, given)
        return await self._placing.placed(done)


def _given(weights: PartWeights | None) -> PartWeights:
    if weights is None:
        raise TypeError("a forward needs weights")
    return weights
