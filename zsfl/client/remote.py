"""The body, as a client sees it: whichever split server is free takes the request, another if that one fails."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from zsfl.client.routing import ServerChooser
from zsfl.errors import Busy, DeadlineExceeded, InputNeeded, NoPeer, SpillFull, Unavailable
from zsfl.ids import Cid, NodeCard, NodeId, Version
from zsfl.latest import Latest
from zsfl.node import Node
from zsfl.tensors.codec import Codec, negotiate, unpack
from zsfl.wire.connection import Answer, Connection
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import Backward, Forward, Infer, Load, Output, Request, Spilled, Step

Made = tuple[Request, Sequence[Buffer]]


class RemoteBody:
    """Runs the body on split servers. Every method lasts `patience_s` at most, then raises Unavailable."""

    def __init__(self, node: Node, codec: str, rng: random.Random) -> None:
        self._node = node
        self._codec = codec
        self._chooser = ServerChooser(rng)
        self._connections: dict[NodeId, tuple[Connection, Codec]] = {}
        self._servers = Latest(0)

    def joined(self, card: NodeCard) -> None:
        """A split server is there."""
        codec = negotiate(self._codec, self._node.peer_codecs.get(card.id, ()))
        self._connections[card.id] = self._node.connect(card, card.data_port), codec
        self._chooser.joined(card.id)
        self._servers.set(self._servers.value + 1)

    def lost(self, card: NodeCard, reason: str) -> None:
        """A split server is gone: what it was asked fails, and is asked of another."""
        if held := self._connections.pop(card.id, None):
            held[0].close(f"is gone ({reason})")
        self._chooser.lost(card.id)
        self._servers.set(self._servers.value + 1)

    def heard(self, server: NodeId, load: Load) -> None:
        """A split server said how busy it is."""
        self._chooser.heard(server, load)

    def has(self, server: NodeId) -> bool:
        """Whether this server is still there."""
        return server in self._connections

    async def until_lost(self, server: NodeId) -> None:
        """Returns when this server is gone."""
        await self._servers.wait_for(lambda _: not self.has(server))

    async def infer(self, version: Version, x: torch.Tensor) -> torch.Tensor:
        """The body's output in evaluation mode."""

        def make(codec: Codec) -> Made:
            spec, data = codec.pack("input", x)
            return Infer(version=version, input=spec), [data]

        _, answer = await self._ask(make)
        return unpack(answer.expect(Output).output, answer.parts[0])

    async def forward(self, *, cid: Cid, version: Version, seed: int, x: torch.Tensor) -> tuple[NodeId, torch.Tensor]:
        """The body's output in training mode, and who holds its graph."""

        def make(codec: Codec) -> Made:
            spec, data = codec.pack("input", x)
            return Forward(cid=cid, version=version, seed=seed, input=spec), [data]

        server, answer = await self._ask(make)
        return server, unpack(answer.expect(Output).output, answer.parts[0])

    async def backward(
        self, holder: NodeId | None, request: Callable[..., Backward], x: torch.Tensor, grad: torch.Tensor
    ) -> tuple[NodeId, torch.Tensor | None]:
        """Who spilled the body's contribution, and the gradient of its input if the request wants it.

        The holder of the graph is asked first; anybody else gets the input again and recomputes.
        """

        def make(codec: Codec, *, with_input: bool) -> Made:
            grad_spec, grad_data = codec.pack("grad", grad)
            if not with_input:
                return request(grad=grad_spec, input=None), [grad_data]
            spec, data = codec.pack("input", x)
            return request(grad=grad_spec, input=spec), [grad_data, data]

        if holder is not None and holder in self._connections:
            with suppress(InputNeeded, Unavailable, SpillFull):
                answer = await self._ask_one(holder, lambda codec: make(codec, with_input=False))
                return holder, _grad_of(answer)
            self._node.counters.add("recomputed")
        server, answer = await self._ask(lambda codec: make(codec, with_input=True))
        return server, _grad_of(answer)

    async def step(
        self, request: Callable[..., Step], x: torch.Tensor, target: torch.Tensor
    ) -> tuple[NodeId, torch.Tensor | None, float]:
        """Label sharing: who spilled the contribution, the gradient of the input if wanted, the loss sum."""

        def make(codec: Codec) -> Made:
            spec, data = codec.pack("input", x)
            target_spec, target_data = codec.pack("target", target)
            return request(input=spec, target=target_spec), [data, target_data]

        server, answer = await self._ask(make)
        return server, _grad_of(answer), answer.expect(Spilled).loss_sum or 0.0

    async def _ask(self, make: Callable[[Codec], Made]) -> tuple[NodeId, Answer]:
        """Ask one server after another until one answers; what is refused for good is raised."""
        deadline = time.monotonic() + self._node.settings.patience_s
        trouble = "there is no split server"
        while time.monotonic() < deadline:
            server = self._chooser.pick(time.monotonic())
            if server is None:
                await self._until_free(deadline)
                continue
            try:
                return server, await self._ask_one(server, make)
            except (Unavailable, SpillFull) as error:
                trouble = str(error)
        raise NoPeer(
            f"no split server took a step for {self._node.settings.patience_s:g} s; the last trouble was: {trouble}"
        )

    async def _ask_one(self, server: NodeId, make: Callable[[Codec], Made]) -> Answer:
        connection, codec = self._connections[server]
        body, parts = make(codec)
        self._chooser.asked(server)
        try:
            answer = await connection.request(body, parts, deadline_s=self._node.settings.request_s)
        except Busy as busy:
            self._node.counters.add("busy")
            self._chooser.refused(server, time.monotonic(), busy.retry_after_s)
            raise
        except (NoPeer, DeadlineExceeded, SpillFull, Unavailable):
            self._node.counters.add("retries")
            self._chooser.refused(server, time.monotonic())
            raise
        finally:
            self._chooser.answered(server)
        if isinstance(answer.body, Output | Spilled):
            self._chooser.heard(server, answer.body.load)
        return answer

    async def _until_free(self, deadline: float) -> None:
        """Wait for a server to come, or for a shunned one to be worth another try."""
        free_s = self._chooser.next_free_s()
        until = deadline if free_s is None else min(free_s, deadline)
        seen = self._servers.value
        with self._node.waiting("a split server"), suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                await self._servers.wait_for(lambda now: now != seen)


def _grad_of(answer: Answer) -> torch.Tensor | None:
    spec = answer.expect(Spilled).grad
    return None if spec is None else unpack(spec, answer.parts[0])
