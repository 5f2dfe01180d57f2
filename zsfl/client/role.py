"""The client's shell: joins a run, makes its step of every window, tests every version it is asked to."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from zsfl.client.local import ClientWeights, LocalParts, StepInHand
from zsfl.client.remote import RemoteBody
from zsfl.compute import compute
from zsfl.errors import ConfigError, RemoteProtocolError, StaleWeights, Unavailable, ZsflError
from zsfl.ids import NodeCard, NodeId, Role, Version, step_cid
from zsfl.learning.batches import Batches, batch_indices
from zsfl.learning.dryrun import check_shapes
from zsfl.learning.job import Job
from zsfl.learning.model import SplitModel
from zsfl.member import Member
from zsfl.node import BeatExtras, Node
from zsfl.spill.layout import SpillMeta
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import (
    Backward,
    Beat,
    Broadcast,
    Evaluated,
    Join,
    Ok,
    Phase,
    Reply,
    Request,
    RunState,
    ShardInfo,
    Step,
)

EVALUATION_BATCH = 512
"""Held-out samples in one request."""
DRY_RUN_SAMPLES = 2

Asked = tuple[int, Phase, Version, int]
"""Of which aggregator, phase, version, number of the evaluation."""


class ShardData:
    """The samples of one shard. They never leave this process."""

    def __init__(self, job: Job, shard: int) -> None:
        train, test = job.data(shard, job.shards)
        self._job = job
        self.shard = shard
        self.train = Batches(train)
        self.test = None if test is None or len(test) == 0 else Batches(test)  # type: ignore[arg-type]
        self._order: tuple[int, list[torch.Tensor]] = (-1, [])

    @property
    def info(self) -> ShardInfo:
        """How many samples there are."""
        tested = 0 if self.test is None else len(self.test)
        return ShardInfo(shard=self.shard, train_samples=len(self.train), test_samples=tested)

    def batch(self, round_: int, window: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The samples of one window of one round; None when this shard has none left in that round."""
        if self._order[0] != round_:
            job = self._job
            order = batch_indices(job.seed, self.shard, round_, len(self.train), job.batch_size, job.shuffle)
            self._order = (round_, order)
        batches = self._order[1]
        return self.train[batches[window]] if window < len(batches) else None

    def test_batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """All held-out samples in order."""
        if self.test is None:
            return []
        return [self.test[rows] for rows in torch.arange(len(self.test)).split(EVALUATION_BATCH)]


