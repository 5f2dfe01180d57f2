"""One step from head to spill, whichever servers it takes, and its care until a version settles it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from zsfl.client.local import ClientWeights, LocalParts, StepInHand
from zsfl.client.remote import RemoteBody
from zsfl.errors import StaleWeights, StorageError, ZsflError
from zsfl.ids import Cid, NodeId, PartName, Version
from zsfl.member import Member
from zsfl.node import Node
from zsfl.spill.layout import SpillMeta
from zsfl.weights.follower import WeightsFollower
from zsfl.wire.messages import Backward, RunState, Step

Batch = tuple[torch.Tensor, torch.Tensor]


class StepDriver:
    """Drives the steps of all shards of one client that use the same cut."""

    def __init__(
        self,
        node: Node,
        local: LocalParts,
        weights: WeightsFollower[ClientWeights],
        remote: RemoteBody,
        member: Member,
    ) -> None:
        self._node = node
        self.local = local
        self.weights = weights
        """Of this cut's head and tail."""
        self._remote = remote
        self._member = member
        member.deleted.append(self._drop_settled)
        member.following.append(self._check_all)
        self._held: dict[Cid, tuple[StepInHand, NodeId]] = {}
        """Steps that no version has settled, and who spilled their body part."""
        self._driven_again: dict[Cid, asyncio.Task[None]] = {}
        self._put_again: dict[Cid, asyncio.Task[None]] = {}

    async def make(
        self,
        cid: Cid,
        state: RunState,
        k: int,
        weights: ClientWeights,
        batch: Batch,
        shift: torch.Tensor | None,
        *,
        again: bool,
    ) -> StepInHand:
        """Make a step at the version of `state`; returns once both its parts are spilled, its gradients in hand.

        `again`: it may have been made before.
        """
        start_s, timing = time.perf_counter(), self._node.counters.timing
        with timing("head_s"):
            step = self.local.begin(weights, cid, state.version, *batch, shift)
        step.again = again
        at, merged = state.merger, state.merged[k] if k < len(state.merged) else 0
        drive = self._drive_u_shaped if self.local.u_shaped else self._drive_label_sharing
        server, grad = await drive(weights, step, at, merged)
        with timing("back_s"):
            self.local.finish(weights, step, grad)
        with timing("spill_s"):
            await self._node.until_written(lambda: self._until_put(step))
        self._node.counters.add("steps")
        self._node.counters.add("step_s", time.perf_counter() - start_s)
        if not merged:  # of a merged batch no single step can be driven again: all of them are asked for anew
            self._held[cid] = step, server
            if not self._remote.has(server):
                self._replace_soon([cid])
        return step

    async def _drive_u_shaped(
        self, weights: ClientWeights, step: StepInHand, at: NodeId | None, merged: int
    ) -> tuple[NodeId, torch.Tensor | None]:
        server, _ = await self._remote.forward(
            cid=step.cid,
            version=step.version,
            seed=step.seed + 1,
            x=step.activations,
            want_grad=self.local.want_grad,
            at=at,
            merged=merged,
            use=lambda output: self._turn(weights, step, output),
        )
        return await self._backward(step, server, at, merged)

    def _turn(self, weights: ClientWeights, step: StepInHand, output: torch.Tensor) -> None:
        with self._node.counters.timing("tail_s"):
            self.local.turn(weights, step, output)

    async def _backward(
        self, step: StepInHand, holder: NodeId | None, at: NodeId | None, merged: int
    ) -> tuple[NodeId, torch.Tensor | None]:
        request = partial(Backward, **self._said_of(step, merged))
        if step.grad is None:
            raise TypeError("a backward needs the gradient at the cut")
        return await self._remote.backward(holder, request, step.activations, step.grad, at=at)

    async def _drive_label_sharing(
        self, _weights: ClientWeights | None, step: StepInHand, at: NodeId | None, merged: int
    ) -> tuple[NodeId, torch.Tensor | None]:
        shift = () if step.shift is None else tuple(step.shift.tolist())
        request = partial(Step, **self._said_of(step, merged), shift=shift)
        server, grad, step.loss_sum = await self._remote.step(request, step.activations, step.target, at=at)
        return server, grad

    def _said_of(self, step: StepInHand, merged: int) -> dict[str, Any]:
        """What Backward and Step say alike."""
        return {
            "cid": step.cid,
            "version": step.version,
            "seed": step.seed + 1,
            "n": step.n,
            "samples": step.samples,
            "want_grad": self.local.want_grad,
            "provenance": self._node.name,
            "again": step.again,
            "merged": merged,
        }

    async def _until_put(self, step: StepInHand) -> None:
        """Spill what head and tail contribute; returns once that is in place."""
        if (placing := self._put(step)) is not None:
            await asyncio.shield(placing)

    def _put(self, step: StepInHand) -> asyncio.Future[None] | None:
        """The same; what to wait for until it is in place, None where it is."""
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
        tensors = {f"grad/{name}": tensor for name, tensor in step.grads.items()}
        tensors |= {f"buffer/{name}": tensor for name, tensor in step.buffers.items()}
        return self._member.offer(self._member.spills.put(meta, tensors))

    def lost(self, server: NodeId) -> None:
        """A server is gone, and with it what it spilled and the aggregator has not got: drive those steps again."""
        self._replace_soon([cid for cid, (_, by) in self._held.items() if by == server])

    def _check_all(self) -> None:
        """There is another aggregator, or the same one again: it may not have got what the former one had."""
        self._replace_soon([cid for cid, (_, by) in self._held.items() if not self._remote.has(by)])

    def _replace_soon(self, cids: Sequence[Cid]) -> None:
        if cids:
            self._node.start(self._replace([(cid, "body") for cid in cids]), "replace what lost servers spilled")

    async def _replace(self, parts: Sequence[tuple[Cid, PartName]]) -> None:
        with suppress(ZsflError):  # then all of them may be needed
            parts = await self._member.needed(parts)
        for cid, _ in parts:
            if (held := self._held.get(cid)) and not self._remote.has(held[1]):
                self._begin_again(held[0], "the server that spilled it is gone")

    def remake(self, cid: Cid, part: PartName) -> None:
        """What this step contributed is lost, though it was acknowledged; a step that is not in hand is no matter."""
        if (held := self._held.get(cid)) is None:
            return
        step, server = held
        if part == "client":
            if cid not in self._put_again:
                self._put_again[cid] = self._node.start(self._put_once_more(step), f"spill {cid} again")
        elif cid not in self._driven_again:
            self._remote.avoid(server)
            self._begin_again(step, "its spill is lost")

    async def _put_once_more(self, step: StepInHand) -> None:
        try:
            with suppress(StorageError):  # it is asked for again
                await self._until_put(step)
        finally:
            del self._put_again[step.cid]

    def _begin_again(self, step: StepInHand, why: str) -> None:
        if step.cid not in self._driven_again:
            self._node.note(f"driving {step.cid} again: {why}")
            self._driven_again[step.cid] = self._node.start(self._drive_again(step), f"drive {step.cid} again")

    async def _drive_again(self, step: StepInHand) -> None:
        """Drive the body part until a server that is there has spilled it, or a version has settled the step."""
        step.again = True
        try:
            server: NodeId | None = None
            while server is None or not self._remote.has(server):
                if self.local.u_shaped:
                    server, _ = await self._backward(step, None, None, 0)
                else:
                    server, _ = await self._drive_label_sharing(None, step, None, 0)
            if step.cid in self._held:
                self._held[step.cid] = step, server
        except StaleWeights:
            self._held.pop(step.cid, None)
        finally:
            self._driven_again.pop(step.cid, None)

    def _drop_settled(self) -> None:
        """Spills were deleted: steps that a version settled need no care any more."""
        for cid in [cid for cid in self._held if not self._member.spills.holds(cid)]:
            del self._held[cid]
            if again := self._driven_again.pop(cid, None):
                again.cancel()

    async def test(
        self, shard: int, version: Version, batches: Iterator[Batch]
    ) -> tuple[float, float | None, float, int]:
        """Loss sum, correct samples (None without a metric), weight and samples of held-out batches at a version."""
        weights = await self.weights.get(version)
        loss_sum = weight = correct = 0.0
        samples, has_metric = 0, True
        while batch := next(batches, None):  # between two of them, steps have their turn
            x, y = batch
            hidden = self.local.head_infer(weights, x)
            scores: list[tuple[float, float | None, float]] = []

            def take(output: torch.Tensor, y: torch.Tensor = y, scores: list[Any] = scores) -> None:
                scores.append(self.local.score(weights, output, y, shard))

            await self._remote.infer(shard, version, hidden, take)
            loss, right, n = scores[-1]
            has_metric = right is not None
            loss_sum, correct, weight, samples = loss_sum + loss, correct + (right or 0.0), weight + n, samples + len(y)
        return loss_sum, correct if has_metric else None, weight, samples
