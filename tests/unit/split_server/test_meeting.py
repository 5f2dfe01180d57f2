"""Who waits for whom, who gets what, and what is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import ExitStack

import pytest
from helpers.waiting import until

from zsfl.errors import Busy, DeadlineExceeded, Rejected, StaleWeights, Unavailable
from zsfl.ids import Cid, RunId, Version, step_cid
from zsfl.split_server.meeting import KEPT_VERSIONS, MAX_COPIES, MAX_MEETINGS, MAX_SIZE, Meetings, Misfit, Places


def cid(shard: int, version: int = 7, k: int = 0, run: str = "abcdef") -> Cid:
    return step_cid(RunId(run), shard, Version(version), k)


class Work:
    """Answers each with all items in the order given; waits or fails where a test wants it to."""

    def __init__(self) -> None:
        self.given: list[list[str]] = []
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.fails: Exception | None = None

    async def __call__(self, items: Mapping[Cid, str]) -> dict[Cid, str]:
        self.given.append(list(items.values()))
        await self.may_go_on.wait()
        if self.fails is not None:
            raise self.fails
        return {cid: f"{item} of {''.join(items.values())}" for cid, item in items.items()}


class Room:
    """Meetings, and those who attend them."""

    def __init__(self) -> None:
        self.work = Work()
        self.meetings = Meetings[str, str](self.work)

    def attend(self, shard: int, *, size: int = 3, version: int = 7, k: int = 0, item: str = "") -> asyncio.Task[str]:
        return asyncio.create_task(self.meetings.attend(cid(shard, version, k), size, item or "abcdef"[shard]))


@pytest.fixture
def room() -> Room:
    return Room()


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_all_are_worked_on_once_in_cid_order(room: Room) -> None:
    waiting = [room.attend(shard) for shard in (2, 0)]
    await settle()
    assert room.work.given == []
    assert not room.meetings.idle
    assert await until(asyncio.gather(*waiting, room.attend(1))) == ["c of abc", "a of abc", "b of abc"]
    assert room.work.given == [["a", "b", "c"]]
    assert room.meetings.idle


async def test_other_versions_and_other_k_meet_apart(room: Room) -> None:
    waiting = [room.attend(shard, size=2, version=v, k=k) for v, k in ((7, 0), (7, 1), (8, 0)) for shard in (0, 1)]
    assert await until(asyncio.gather(*waiting)) == ["a of ab", "b of ab"] * 3
    assert len(room.work.given) == 3


async def test_a_copy_joins_at_any_time_or_gets_the_same_answer(room: Room) -> None:
    room.work.may_go_on.clear()
    waiting = [room.attend(shard, size=2) for shard in (0, 0)]
    await settle()
    assert room.work.given == []  # one step, however often it is asked for
    waiting += [room.attend(1, size=2), room.attend(0, size=2)]
    await settle()
    waiting.append(room.attend(1, size=2))
    await settle()
    room.work.may_go_on.set()
    assert await until(asyncio.gather(*waiting)) == ["a of ab", "a of ab", "b of ab", "a of ab", "b of ab"]
    assert await until(room.attend(1, size=2)) == "b of ab"
    assert len(room.work.given) == 1


async def test_who_gives_up_takes_its_item_along_and_the_others_go_on_waiting(room: Room) -> None:
    gone, stays = room.attend(0), room.attend(1)
    await settle()
    gone.cancel()
    await settle()
    last = room.attend(2)
    await settle()
    assert room.work.given == []
    assert await until(asyncio.gather(room.attend(0), stays, last)) == ["a of abc", "b of abc", "c of abc"]


async def test_a_copy_that_is_left_keeps_the_item_there(room: Room) -> None:
    first, copy = room.attend(0, size=2), room.attend(0, size=2)
    await settle()
    first.cancel()
    await settle()
    assert await until(asyncio.gather(copy, room.attend(1, size=2))) == ["a of ab", "b of ab"]


async def test_a_meeting_that_all_have_left_is_over_whatever_its_size_was(room: Room) -> None:
    waiting = [room.attend(shard) for shard in (0, 1)]
    await settle()
    for task in waiting:
        task.cancel()
    await settle()
    assert room.meetings.idle
    assert await until(room.attend(0, size=1)) == "a of a"


async def test_work_goes_on_without_those_who_gave_up_meanwhile(room: Room) -> None:
    room.work.may_go_on.clear()
    gone, stays = room.attend(0, size=2), room.attend(1, size=2)
    await settle()
    gone.cancel()
    await settle()
    room.work.may_go_on.set()
    assert await until(stays) == "b of ab"
    assert await until(room.attend(0, size=2)) == "a of ab"
    assert len(room.work.given) == 1


async def test_an_error_is_everybodys_and_is_not_kept(room: Room) -> None:
    room.work.fails = StaleWeights("version 7 is no longer held")
    results = await until(asyncio.gather(*(room.attend(shard) for shard in range(3)), return_exceptions=True))
    assert [type(result) for result in results] == [StaleWeights] * 3
    assert room.meetings.idle
    room.work.fails = None
    assert await until(asyncio.gather(*(room.attend(shard) for shard in range(3)))) == [
        "a of abc",
        "b of abc",
        "c of abc",
    ]


async def test_an_error_that_nobody_waits_for_is_no_fault(room: Room) -> None:
    faults: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: faults.append(context))
    room.work.may_go_on.clear()
    room.work.fails = DeadlineExceeded("no weights came")
    waiting = [room.attend(shard, size=2) for shard in range(2)]
    await settle()
    for task in waiting:
        task.cancel()
    room.work.may_go_on.set()
    await settle()
    del waiting
    assert room.meetings.idle
    assert faults == []


async def test_steps_that_cannot_be_of_one_batch_are_refused(room: Room) -> None:
    waiting = room.attend(0, size=2)
    await settle()
    with pytest.raises(Unavailable, match="merged with 3 steps, but 1 of 2 are there"):
        await until(room.attend(1, size=3))
    room.work.may_go_on.clear()
    other = room.attend(1, size=2)
    await settle()
    with pytest.raises(Unavailable, match="2 of 2 are there"):
        await until(room.attend(2, size=2))
    room.work.may_go_on.set()
    assert await until(asyncio.gather(waiting, other)) == ["a of ab", "b of ab"]


async def test_meetings_and_their_sizes_are_bounded(room: Room) -> None:
    with pytest.raises(Rejected, match=f"{MAX_SIZE} is the most"):
        await until(room.attend(0, size=MAX_SIZE + 1))
    waiting = [room.attend(0, size=2, k=k) for k in range(MAX_MEETINGS)]
    await settle()
    with pytest.raises(Busy, match="no room"):
        await until(room.attend(0, size=2, k=MAX_MEETINGS))
    assert await until(asyncio.gather(room.attend(1, size=2), waiting[0])) == ["b of ab", "a of ab"]
    later = room.attend(0, size=2, k=MAX_MEETINGS)
    await settle()
    assert not later.done()
    for task in (*waiting, later):
        task.cancel()


async def test_results_are_kept_of_all_steps_of_the_newest_versions(room: Room) -> None:
    """A client that starts again in the middle of a version finds all of its steps answered."""
    for version in range(KEPT_VERSIONS + 1):
        for k in range(6):
            await until(asyncio.gather(*(room.attend(shard, size=2, version=version, k=k) for shard in (0, 1))))
    done = len(room.work.given)
    for k in range(6):
        assert await until(room.attend(0, size=2, version=KEPT_VERSIONS, k=k)) == "a of ab"
    assert len(room.work.given) == done
    forgotten = room.attend(0, size=2, version=0)
    await settle()
    assert not forgotten.done()
    forgotten.cancel()


async def test_draining_begins_no_version_and_ends_those_that_were_begun(room: Room) -> None:
    await until(asyncio.gather(*(room.attend(shard, size=2) for shard in (0, 1))))
    open_one = room.attend(0, size=2, version=8)
    await settle()
    room.meetings.drain()
    with pytest.raises(Busy, match="leaving"):
        await until(room.attend(0, size=2, version=9))
    assert await until(asyncio.gather(*(room.attend(shard, size=2, k=1) for shard in (0, 1)))) == ["a of ab", "b of ab"]
    assert not room.meetings.idle
    assert await until(asyncio.gather(open_one, room.attend(1, size=2, version=8))) == ["a of ab", "b of ab"]
    assert room.meetings.idle


async def test_who_does_not_fit_is_told_and_the_others_wait_for_a_better_one(room: Room) -> None:
    room.work.fails = Misfit([cid(1)], "b is too wide")
    waiting = [room.attend(shard) for shard in (0, 2)]
    for _ in range(2):
        with pytest.raises(Rejected, match="b is too wide"):
            await until(room.attend(1))
        assert room.meetings.here(RunId("abcdef"), Version(7)) == (cid(0), cid(2))
    room.work.fails = None
    assert await until(asyncio.gather(*waiting, room.attend(1))) == ["a of abc", "c of abc", "b of abc"]
    assert room.meetings.idle


async def test_who_gave_up_while_one_did_not_fit_waits_no_more(room: Room) -> None:
    room.work.may_go_on.clear()
    room.work.fails = Misfit([cid(1)], "b is too wide")
    waiting = [room.attend(shard) for shard in range(3)]
    await settle()
    waiting[0].cancel()
    await settle()
    room.work.may_go_on.set()
    with pytest.raises(Rejected):
        await until(waiting[1])
    assert room.meetings.here(RunId("abcdef"), Version(7)) == (cid(2),)
    waiting[2].cancel()
    await settle()
    assert room.meetings.idle


async def test_copies_of_one_step_are_bounded(room: Room) -> None:
    copies = [room.attend(0) for _ in range(MAX_COPIES)]
    await settle()
    with pytest.raises(Busy, match="requests wait for"):
        await until(room.attend(0))
    assert len(set(await until(asyncio.gather(*copies, room.attend(1), room.attend(2))))) == 3


def test_what_waits_is_bounded_in_all_and_for_each_shard() -> None:
    places = Places(100, steps=2, shards=5)
    with ExitStack() as taken:
        for _ in range(2 * MAX_COPIES):
            taken.enter_context(places.taken(3, 1))
        with pytest.raises(Busy, match="requests of shard 3 wait here already"):
            taken.enter_context(places.taken(3, 1))
    with places.taken(3, 101):  # one alone may be as long as it is
        pass


@pytest.mark.parametrize("size_bytes", [35, 1])
def test_one_shard_leaves_room_for_the_steps_of_every_other(size_bytes: int) -> None:
    """However large its steps are, and however many of them it sends."""
    places = Places(100, steps=100, shards=5)
    with ExitStack() as taken:
        for _ in range(35 // size_bytes):
            taken.enter_context(places.taken(3, size_bytes))
        with pytest.raises(Busy, match="35 bytes of merged batches wait here, 35 of them of shard 3, no room for more"):
            taken.enter_context(places.taken(3, size_bytes))
        for shard in (0, 1, 2, 4):
            taken.enter_context(places.taken(shard, 10))
        taken.enter_context(places.taken(1, 8))
        with pytest.raises(Busy, match="83 bytes of merged batches wait here, 10 of them of shard 2"):
            taken.enter_context(places.taken(2, 18))
    with ExitStack() as taken:
        for shard in range(5):
            taken.enter_context(places.taken(shard, 20))  # what all need that are alike is there


async def test_who_is_there_is_told_of_the_fullest_meeting_of_a_version(room: Room) -> None:
    waiting = [room.attend(shard, k=1) for shard in (0, 2)] + [room.attend(1), room.attend(2, version=8)]
    await settle()
    assert room.meetings.here(RunId("abcdef"), Version(7)) == (cid(0, k=1), cid(2, k=1))
    assert room.meetings.here(RunId("abcdef"), Version(8)) == (cid(2, version=8),)
    assert room.meetings.here(RunId("fedcba"), Version(7)) == ()
    assert await until(asyncio.gather(*waiting[:2], room.attend(1, k=1)))
    assert room.meetings.here(RunId("abcdef"), Version(7)) == (cid(1),)
    for one in waiting[2:]:
        one.cancel()
    await settle()
    assert room.meetings.idle