class ClientRole:
    """One node with one or many shards; each shard is a client of its own as far as learning goes."""

    def __init__(
        self,
        node: Node,
        job: Job,
        model: SplitModel,
        shards: Sequence[int],
        device: torch.device,
        spills: Path,
    ) -> None:
        self._node = node
        self._job = job
        self._model = model
        self._shards = shards
        self._local = LocalParts(job, model, device)
        self._member = Member(node, "client", self._local.load, spills)
        self._remote = RemoteBody(node, node.settings.codec or job.codec, random.Random(node.card.id))
        self._data: list[ShardData] = []
        self._server = node.serve(self._answer)
        self.data_port = self._server.port

    async def prepare(self) -> None:
        """Load the data and run the model's shapes dry; ConfigError when either does not fit."""
        self._data = await compute(lambda: [ShardData(self._job, shard) for shard in self._shards])
        rows = torch.arange(min(DRY_RUN_SAMPLES, len(self._data[0].train)))
        x, y = self._data[0].train[rows]
        await compute(check_shapes, self._model, x, y, self._job.loss)
        for warning in self._local.warnings():
            self._node.note(warning, "warning")

    async def run(self) -> None:
        """Take part until the run is finished."""
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(self._server.run(), name="data")
            joining = tasks.create_task(self._join(), name="join")
            shards = [tasks.create_task(self._run_shard(data), name=f"shard {data.shard}") for data in self._data]
            await asyncio.gather(*shards)
            await self._member.close()
            serving.cancel()
            joining.cancel()

    async def drain(self, timeout_s: float) -> None:
        """Nothing to hand over: a step in hand is made again, under the same cid, by whoever takes the shard."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._member.close()

    async def control(self, request: Request) -> Reply:
        """A client answers no control requests."""
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

    def heard(self, broadcast: Broadcast) -> None:
        """A peer said something."""
        self._member.heard(broadcast)
        if isinstance(broadcast, Beat) and broadcast.load is not None:
            self._remote.heard(broadcast.card.id, broadcast.load)

    def beat(self) -> BeatExtras:
        """Heartbeats repeat what is still offered."""
        return BeatExtras(offers=self._member.pending())

    async def _answer(self, request: Request, _parts: Sequence[Buffer]) -> tuple[Reply, Sequence[Buffer]]:
        return await self._member.answer(request)

    # --- joining ----------------------------------------------------------------------------------------

    async def _join(self) -> None:
        """Tell every aggregator that this node follows, one after another, which shards it holds."""
        told: NodeCard | None = None
        while True:
            aggregator = await self._member.until_aggregator(other_than=told)
            if await self._joined_run(aggregator):
                told = aggregator

    async def _joined_run(self, aggregator: NodeCard) -> bool:
        request = Join(node=self._node.card.id, shards=tuple(data.info for data in self._data))
        try:
            answer = await self._node.link(aggregator).request(request, deadline_s=self._node.settings.request_s)
            answer.expect(Ok)
        except Unavailable:
            await asyncio.sleep(self._node.settings.beat_s)
            return False
        except ZsflError as error:
            raise ConfigError(str(error)) from error
        return True

    # --- steps ------------------------------------------------------------------------------------------

    async def _run_shard(self, data: ShardData) -> None:
        done: Asked | None = None
        while True:
            state = await self._member.state.wait_for(lambda now, done=done: self._asked(now) not in (None, done))
            if state is None or self._member.check(state):
                return
            asked = self._asked(state)
            try:
                if state.phase == "training":
                    await self._train(data, state)
                elif state.phase == "evaluating":
                    await self._evaluate(data, state)
            except (StaleWeights, Unavailable) as error:
                if isinstance(error, Unavailable) and self._asked(self._member.state.value) == asked:
                    raise
                # The run moved on, or lost its aggregator, while this was under way; the news may still be coming.
                await asyncio.sleep(self._node.settings.beat_s)
                continue
            done = asked

    def _asked(self, now: RunState | None) -> Asked | None:
        """What `now` asks for, if anything; of another aggregator, or the same one found again, it is asked anew."""
        if now is None or now.phase in ("waiting", "idle"):
            return None
        return self._member.followed, now.phase, now.version, now.evaluation

    async def _train(self, data: ShardData, state: RunState) -> None:
        batch = await compute(data.batch, state.round, state.window)
        if batch is None:
            return
        weights = await self._member.weights.get(state.version)
        cid = step_cid(state.run, data.shard, state.version)
        step = await compute(self._local.begin, weights, cid, state.version, *batch)
        drive = self._drive_u_shaped if self._local.u_shaped else self._drive_label_sharing
        server, grad = await drive(weights, step)
        await self._spill(weights, step, grad)
        self._node.counters.add("steps")
        self._node.start(self._see_it_counted(step, server), f"hold {cid}")

    async def _drive_u_shaped(self, weights: ClientWeights, step: StepInHand) -> tuple[NodeId, torch.Tensor | None]:
        server, output = await self._remote.forward(
            cid=step.cid, version=step.version, seed=step.seed + 1, x=step.activations
        )
        await compute(self._local.turn, weights, step, output)
        return await self._backward(step, server)

    async def _backward(self, step: StepInHand, holder: NodeId | None) -> tuple[NodeId, torch.Tensor | None]:
        request = partial(
            Backward,
            cid=step.cid,
            version=step.version,
            seed=step.seed + 1,
            n=step.n,
            samples=step.samples,
            want_grad=self._local.want_grad,
            provenance=self._node.name,
        )
        if step.grad is None:
            raise TypeError("a backward needs the gradient at the cut")
        return await self._remote.backward(holder, request, step.activations, step.grad)

    async def _drive_label_sharing(
        self, _weights: ClientWeights, step: StepInHand
    ) -> tuple[NodeId, torch.Tensor | None]:
        request = partial(
            Step,
            cid=step.cid,
            version=step.version,
            seed=step.seed + 1,
            n=step.n,
            samples=step.samples,
            want_grad=self._local.want_grad,
            provenance=self._node.name,
        )
        server, grad, step.loss_sum = await self._remote.step(request, step.activations, step.target)
        return server, grad

    async def _spill(self, weights: ClientWeights, step: StepInHand, grad: torch.Tensor | None) -> None:
        meta = SpillMeta(
            cid=step.cid,
            part="client",
            version=step.version,
            n=step.n,
            samples=step.samples,
            loss_sum=step.loss_sum,
            client=self._node.name,
            node=self._node.name,
        )

        def finish() -> object:
            self._local.finish(weights, step, grad)
            tensors = {f"grad/{name}": tensor for name, tensor in step.grads.items()}
            tensors |= {f"buffer/{name}": tensor for name, tensor in step.buffers.items()}
            return self._member.spills.put(meta, tensors)

        self._member.offer(await compute(finish))  # type: ignore[arg-type]

    async def _see_it_counted(self, step: StepInHand, server: NodeId) -> None:
        """Until a version settles the step, drive its body part again whenever the server that spilled it is gone."""
        settled = asyncio.ensure_future(
            self._member.state.wait_for(lambda now: now is None or now.version != step.version)
        )
        driving = asyncio.ensure_future(self._keep_spilled(step, server))
        try:
            await asyncio.wait({settled, driving}, return_when=asyncio.FIRST_COMPLETED)
            if not settled.done():
                await driving
        finally:
            settled.cancel()
            driving.cancel()
            await asyncio.gather(settled, driving, return_exceptions=True)

    async def _keep_spilled(self, step: StepInHand, server: NodeId) -> None:
        while True:
            await self._remote.until_lost(server)
            self._node.note(f"the server that spilled {step.cid} is gone; driving it again")
            try:
                if self._local.u_shaped:
                    server, _ = await self._backward(step, None)
                else:
                    server, _ = await self._drive_label_sharing(None, step)  # type: ignore[arg-type]
            except StaleWeights:
                return

    # --- held-out test ----------------------------------------------------------------------------------

    async def _evaluate(self, data: ShardData, state: RunState) -> None:
        weights = await self._member.weights.get(state.version)
        loss_sum = weight = correct = 0.0
        samples, has_metric = 0, self._job.metric is not None
        for x, y in await compute(data.test_batches):
            hidden = await compute(self._local.head_infer, weights, x)
            output = await self._remote.infer(state.version, hidden)
            loss, right, n = await compute(self._local.score, weights, output, y)
            loss_sum, correct, weight, samples = (
                loss_sum + loss,
                correct + (right or 0.0),
                weight + n,
                samples + len(y),
            )
        result = Evaluated(
            shard=data.shard,
            version=state.version,
            samples=samples,
            weight=weight,
            correct=correct if has_metric else None,
            loss_sum=loss_sum,
        )
        if aggregator := self._member.aggregator.value:
            await self._node.link(aggregator).request(result, deadline_s=self._node.settings.request_s)
