"""What waits for the body: turns in order, company only where it hurts nobody, and slots that come back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers.waiting import until

from zsfl.errors import BadShape, Busy, StaleWeights, ZsflError
from zsfl.ids import Cid, RunId, Version, parse_cid, step_cid
from zsfl.split_server import trying
from zsfl.split_server.admission import Admission
from zsfl.split_server.queue import Answer, Waiting, WorkQueue
from zsfl.tensors.codec import Codec
from zsfl.wire.messages import Backward, Forward, Infer, Ok

X = torch.zeros(2, 3)
SPEC, DATA = Codec.parse("raw").pack("input", X)


def shard_of(cid: Cid) -> int:
    return parse_cid(cid).shard


def forward(shard: int, version: int = 0) -> Forward:
    cid = step_cid(RunId("abcdef"), shard, Version(version))
    return Forward(cid=cid, version=Version(version), seed=0, input=SPEC)


def backward(shard: int) -> Backward:
    cid = step_cid(RunId("abcdef"), shard, Version(0))
    asked = {"cid": cid, "version": Version(0), "seed": 0, "n": 1.0, "samples": 1, "provenance": "client"}
    return Backward(**asked, input=None, grad=SPEC, want_grad=True)


class Body:
    """Works on whatever it is given, and remembers what came together; some shards are bad."""

    def __init__(self, slots: int = 4, merges: bool = True) -> None:
        self.turns: list[list[int]] = []
        self.passes: list[list[int]] = []
        """Forwards of these shards wait for their backwards, those of one pass together."""
        self.pays = True
        self.bad: set[int] = set()
        self.left = 0
        self.loading: dict[int, asyncio.Future[Any]] = {}
        self.admission = Admission(slots)
        self.queue = WorkQueue(
            cast(Any, SimpleNamespace(of=self.cut_of)),
            cast(Any, SimpleNamespace(held=self.held, get=self.get)),
            self.admission,
            self.work,
            may_merge=lambda _: merges,
            pays=lambda _, count: count > 1 and self.pays,
            went_with=self.went_with,
            left=self.leave,
            same_k=False,
        )

    def went_with(self, _cut: str, cid: Cid) -> list[Cid]:
        return [backward(shard).cid for made in self.passes if shard_of(cid) in made for shard in made]

    def cut_of(self, shard: int) -> str:
        if shard > 90:
            raise BadShape(f"there is no shard {shard}")
        return "cut"

    def held(self, version: Version) -> dict[str, None] | None:
        if version == 13:
            raise StaleWeights("unlucky")
        return None if version in self.loading else {"cut": None}

    async def get(self, version: Version) -> object:
        return await self.loading[version]

    def leave(self) -> None:
        self.left += 1

    def work(self, chosen: Sequence[Waiting], _weights: object) -> list[Answer | ZsflError]:
        shards = [one.request.shard if isinstance(one.request, Infer) else shard_of(one.request.cid) for one in chosen]
        self.turns.append(shards)
        if self.bad.intersection(shards):
            raise BadShape("a bad one")
        return [(Ok(), [bytes([shard])]) for shard in shards]

    def put(self, shard: int, version: int = 0) -> asyncio.Future[Answer]:
        return self.queue.put(forward(shard, version), [DATA])

    async def end(self, *put: Forward | Backward) -> list[list[int]]:
        """What came together, in which order, of requests that wait at the same time."""
        await until(asyncio.gather(*(self.queue.put(request, [DATA]) for request in put)))
        return self.turns


async def test_those_that_wait_together_go_together_and_each_gets_its_own() -> None:
    body = Body()
    answers = await until(asyncio.gather(*(body.put(shard) for shard in (2, 0, 1))))
    assert body.turns == [[2, 0, 1]]
    assert [bytes(parts[0]) for _, parts in answers] == [b"\2", b"\0", b"\1"]
    assert (body.left, body.admission.idle) == (3, True)


async def test_one_bad_request_is_refused_alone() -> None:
    body = Body()
    body.bad = {1}
    answers = [body.put(shard) for shard in (0, 1, 2)]
    await until(asyncio.wait(answers))
    with pytest.raises(BadShape, match="a bad one"):
        answers[1].result()
    assert [answers[0].result()[0], answers[2].result()[0]] == [Ok(), Ok()]
    assert body.turns == [[0, 1, 2], [0], [1], [2]]


async def test_two_copies_of_a_request_are_never_in_one_pass() -> None:
    body = Body()
    await until(asyncio.gather(body.put(0), body.put(0), body.put(1)))
    assert body.turns == [[0, 1], [0]]


async def test_nothing_is_merged_where_the_body_does_not_allow_it() -> None:
    body = Body(merges=False)
    await until(asyncio.gather(*(body.put(shard) for shard in range(3))))
    assert body.turns == [[0], [1], [2]]


async def test_what_was_begun_here_is_ended_before_anything_else() -> None:
    body = Body(merges=False)
    body.passes = [[2], [3]]
    assert await body.end(forward(0), forward(1), backward(2), backward(3)) == [[2], [3], [0], [1]]


async def test_a_pass_that_lacks_one_waits_its_turn() -> None:
    """Its steps would have to go forward once more; who can say when the other one comes."""
    body = Body(slots=8)
    body.passes = [[1, 2, 3], [4, 5]]
    put = (forward(0), backward(1), backward(2), backward(4), backward(5))
    assert await body.end(*put) == [[4, 5], [0], [1, 2]]


@pytest.mark.parametrize(("pays", "turns"), [(True, [[1, 2, 3]]), (False, [[1, 2], [3]])])
async def test_what_went_forward_together_goes_back_together_whether_or_not_that_pays(
    pays: bool, turns: list[list[int]]
) -> None:
    body = Body()
    body.passes, body.pays = [[1, 2], [3]], pays
    assert await body.end(backward(1), backward(2), backward(3)) == turns


async def test_of_a_pass_one_of_whose_steps_is_taken_back_the_others_are_ended() -> None:
    body = Body()
    body.passes = [[1, 2]]
    first, second, third = (body.queue.put(backward(1), [DATA]), body.queue.put(backward(2), [DATA]), body.put(0))
    first.cancel()
    await until(asyncio.gather(second, third))
    assert body.turns == [[2], [0]]
    assert (body.left, body.admission.idle) == (3, True)


async def test_steps_of_several_passes_that_fail_together_go_by_themselves_and_once() -> None:
    body = Body(slots=5)
    body.passes, body.bad = [[1], [2], [3]], {2}
    answers = [body.queue.put(backward(shard), [DATA]) for shard in (1, 2, 3)]
    await until(asyncio.gather(*answers, return_exceptions=True))
    assert body.turns == [[1, 2, 3], [1], [2], [3]]
    assert [answer.exception() is None for answer in answers] == [True, False, True]


async def test_what_is_refused_takes_no_slot() -> None:
    body = Body(slots=1)
    for _ in range(3):
        with pytest.raises(BadShape):
            body.put(99)
        with pytest.raises(BadShape, match="1 tensors belong to this request, 2 came"):
            body.queue.put(forward(0), [DATA, DATA])
        with pytest.raises(StaleWeights):
            body.put(0, version=13)
    first = body.put(0)
    with pytest.raises(Busy):
        body.put(1)
    await until(first)
    await until(body.put(1))


async def test_one_that_was_taken_back_is_not_worked_on() -> None:
    body = Body()
    first, second = body.put(0), body.put(1)
    first.cancel()
    await until(second)
    assert body.turns == [[1]]
    assert body.admission.idle


async def test_a_request_waits_for_its_weights_and_holds_up_nobody() -> None:
    body = Body()
    body.loading[7] = asyncio.get_running_loop().create_future()
    waiting = body.put(0, version=7)
    await until(body.put(1))
    assert not waiting.done()
    body.loading.pop(7).set_result(None)
    await until(waiting)
    assert body.turns == [[1], [0]]


async def test_test_batches_take_no_slot_and_let_steps_go_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what one peer sends without end some is taken, and while steps come they have most of the time."""
    monkeypatch.setattr(trying, "STEPS_TO_TESTS", 10**9)
    body, infer = Body(slots=8), Infer(shard=7, version=Version(0), input=SPEC)
    tests = [body.queue.put(infer, [DATA], "eve") for _ in range(2)]
    with pytest.raises(Busy, match="2 test batches wait here, 2 of them yours"):
        body.queue.put(infer, [DATA], "eve")
    tests.append(body.queue.put(Infer(shard=6, version=Version(0), input=SPEC), [DATA], "anna"))
    assert body.admission.load.busy == 3
    await until(asyncio.gather(tests[0], *(body.put(shard) for shard in range(8))))
    assert body.turns == [[7], [*range(8)]]
    assert [test.done() for test in tests] == [True, False, False]
    monkeypatch.setattr(trying, "STEPS_TO_TESTS", 0)
    await until(asyncio.gather(body.put(0), *tests))
    assert (body.turns[2:4], body.admission.idle, body.left) == ([[6], [7]], True, 12)


async def test_answers_leave_before_the_next_turn_begins() -> None:
    body = Body(merges=False)
    order: list[str] = []
    first, second = body.put(0), body.put(1)
    # As a server sends: the reply is made when the future is done, and leaves with the batch of that turn of the loop.
    first.add_done_callback(lambda _: asyncio.get_running_loop().call_soon(lambda: order.append("first left")))
    work = body.queue._work  # pyright: ignore[reportPrivateUsage]

    def watched(chosen: Sequence[Waiting], weights: Any) -> list[Answer | ZsflError]:
        order.append("turn")
        return work(chosen, weights)

    body.queue._work = watched  # pyright: ignore[reportPrivateUsage]
    await until(second)
    assert order == ["turn", "first left", "turn"]
