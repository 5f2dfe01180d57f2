"""The steps of a shard are those of the machine that holds it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.doors import machines
from helpers.waiting import HANG_S, eventually, until

from zsfl.errors import Busy, NoPeer, RemoteProtocolError, Unauthorised, Unavailable
from zsfl.ids import RunId, Version, step_cid
from zsfl.split_server.holders import MOST_CHECKED, Holders
from zsfl.tensors.spec import TensorSpec
from zsfl.wire.messages import Backward, Forward, Infer, Ok

RUN = RunId("abc123")
SHARDS = 8
SPEC = TensorSpec(name="x", dtype="float32", shape=(1,), codec="raw", nbytes=4)
INFER = Infer(shard=1, version=Version(0), input=SPEC)


def forward(shard: int) -> Forward:
    cid = step_cid(RUN, shard, Version(0))
    return Forward(cid=cid, version=Version(0), seed=0, input=SPEC)


def backward(shard: int) -> Backward:
    cid = step_cid(RUN, shard, Version(0))
    return Backward(
        cid=cid,
        version=Version(0),
        seed=0,
        n=1.0,
        samples=1,
        grad=SPEC,
        input=None,
        want_grad=False,
        provenance="somebody",
    )


class Seats:
    """What an aggregator knows, and how often it was asked."""

    def __init__(self, **keys: str) -> None:
        self.keys = {int(shard[1:]): key for shard, key in keys.items()}
        self.asked: list[int] = []

    async def ask(self, shard: int) -> str:
        self.asked.append(shard)
        return self.keys.get(shard, "")


async def permitted(holders: Holders, request: Forward | Backward | Infer, key: str) -> None:
    if (ask := holders.permit(request, key)) is not None:
        await ask()


async def test_whose_a_step_is_is_asked_once() -> None:
    seats = Seats(s1="A", s2="B")
    holders = Holders(seats.ask, SHARDS)
    for _ in range(3):
        await permitted(holders, forward(1), "A")
        await permitted(holders, backward(1), "A")
    await permitted(holders, forward(2), "B")
    assert seats.asked == [1, 2]


async def test_a_step_of_another_machine_is_refused_whoever_comes_first() -> None:
    holders = Holders(Seats(s1="A").ask, SHARDS)
    for request in (forward(1), backward(1)):
        with pytest.raises(Unauthorised, match="steps of shard 1 are another machine's to make"):
            await permitted(holders, request, "B")
    await permitted(holders, forward(1), "A")
    with pytest.raises(Unauthorised):
        await permitted(holders, backward(1), "B")
    await permitted(holders, backward(1), "A")
    await permitted(holders, INFER, "B")  # makes no step


async def test_a_shard_that_is_given_to_another_machine_is_that_ones() -> None:
    seats = Seats(s1="A")
    holders = Holders(seats.ask, SHARDS)
    await permitted(holders, forward(1), "A")
    seats.keys[1] = "B"
    await permitted(holders, forward(1), "B")
    with pytest.raises(Unauthorised):
        await permitted(holders, forward(1), "A")


async def test_another_aggregator_says_anew_whose_is_what() -> None:
    seats = Seats(s1="A")
    holders = Holders(seats.ask, SHARDS)
    await permitted(holders, forward(1), "A")
    seats.keys[1] = "B"
    holders.forget()
    with pytest.raises(Unauthorised):
        await permitted(holders, forward(1), "A")
    await permitted(holders, forward(1), "B")


async def test_an_answer_of_an_aggregator_that_is_not_followed_any_more_counts_no_more() -> None:
    seats, may = Seats(s1="A"), asyncio.Event()

    async def slow(shard: int) -> str:
        found = await seats.ask(shard)
        await may.wait()
        return found

    holders = Holders(slow, SHARDS)
    before = asyncio.ensure_future(permitted(holders, forward(1), "A"))
    await eventually(lambda: bool(seats.asked))
    holders.forget()
    may.set()
    await before
    await permitted(holders, forward(1), "A")
    assert seats.asked == [1, 1]


async def test_many_who_are_refused_ask_few_questions() -> None:
    """One while it is on its way, and one for all who came meanwhile."""
    seats, may = Seats(s1="A"), asyncio.Event()

    async def slow(shard: int) -> str:
        found = await seats.ask(shard)
        await may.wait()
        return found

    holders = Holders(slow, SHARDS)
    steps = [asyncio.ensure_future(permitted(holders, forward(1), "B")) for _ in range(50)]
    await eventually(lambda: bool(seats.asked))
    may.set()
    async with asyncio.timeout(HANG_S):
        assert all(isinstance(one, Unauthorised) for one in await asyncio.gather(*steps, return_exceptions=True))
    assert len(seats.asked) <= 2


async def test_a_question_that_fails_fails_for_all_who_waited_for_it() -> None:
    asked, may = [0], asyncio.Event()

    async def nobody_to_ask(_: int) -> str:
        asked[0] += 1
        await may.wait()
        raise NoPeer("there is no aggregator")

    holders = Holders(nobody_to_ask, SHARDS)
    steps = [asyncio.ensure_future(permitted(holders, forward(1), "A")) for _ in range(20)]
    await eventually(lambda: asked[0])
    may.set()
    async with asyncio.timeout(HANG_S):
        assert all(isinstance(one, NoPeer) for one in await asyncio.gather(*steps, return_exceptions=True))
    assert asked[0] <= 2


async def test_a_shard_that_there_is_not_is_not_asked_for() -> None:
    seats = Seats()
    with pytest.raises(RemoteProtocolError, match="there is no shard 8: the job has 8"):
        await permitted(Holders(seats.ask, SHARDS), forward(8), "A")
    assert seats.asked == []


async def test_a_step_of_nobody_may_be_tried_again() -> None:
    with pytest.raises(Unavailable, match="no client has joined with shard 7 yet"):
        await permitted(Holders(Seats().ask, SHARDS), forward(7), "A")

    async def nobody_to_ask(_: int) -> str:
        raise NoPeer("there is no aggregator")

    with pytest.raises(NoPeer):
        await permitted(Holders(nobody_to_ask, SHARDS), forward(7), "A")


async def test_without_keys_steps_are_anybodys() -> None:
    seats = Seats()
    assert Holders(seats.ask, SHARDS).permit(forward(1), "") is None
    assert seats.asked == []


async def test_a_server_asks_before_it_answers(tmp_path: Path) -> None:
    """Also whether the one who asks is told, counted and named once."""
    async with machines(tmp_path, "anna", "bob", "eve") as (anna, bob, eve):
        anna.trusts(bob)
        anna.trusts(eve)
        seats = Seats(s1=bob.key)
        server = anna.serve(permit=Holders(seats.ask, SHARDS).permit)
        for _ in range(2):
            with pytest.raises(Unauthorised, match="another machine's"):
                await eve.connect(server, anna.key).request(forward(1), [bytes(4)], deadline_s=HANG_S)
        assert (await bob.connect(server, anna.key).request(forward(1), [bytes(4)], deadline_s=HANG_S)).body == Ok()
        assert anna.counters.snapshot()["unauthorised"] == 2
        assert [note for note in anna.notes if "steps of shard 1" in note] == anna.notes
        assert len(anna.notes) == 1


async def test_claims_that_are_looked_into_leave_places_for_those_who_hold_their_shards(tmp_path: Path) -> None:
    async with machines(tmp_path, "anna", "bob", "eve") as (anna, bob, eve):
        anna.trusts(bob)
        anna.trusts(eve)
        seats, may = Seats(s1=bob.key, s2=anna.key), asyncio.Event()

        async def ask(shard: int) -> str:
            if shard != 1:
                await may.wait()
            return await seats.ask(shard)

        server = anna.serve(permit=Holders(ask, SHARDS).permit)
        bobs, eves = bob.connect(server, anna.key), eve.connect(server, anna.key)
        assert (await bobs.request(forward(1), [bytes(4)], deadline_s=HANG_S)).body == Ok()
        claims = [
            asyncio.ensure_future(eves.request(forward(2), [bytes(4)], deadline_s=HANG_S))
            for _ in range(anna.limits.max_inflight)
        ]
        await eventually(lambda: sum(one.done() for one in claims) == len(claims) - MOST_CHECKED // 2)
        assert (await bobs.request(forward(1), [bytes(4)], deadline_s=HANG_S)).body == Ok()
        may.set()
        async with asyncio.timeout(HANG_S):
            refused = await asyncio.gather(*claims, return_exceptions=True)
        assert sum(isinstance(one, Unauthorised) for one in refused) == MOST_CHECKED // 2
        assert sum(isinstance(one, Busy) for one in refused) == len(claims) - MOST_CHECKED // 2
        with pytest.raises(Unauthorised):  # there is room again
            await eves.request(forward(2), [bytes(4)], deadline_s=HANG_S)


async def test_however_many_machines_claim_what_is_not_theirs_there_is_a_place_for_the_next() -> None:
    may = asyncio.Event()

    async def ask(shard: int) -> str:
        await may.wait()
        return f"key {shard}"

    holders = Holders(ask, SHARDS)
    asking = [holders.permit(forward(0), "key 0")]
    taken: list[int] = []
    for number in range(1, 20):
        taken.append(0)
        with suppress(Busy):
            while True:
                asking.append(holders.permit(forward(2), f"other key {number}"))
                taken[-1] += 1
    assert taken[:3] == [63, 32, 16]
    assert min(taken) == 1
    asking.append(holders.permit(forward(1), "key 1"))
    may.set()
    for one in (asking[0], asking[-1]):
        assert one is not None
        await until(one())
    await until(asyncio.gather(*(one() for one in asking[1:-1] if one), return_exceptions=True))
