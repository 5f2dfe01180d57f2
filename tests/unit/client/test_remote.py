"""A step that one split server has to take, as that one merges the batch: whom a client asks, and for how long."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import pytest
import torch
from helpers.waiting import eventually, until

from zsfl.client import remote
from zsfl.client.remote import RemoteBody
from zsfl.errors import (
    BadShape,
    Busy,
    ConfigError,
    DeadlineExceeded,
    InputNeeded,
    NoPeer,
    Rejected,
    SpillFull,
    Unavailable,
)
from zsfl.ids import NodeCard, NodeId, Role, RunId, Version, step_cid
from zsfl.metrics import Counters
from zsfl.node import Node
from zsfl.settings import NodeSettings
from zsfl.tensors.codec import Codec
from zsfl.tensors.plan import CodecPlan
from zsfl.wire.connection import Answer
from zsfl.wire.fields import Load
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import Backward, Forward, Infer, Output, Request, Spilled

CID = step_cid(RunId("abcdef"), 0, Version(0))
X = torch.arange(6.0).reshape(2, 3)
MERGER, OTHER = NodeId("merger"), NodeId("other")
Reaction = Exception | Callable[[Request], Answer] | None
"""What comes of a request: an error, an answer, or nothing until the server is gone."""


def output(_request: Request) -> Answer:
    spec, data = Codec.parse("raw").pack("output", X + 1)
    return Answer(Output(output=spec, load=Load(slots=1, busy=0, service_s=0.1)), [data])


def spilled(_request: Request) -> Answer:
    return Answer(Spilled(grad=None, loss_sum=None, load=Load(slots=1, busy=0, service_s=0.1)), [])


class Line:
    """A connection to a server that reacts as it was told; to what it was not told of, with an output."""

    def __init__(self, peer: str, reactions: list[Reaction]) -> None:
        self.peer = peer
        self.asked: list[Request] = []
        self._reactions = reactions
        self._closed: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    async def request(self, body: Request, parts: Sequence[Buffer], *, deadline_s: float) -> Answer:
        self.asked.append(body)
        match self._reactions.pop(0) if self._reactions else output:
            case Exception() as error:
                raise error
            case None:
                await asyncio.wait([self._closed])
                raise NoPeer("it is gone")
            case answer:
                return answer(body)

    def close(self, reason: str) -> None:
        self._closed.set_result(output(Infer(shard=0, version=Version(0), input=cast("Any", None))))


class Net:
    """A client's body and the servers that it can reach."""

    def __init__(self, patience_s: float = 20.0) -> None:
        self.lines: dict[NodeId, Line] = {}
        self.settings = NodeSettings(patience_s=patience_s)
        self.peer_codecs: dict[NodeId, tuple[str, ...]] = {MERGER: ("raw",), OTHER: ("raw",)}
        self.counters = Counters()
        self.body = RemoteBody(cast("Node", self), CodecPlan(), random.Random(0))

    def connect(self, card: NodeCard, port: int) -> Line:
        return self.lines[card.id]

    def waiting(self, what: Callable[[], str], hints: object) -> nullcontext[None]:
        return nullcontext()

    def joins(self, server: NodeId, *reactions: Reaction) -> Line:
        self.lines[server] = Line(server, list(reactions))
        self.body.joined(card(server))
        return self.lines[server]

    def forward(self) -> asyncio.Task[tuple[NodeId, torch.Tensor]]:
        work = self.body.forward(cid=CID, version=Version(0), seed=1, x=X, at=MERGER, merged=2)
        return asyncio.create_task(work)

    async def backward(self) -> tuple[NodeId, torch.Tensor | None]:
        request = partial(
            Backward, cid=CID, version=Version(0), seed=1, n=2.0, samples=2, want_grad=False, provenance="c", merged=2
        )
        return await until(self.body.backward(OTHER, request, X, X + 1, at=MERGER))


