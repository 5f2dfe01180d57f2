"""The body, as a client sees it: whichever split server is free takes the request, another if that one fails."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import TypeVar

import torch

from zsfl.client.line import Line
from zsfl.client.packing import AtCut, Outgoing, Packing
from zsfl.client.routing import MAX_SHUN_S, ServerChooser
from zsfl.errors import (
    BadShape,
    Busy,
    ConfigError,
    DeadlineExceeded,
    InputNeeded,
    NoPeer,
    ProtocolError,
    Rejected,
    SpillFull,
    StaleWeights,
    Unavailable,
    ZsflError,
)
from zsfl.ids import Cid, NodeCard, NodeId, Version
from zsfl.ids import Role as NodeRole
from zsfl.latest import Latest
from zsfl.learning.blame import own_line
from zsfl.node import Node
from zsfl.tensors.choice import CodecChooser, Role
from zsfl.tensors.codec import Codec
from zsfl.tensors.plan import CodecPlan
from zsfl.tensors.spec import TensorSpec
from zsfl.wire.connection import Answer
from zsfl.wire.fields import Load
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import Backward, Forward, Infer, Output, Request, Spilled, Step
from zsfl.wire.trunk import Trunk

Made = tuple[Request, Sequence[Buffer]]
Make = Callable[[Packing], Made]
Use = Callable[[torch.Tensor], object]
_Taken = TypeVar("_Taken")
Take = Callable[[NodeId, Answer], _Taken]
"""Makes of an answer what it was asked for; BadShape or RemoteProtocolError where it is not that."""
_RAW = Codec()
AGAIN_S, MAX_AGAIN_S = 0.05, 1.0
"""How long to wait before the one server that may be asked is asked again; twice as long after each failure."""


class RemoteBody:
    """Runs the body on split servers. Every method lasts `patience_s` at most, then raises Unavailable."""

    def __init__(self, node: Node, plan: CodecPlan, rng: random.Random) -> None:
        self._node = node
        self._plan = plan
        self._codecs = CodecChooser()
        self._chooser = ServerChooser(rng)
        self._connections: dict[NodeId, tuple[Trunk, Packing]] = {}
        self._servers = Latest(None)
        self._answers = Latest(None)
        """Touched at every answer, and whatever else may make room at a server."""
        self._line = Line()
        self._left_s = -math.inf
        """When a split server was lost last."""

    def joined(self, card: NodeCard) -> None:
        """A split server is there."""
        plan = self._plan.agreed(self._node.peer_codecs.get(card.id, ()))
        packing = Packing(card.id, plan, self._codecs)
        trunk = Trunk(lambda: self._node.connect(card, card.data_port), self._node.settings.connections)
        self._connections[card.id] = trunk, packing
        self._chooser.joined(card.id)
        self._changed()

    def lost(self, card: NodeCard, reason: str) -> None:
        """A split server is gone: what it was asked fails, and is asked of another."""
        if held := self._connections.pop(card.id, None):
            held[0].close(f"is gone ({reason})")
            self._left_s = time.monotonic()
        self._codecs.lost(card.id)
        self._chooser.lost(card.id)
        self._changed()

    def heard(self, server: NodeId, load: Load) -> None:
        """A split server said how busy it is."""
        self._chooser.heard(server, load)
        self._answers.touch()
        self._line.call()

    def _changed(self) -> None:
        self._servers.touch()
        self._answers.touch()
        self._line.call()

    def has(self, server: NodeId) -> bool:
        """Whether this server is still there."""
        return server in self._connections

    def avoid(self, server: NodeId) -> None:
        """What this server acknowledged does not reach the aggregator."""
        self._chooser.unreached(server, time.monotonic())

    def codecs_in_use(self, server: NodeId) -> dict[Role, Codec]:
        """What was chosen for this server, where the job leaves that open."""
        return self._codecs.settled(server)

    async def until_lost(self, server: NodeId) -> None:
        """Returns when this server is gone."""
        await self._servers.wait_for(lambda _: not self.has(server))

    async def infer(self, shard: int, version: Version, x: torch.Tensor, use: Use = lambda _: None) -> torch.Tensor:
        """The body's output in evaluation mode; `use` as in `forward`."""

        sent = Outgoing("input", x, test=True)

        def make(packing: Packing) -> Made:
            spec, data = sent.packed(packing)
            reply_codec = sent.reply_codec(packing, "output")
            return Infer(shard=shard, version=version, input=spec, reply_codec=reply_codec), [data]

        return (await self._ask(make, self._output_of(sent, use), test=True))[1]

    async def forward(
        self,
        *,
        cid: Cid,
        version: Version,
        seed: int,
        x: torch.Tensor,
        want_grad: bool = True,
        at: NodeId | None = None,
        merged: int = 0,
        use: Use = lambda _: None,
    ) -> tuple[NodeId, torch.Tensor]:
        """The body's output in training mode, and who holds its graph; with `at` only that server is asked.

        `use` is given the output: where it fails, that of another server may do better.
        """
        sent = Outgoing("input", x)

        def make(packing: Packing) -> Made:
            spec, data = sent.packed(packing)
            request = Forward(
                cid=cid,
                version=version,
                seed=seed,
                input=spec,
                want_grad=want_grad,
                reply_codec=sent.reply_codec(packing, "output"),
                merged=merged,
            )
            return request, [data]

        return await self._ask(make, self._output_of(sent, use), at)

    async def backward(
        self,
        holder: NodeId | None,
        request: Callable[..., Backward],
        x: torch.Tensor,
        grad: torch.Tensor,
        at: NodeId | None = None,
    ) -> tuple[NodeId, torch.Tensor | None]:
        """Who spilled the body's contribution, and the gradient of its input if the request wants it.

        The holder of the graph is asked first; anybody else (with `at` only that server) gets the input again and
        recomputes.
        """
        sent_grad, sent_input = Outgoing("grad", grad, "gradient"), Outgoing("input", x)

        def make_short(packing: Packing) -> Made:
            spec, data = sent_grad.packed(packing)
            return request(grad=spec, input=None, reply_codec=sent_grad.reply_codec(packing, "gradient")), [data]

        def make(packing: Packing) -> Made:
            (grad_spec, grad_data), (spec, data) = sent_grad.packed(packing), sent_input.packed(packing)
            reply_codec = sent_grad.reply_codec(packing, "gradient")
            return request(grad=grad_spec, input=spec, reply_codec=reply_codec, again=True), [grad_data, data]

        if at is not None:
            for make_one in (make_short, make, make):  # others of the merged batch may have sent no input
                with suppress(InputNeeded):
                    return await self._ask(make_one, self._grad_of(sent_grad, x), at)
        elif holder is not None and holder in self._connections:
            with suppress(InputNeeded, Unavailable, SpillFull, BadShape):
                await self._until_room_at(holder)
                return holder, self._grad_of(sent_grad, x)(holder, await self._ask_one(holder, make_short))
            self._node.counters.add("recomputed")
        return await self._ask(make, self._grad_of(sent_grad, x), at)

    async def step(
        self, request: Callable[..., Step], x: torch.Tensor, target: torch.Tensor, at: NodeId | None = None
    ) -> tuple[NodeId, torch.Tensor | None, float]:
        """Label sharing: who spilled the contribution, the gradient of the input if wanted, the loss sum."""
        sent_input, sent_target = Outgoing("input", x), _RAW.pack("target", target)
        tried: dict[str, bool] = {}

        def make(packing: Packing) -> Made:
            (spec, data), (target_spec, target_data) = sent_input.packed(packing), sent_target
            reply_codec = sent_input.reply_codec(packing, "gradient")
            body = request(input=spec, target=target_spec, reply_codec=reply_codec, **tried)
            tried["again"] = True
            return body, [data, target_data]

        take_grad = self._grad_of(sent_input, x)

        def take(server: NodeId, answer: Answer) -> tuple[torch.Tensor | None, float]:
            return take_grad(server, answer), answer.expect(Spilled).loss_sum or 0.0

        server, (grad, loss_sum) = await self._ask(make, take, at)
        return server, grad, loss_sum

    async def _ask_at(self, server: NodeId, make: Make) -> tuple[NodeId, Answer]:
        """Ask this server, once it is known, until it answers; Unavailable as soon as it is gone.

        Not a matter of the chooser: what waits there for others takes no slot.
        """
        pause_s, trouble = AGAIN_S, "it is not known yet"
        try:
            async with asyncio.timeout(self._node.settings.patience_s):
                await self._servers.wait_for(lambda _: self.has(server))
                while True:
                    try:
                        return server, await self._request(server, make)
                    except (Unavailable, SpillFull) as error:
                        if not self.has(server):
                            raise Unavailable(f"the server that merges is gone: {error}") from error
                        self._node.counters.add("busy" if isinstance(error, Busy) else "retries")
                        asked_s = error.retry_after_s if isinstance(error, Busy) else 0.0
                        trouble = str(error)
                    await self._until_lost_for(server, max(pause_s, min(asked_s, MAX_SHUN_S)))
                    pause_s = min(2 * pause_s, MAX_AGAIN_S)
        except TimeoutError:
            raise NoPeer(
                f"the server that merges took no step for {self._node.settings.patience_s:g} s; "
                f"the last trouble was: {trouble}"
            ) from None

    async def _until_lost_for(self, server: NodeId, seconds: float) -> None:
        """Returns when this server is gone, or after so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.until_lost(server)

    async def _ask(
        self, make: Make, take: Take[_Taken], at: NodeId | None = None, *, test: bool = False
    ) -> tuple[NodeId, _Taken]:
        """Ask one server after another until one gives what `take` can use.

        What all that are there refuse for good, or answer wrongly, is raised: one alone may be out of order. Where one
        alone is there, another that was there lately is waited for, as for any server.
        """
        if at is not None:
            server, answer = await self._ask_at(at, make)
            return server, take(server, answer)
        deadline = time.monotonic() + self._node.settings.patience_s
        trouble = "there is no split server"
        wrong: set[NodeId] = set()
        while time.monotonic() < deadline:
            server = self._chooser.pick(time.monotonic())
            if server is None:
                deadline = await self._until_free(deadline)
                continue
            try:
                return server, take(server, await self._ask_one(server, make, test=test))
            except (StaleWeights, InputNeeded):
                raise
            except (Unavailable, SpillFull) as error:
                trouble = str(error)
                if isinstance(error, Busy) and test:  # one that is there, and may have room for steps all the same
                    await asyncio.sleep(min(error.retry_after_s, MAX_SHUN_S))
                    deadline = time.monotonic() + self._node.settings.patience_s
            except (ConfigError, ProtocolError, Rejected) as error:
                wrong.add(server)
                if wrong.issuperset(self._connections) and not self._may_be_contradicted(wrong):
                    if len(wrong) > 1:
                        raise
                    raise self._said_by(server, error) from error
                trouble = str(error)
                self._node.counters.add("retries")
                self._chooser.refused(server, time.monotonic(), MAX_SHUN_S)
        raise NoPeer(
            f"no split server took a step for {self._node.settings.patience_s:g} s; the last trouble was: {trouble}"
        )

    def _may_be_contradicted(self, wrong: set[NodeId]) -> bool:
        """Whether one server alone says so, and another was there lately."""
        return len(wrong) == 1 and time.monotonic() < self._left_s + self._node.settings.patience_s

    def _said_by(self, server: NodeId, error: ZsflError) -> ZsflError:
        held = self._connections.get(server)
        name = held[0].peer if held else server
        return type(error)(
            f"{error} (only {name} says so, and no other split server is there to ask: if that one is at fault, "
            "start another and then this client again)"
        )

    async def _ask_one(self, server: NodeId, make: Make, *, test: bool = False) -> Answer:
        self._chooser.asked(server)  # before anything is waited for: it was picked because it had room
        try:
            return await self._request(server, make)
        except Busy as busy:
            self._node.counters.add("busy")
            if not test:
                self._chooser.refused(server, time.monotonic(), busy.retry_after_s)
            raise
        except DeadlineExceeded:
            self._node.counters.add("retries")
            self._chooser.silent(server, time.monotonic())
            raise
        except (SpillFull, Unavailable):
            self._node.counters.add("retries")
            self._chooser.refused(server, time.monotonic())
            raise
        finally:
            self._chooser.answered(server)
            self._answers.touch()
            self._line.call(1)

    async def _request(self, server: NodeId, make: Make) -> Answer:
        held = self._connections.get(server)
        if held is None:
            raise NoPeer("that split server is gone")
        connection, packing = held
        with packing.under_way():
            start_s, add = time.perf_counter(), self._node.counters.add
            body, parts = make(packing)
            packed_s = time.perf_counter()
            answer = await connection.request(body, parts, deadline_s=self._node.settings.request_s)
        if not isinstance(body, Infer):
            add("pack_s", packed_s - start_s)
            add("asked_s", time.perf_counter() - packed_s)
        self._chooser.served(server)
        if isinstance(answer.body, Output | Spilled):
            self._chooser.heard(server, answer.body.load)
        return answer

    async def _until_room_at(self, server: NodeId) -> None:
        """Wait while this server is full of requests of ours; the next room it has is kept for this one."""
        with self._chooser.due(server):
            await self._answers.wait_for(lambda _: not self._chooser.is_full(server))

    async def _until_free(self, deadline: float) -> float:
        """Wait until a server may be worth a try. The deadline, moved by what was spent behind our own requests."""
        start = time.monotonic()
        free_s, behind = self._chooser.next_free_s(), self._chooser.occupied
        until = free_s if behind else min(deadline, math.inf if free_s is None else free_s)
        aloud = nullcontext() if behind else self._node.waiting(self._lacking, self._hints)
        with aloud, suppress(TimeoutError):
            async with asyncio.timeout(None if until is None else max(0.0, until - start)):
                await self._line.wait()
        return deadline + (time.monotonic() - start if behind else 0.0)

    def _lacking(self) -> str:
        if self._connections:
            return "a split server, as those that are there take no steps"
        return "a split server" + ", as none is left" * bool(self._hints())

    def _hints(self) -> tuple[str, ...]:
        return () if self._connections else self._node.hints_of_gone(NodeRole.SPLIT_SERVER)

    def _output_of(self, sent: Outgoing, use: Use) -> Take[torch.Tensor]:
        def take(server: NodeId, answer: Answer) -> torch.Tensor:
            output = self._unpacked("output", sent, server, answer.expect(Output).output, answer)
            try:
                use(output)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                shape = f"{str(output.dtype).removeprefix('torch.')} {tuple(output.shape)}"
                raise BadShape(f"the output {shape} of {server} cannot be used: {error}{own_line(error)}") from error
            return output

        return take

    def _grad_of(self, sent: Outgoing, x: torch.Tensor) -> Take[torch.Tensor | None]:
        def take(server: NodeId, answer: Answer) -> torch.Tensor | None:
            spec = answer.expect(Spilled).grad
            if spec is None:
                return None
            grad = self._unpacked("gradient", sent, server, spec, answer)
            if (grad.shape, grad.dtype) != (x.shape, x.dtype):
                raise BadShape(f"the gradient from {server} is {tuple(grad.shape)}, the input was {tuple(x.shape)}")
            return grad

        return take

    def _unpacked(self, role: AtCut, sent: Outgoing, server: NodeId, spec: TensorSpec, answer: Answer) -> torch.Tensor:
        held = self._connections.get(server)
        packing = Packing(server, self._plan, self._codecs) if held is None else held[1]
        return packing.unpack(role, sent.asked, spec, answer)