def card(server: NodeId) -> NodeCard:
    return NodeCard(id=server, name=server, role=Role.SPLIT_SERVER, host="127.0.0.1", control_port=1, data_port=2)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "AGAIN_S", 1e-3)
    monkeypatch.setattr(remote, "MAX_AGAIN_S", 1e-3)


async def test_it_is_waited_for_until_it_is_known_and_nobody_else_is_asked() -> None:
    net = Net()
    other = net.joins(OTHER)
    forward = net.forward()
    await asyncio.sleep(0)
    merger = net.joins(MERGER)
    server, x = await until(forward)
    assert server == MERGER
    assert torch.equal(x, X + 1)
    assert [type(request) for request in merger.asked] == [Forward]
    assert [request.merged for request in merger.asked if isinstance(request, Forward)] == [2]
    assert other.asked == []


async def test_it_is_asked_again_whatever_keeps_it_for_now() -> None:
    net = Net()
    other = net.joins(OTHER)
    troubles = [Busy("leaving", 1e-3), DeadlineExceeded("others are late"), Unavailable("no memory"), SpillFull("disk")]
    merger = net.joins(MERGER, *troubles)
    assert (await until(net.forward()))[0] == MERGER
    assert len(merger.asked) == 5
    counted = {name: amount for name, amount in net.counters.snapshot().items() if not name.endswith("_s")}
    assert counted == {"busy": 1, "retries": 3}
    assert other.asked == []


async def test_when_it_is_gone_the_step_is_given_up_at_once() -> None:
    net = Net()
    other = net.joins(OTHER)
    merger = net.joins(MERGER, None)
    forward = net.forward()
    await eventually(lambda: merger.asked)
    net.body.lost(card(MERGER), "silence")
    with pytest.raises(Unavailable, match="the server that merges is gone"):
        await until(forward)
    assert other.asked == []


async def test_it_is_not_asked_to_be_left_alone_for_longer_than_it_is_there() -> None:
    net = Net()
    merger = net.joins(MERGER, Busy("leaving", 3600.0))
    forward = net.forward()
    await eventually(lambda: merger.asked)
    net.body.lost(card(MERGER), "it said goodbye")
    with pytest.raises(Unavailable, match="gone"):
        await until(forward)


@pytest.mark.parametrize("is_there", [True, False])
async def test_patience_ends(is_there: bool) -> None:
    net = Net(patience_s=0.05)
    if is_there:
        net.joins(MERGER, *[Unavailable("no memory")] * 1000)
    with pytest.raises(NoPeer, match="no memory" if is_there else "not known yet"):
        await until(net.forward())


async def test_what_is_refused_for_good_is_raised() -> None:
    net = Net()
    net.joins(MERGER, Rejected("193 steps are to be merged"))
    with pytest.raises(Rejected, match="193"):
        await until(net.forward())


async def test_the_input_of_a_backward_is_sent_once_it_is_needed() -> None:
    net = Net()
    other = net.joins(OTHER)
    merger = net.joins(MERGER, InputNeeded("forgotten"), InputNeeded("others sent none"), spilled)
    assert await net.backward() == (MERGER, None)
    with_input = [request.input is not None for request in merger.asked if isinstance(request, Backward)]
    assert with_input == [False, True, True]
    assert other.asked == []


async def test_steps_that_wait_to_be_merged_leave_room_for_others() -> None:
    net = Net()
    merger = net.joins(MERGER, None, None)
    net.body.heard(MERGER, Load(slots=1, busy=0, service_s=0.1))
    waiting = [net.forward(), net.forward()]
    await eventually(lambda: len(merger.asked) == 2)
    assert torch.equal(await until(net.body.infer(0, Version(0), X)), X + 1)
    for task in waiting:
        task.cancel()


async def test_who_has_no_room_for_a_test_has_it_for_steps_and_the_test_waits_as_long_as_it_is_there() -> None:
    def full(request: Request) -> Answer:
        asked = [type(one) for one in merger.asked]
        if isinstance(request, Infer) and (Forward not in asked or asked.count(Infer) < 9):
            raise Busy("96 test batches wait here", 0.02)
        return output(request)

    net = Net(patience_s=0.1)
    merger = net.joins(MERGER, *[full] * 10_000)
    testing = asyncio.create_task(net.body.infer(0, Version(0), X))
    await eventually(lambda: merger.asked)
    await until(net.body.forward(cid=CID, version=Version(0), seed=1, x=X))
    assert torch.equal(await until(testing), X + 1)
    assert len(merger.asked) >= 10


# --- servers that answer wrongly ---------------------------------------------------------------------------


def odd(_request: Request) -> Answer:
    spec, data = Codec.parse("raw").pack("output", torch.zeros(7))
    return Answer(Output(output=spec, load=Load(slots=1, busy=0, service_s=0.1)), [data])


def cut(_request: Request) -> Answer:
    answer = output(_request)
    return Answer(answer.body, [bytes(answer.parts[0])[:5]])


WRONG: dict[str, Reaction] = {
    "another shape": odd,
    "too few bytes": cut,
    "another kind of answer": spilled,
    "a refusal": BadShape("I do not like it"),
    "its job is another": ConfigError("restart"),
}


def matches(answer: torch.Tensor) -> None:
    torch.add(answer, X)  # fails for another shape


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
async def test_one_server_that_answers_wrongly_is_passed_over(wrong: Reaction) -> None:
    net = Net()
    lines = [net.joins(server, *[wrong] * 3) for server in (MERGER, OTHER)]
    lines[1]._reactions.clear()
    for _ in range(3):
        work = net.body.forward(cid=CID, version=Version(0), seed=1, x=X, use=matches)
        server, answer = await until(work)
        assert (server, answer.tolist()) == (OTHER, (X + 1).tolist())


async def test_what_all_servers_answer_wrongly_is_raised() -> None:
    net = Net()
    for server in (MERGER, OTHER):
        net.joins(server, odd, odd)
    with pytest.raises(BadShape, match="cannot be used"):
        await until(net.body.forward(cid=CID, version=Version(0), seed=1, x=X, use=matches))


async def test_what_the_only_server_says_is_told_as_its_word() -> None:
    net = Net()
    net.joins(MERGER, Rejected("merger: no more steps"))
    said = r"^merger: no more steps \(only merger says so, .*: if that one is at fault, start another"
    with pytest.raises(Rejected, match=said):
        await until(net.body.forward(cid=CID, version=Version(0), seed=1, x=X))


async def test_the_only_server_may_be_contradicted_by_one_that_was_there_lately() -> None:
    net = Net()
    net.joins(OTHER)
    net.body.lost(card(OTHER), "killed")
    liar = net.joins(MERGER, *[Rejected("no more steps")] * 99)
    asking = asyncio.create_task(net.body.forward(cid=CID, version=Version(0), seed=1, x=X))
    await eventually(lambda: len(liar.asked) == 1)
    assert not asking.done()
    net.joins(OTHER)
    assert (await until(asking))[0] == OTHER


async def test_it_is_not_waited_for_for_ever() -> None:
    net = Net()
    net.joins(OTHER)
    net.body.lost(card(OTHER), "killed")
    net.body._left_s -= net.settings.patience_s
    net.joins(MERGER, ConfigError("another job"))
    with pytest.raises(ConfigError, match=r"^another job"):
        await until(net.body.forward(cid=CID, version=Version(0), seed=1, x=X))


async def test_a_gradient_has_the_shape_of_its_input() -> None:
    def wrong(_request: Request) -> Answer:
        spec, data = Codec.parse("raw").pack("grad", torch.zeros(9))
        return Answer(Spilled(grad=spec, loss_sum=None, load=Load(slots=1, busy=0, service_s=0.1)), [data])

    net = Net()
    net.joins(MERGER, wrong)
    net.joins(OTHER, wrong)
    request = partial(Backward, cid=CID, version=Version(0), seed=1, n=2.0, samples=2, want_grad=True, provenance="c")
    with pytest.raises(BadShape, match=r"is \(9,\), the input was \(2, 3\)"):
        await until(net.body.backward(None, request, X, X + 1))
