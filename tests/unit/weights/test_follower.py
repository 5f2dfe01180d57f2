"""Versions come by broadcast or are fetched, each is loaded once, and those not asked for longest go first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import msgspec
import pytest
import torch
from helpers.waiting import HANG_S, eventually, until
from hypothesis import given, settings
from hypothesis import strategies as st

from zsfl.errors import BadShape, NoPeer, StaleWeights
from zsfl.ids import BODY, NodeCard, NodeId, Portion, Role, Version
from zsfl.weights import follower as followers
from zsfl.weights.follower import KEPT_VERSIONS, MOST_VERSIONS, WeightsFollower
from zsfl.weights.packing import Packed, pack
from zsfl.wire.messages import FetchWeights, Goodbye, Weights

CARD = NodeCard(id=NodeId("1"), name="agg", role=Role.AGGREGATOR, host="127.0.0.1", control_port=1, data_port=2)


def state(version: int, portion: Portion = BODY) -> dict[str, torch.Tensor]:
    return {f"{portion}.w": torch.full((2,), float(version)), f"{portion}.seen": torch.tensor(version)}


def packed(version: int, portion: Portion = BODY) -> Packed:
    return pack(Version(version), portion, state(version, portion))


def differs(version: int, base: int) -> Packed:
    return pack(Version(version), BODY, state(version), base=(Version(base), state(base)))


class Following:
    """A follower, and what it meets: a node without sockets and an aggregator that answers with `answer`."""

    def __init__(self, *, differences: bool = False) -> None:
        self.settings = SimpleNamespace(request_s=1.0)
        self.fetched: list[int | None] = []
        self.loaded: list[int] = []
        self.closed: list[str] = []
        self.begun: list[Weights] = []
        """Broadcasts that have begun to arrive."""
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.answer: Callable[[int], Packed] = packed
        self.weights = WeightsFollower(cast(Any, self), BODY, self.load, differences=differences)
        self.weights.follow(CARD)

    def load(self, state: dict[str, torch.Tensor]) -> int:
        version = int(state["body.seen"])
        assert torch.equal(state["body.w"], torch.full((2,), float(version)))
        self.loaded.append(version)
        if version == 13:
            raise ValueError("unlucky")
        return version

    def heard(self, version: int) -> None:
        self.hear(*packed(version))

    async def get(self, version: int) -> int:
        return await until(self.weights.get(Version(version)))

    # --- what the node does for it ----------------------------------------------------------------------

    def connect(self, card: NodeCard, port: int) -> Any:
        assert (card, port) == (CARD, CARD.data_port)
        return SimpleNamespace(request=self.request, close=self.closed.append)

    async def request(self, body: FetchWeights, deadline_s: float) -> Any:
        assert (body.portion, deadline_s) == ("body", self.settings.request_s)
        self.fetched.append(body.version)
        await self.may_answer.wait()
        weights, parts = self.answer(body.version or 0)
        return SimpleNamespace(expect=lambda _: weights, parts=parts)

    def listen(self, card: NodeCard, topics: Sequence[bytes], hear: Callable[..., None]) -> Any:
        assert (card, topics) == (CARD, [b"body"])
        self.hear = hear
        return SimpleNamespace(arriving=lambda: self.begun, run=asyncio.Event().wait)

    def start(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        return asyncio.create_task(work, name=name)


@pytest.fixture(autouse=True)
def _no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broadcast that has not begun to arrive is not waited for."""
    monkeypatch.setattr(followers, "GRACE_S", 0.0)


async def test_what_is_broadcast_is_loaded_once_and_not_fetched() -> None:
    following = Following()
    following.heard(5)
    following.heard(5)
    assert [await following.get(5) for _ in range(3)] == [5, 5, 5]
    assert (following.loaded, following.fetched) == ([5], [])


async def test_what_was_missed_is_fetched_once_for_all_who_ask() -> None:
    following = Following()
    following.may_answer.clear()
    asking = [asyncio.create_task(following.get(5)) for _ in range(3)]
    await eventually(lambda: following.fetched)
    asking[0].cancel()
    following.may_answer.set()
    assert await until(asyncio.gather(*asking[1:])) == [5, 5]
    assert (following.loaded, following.fetched) == ([5], [5])


async def test_a_broadcast_that_has_begun_to_arrive_is_waited_for() -> None:
    following = Following()
    following.begun = [packed(5)[0]]
    asking = asyncio.create_task(following.get(5))
    for _ in range(50):
        await asyncio.sleep(0)
    following.heard(5)
    assert await asking == 5
    assert following.fetched == []


@pytest.mark.parametrize(("room", "kept"), [(0, KEPT_VERSIONS), (6, 6)])
@settings(max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 8)), max_size=40))
def test_the_version_that_was_not_asked_for_longest_goes_first(
    room: int, kept: int, events: list[tuple[bool, int]]
) -> None:
    """Room is that for so many versions; KEPT_VERSIONS are kept however long they are."""

    async def follow() -> None:
        following, held, missed = Following(), list[int](), list[int]()
        for is_asked_for, version in events:
            if version not in held:
                held.append(version)
                missed += [version] * is_asked_for
            if is_asked_for:
                assert await following.get(version) == version
                held.append(held.pop(held.index(version)))
            else:
                following.heard(version)
            held = held[-kept:]
        assert following.fetched == missed

    size = sum(len(part) for part in packed(0)[1])
    with patch.object(followers, "KEPT_BYTES", room * size):
        asyncio.run(follow())


async def test_of_small_versions_not_too_many_are_kept() -> None:
    following = Following()
    for version in range(MOST_VERSIONS + 1):
        following.heard(version)
    assert await following.get(1) == 1
    assert following.fetched == []
    await following.get(0)
    assert following.fetched == [0]


async def test_what_does_not_fit_is_no_version() -> None:
    following = Following()
    weights, parts = packed(5)
    following.hear(weights, parts * 2)
    following.hear(packed(5, Portion("client"))[0], parts)
    following.hear(Goodbye(node=CARD.id, reason=""), [])
    assert following.loaded == []
    for answer in (packed(4), packed(5, Portion("client")), (weights, [])):
        following.answer = lambda _, answer=answer: answer
        with pytest.raises(BadShape):
            await following.get(5)
    following.answer = packed
    assert await following.get(5) == 5


async def test_what_is_refused_reaches_whoever_asked_and_can_be_asked_again() -> None:
    def refused(_: int) -> Packed:
        raise StaleWeights("gone")

    following = Following()
    following.answer = refused
    for _ in range(2):
        with pytest.raises(StaleWeights, match="gone"):
            await following.get(5)
    assert following.fetched == [5, 5]


async def test_what_cannot_be_loaded_is_said_to_whoever_asks_and_nobody_else() -> None:
    following = Following()
    following.heard(13)
    following.heard(14)
    with pytest.raises(ValueError, match="unlucky"):
        await following.get(13)
    assert await following.get(14) == 14


async def test_one_who_stops_waiting_does_not_stop_the_loading() -> None:
    following = Following()
    following.heard(5)
    asking = asyncio.create_task(following.get(5))
    await asyncio.sleep(0)
    asking.cancel()
    assert await following.get(5) == 5
    assert following.loaded == [5]


async def test_nothing_is_left_of_an_aggregator_that_is_gone() -> None:
    following = Following()
    following.heard(5)
    following.may_answer.clear()
    asking = asyncio.create_task(following.get(6))
    await eventually(lambda: following.fetched)
    following.weights.unfollow()
    assert following.closed == ["is gone: agg"]
    following.may_answer.set()
    with pytest.raises(NoPeer, match="is gone; ask the next one"):
        await asking
    for version in (5, 6):
        with pytest.raises(NoPeer, match="there is no aggregator"):
            await following.get(version)
    following.weights.follow(CARD)
    following.answer = lambda version: packed(version)
    assert await following.get(5) == 5
    assert following.fetched == [6, 5]


# --- differences ------------------------------------------------------------------------------------------


async def test_what_differs_from_the_newest_version_makes_the_next_one() -> None:
    following = Following(differences=True)
    following.heard(4)
    for version in (5, 6, 7):
        following.hear(*differs(version, version - 1))
        following.hear(*differs(version, version - 1))  # twice is once
    assert [await following.get(version) for version in (7, 6, 5, 4)] == [7, 6, 5, 4]
    assert (following.loaded, following.fetched) == ([4, 5, 6, 7], [])


async def test_what_was_fetched_may_be_what_the_next_version_differs_from() -> None:
    following = Following(differences=True)
    assert await following.get(5) == 5
    following.hear(*differs(6, 5))
    assert await following.get(6) == 6
    assert await following.get(3) == 3  # an older one, which changes nothing
    following.hear(*differs(7, 6))
    assert await following.get(7) == 7
    assert following.fetched == [5, 3]


@pytest.mark.parametrize("held", [None, 3, 5, 6])
async def test_without_the_base_the_whole_version_is_fetched_at_once(
    held: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followers, "GRACE_S", HANG_S)
    following = Following(differences=True)
    if held is not None:
        following.heard(held)
    following.hear(*differs(7, 4))
    assert await following.get(7) == 7
    following.hear(*differs(8, 7))
    assert await following.get(8) == 8
    assert following.fetched == [7]


async def test_one_that_waits_for_a_broadcast_stops_when_it_is_of_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followers, "GRACE_S", HANG_S)
    following = Following(differences=True)
    asking = asyncio.create_task(following.get(7))
    for _ in range(5):
        await asyncio.sleep(0)
    assert following.fetched == []
    following.hear(*differs(7, 6))
    assert await until(asking) == 7
    assert following.fetched == [7]


async def test_what_arrives_and_will_be_of_no_use_is_not_waited_for() -> None:
    following = Following(differences=True)
    following.heard(5)
    following.begun = [differs(7, 6)[0]]
    assert await following.get(7) == 7
    following.begun = [differs(8, 7)[0]]
    asking = asyncio.create_task(following.get(8))
    for _ in range(50):
        await asyncio.sleep(0)
    following.hear(*differs(8, 7))
    assert await until(asking) == 8
    assert following.fetched == [7]


@pytest.mark.parametrize(
    "change",
    [
        {"body.w": torch.zeros(3)},
        {"body.w": torch.zeros(2, 1)},
        {"body.w": torch.zeros(2, dtype=torch.float64)},
        {"body.other": torch.zeros(2)},
    ],
    ids=["longer", "of another shape", "of another dtype", "more tensors"],
)
async def test_a_difference_that_does_not_fit_is_no_version(change: dict[str, torch.Tensor]) -> None:
    following = Following(differences=True)
    following.heard(4)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in (state(5) | change).items()}
    following.hear(*pack(Version(5), BODY, state(5) | change, base=(Version(4), zeros)))
    assert await following.get(5) == 5
    assert (following.loaded, following.fetched) == ([4, 5], [5])


@pytest.mark.parametrize("what", ["cut off", "too few", "renamed", "no lz4", "beyond bounds"])
async def test_a_difference_that_is_damaged_is_no_version_and_spoils_none(what: str) -> None:
    following = Following(differences=True)
    following.heard(4)
    weights, parts = differs(5, 4)
    first, second = weights.tensors
    match what:
        case "cut off":
            parts = [parts[0], parts[1][:-1]]
        case "too few":
            weights, parts = msgspec.structs.replace(weights, tensors=(first,)), parts[:1]
        case "renamed":
            weights = msgspec.structs.replace(weights, tensors=(first, msgspec.structs.replace(second, name="body.w")))
        case "no lz4":
            second = msgspec.structs.replace(second, codec="raw+lz4", nbytes=3)
            weights, parts = msgspec.structs.replace(weights, tensors=(first, second)), [parts[0], b"\xff\xff\xff"]
        case _:
            first = msgspec.structs.replace(first, shape=(1 << 40,))
            weights = msgspec.structs.replace(weights, tensors=(first, second))
    following.hear(weights, parts)
    assert following.loaded == [4]
    following.hear(*differs(5, 4))  # version 4 is as it was
    assert await following.get(5) == 5
    assert (following.loaded, following.fetched) == ([4, 5], [])


async def test_what_comes_while_its_base_is_fetched_is_used_when_that_is_there() -> None:
    following = Following(differences=True)
    following.may_answer.clear()
    asking = asyncio.create_task(following.get(5))
    await eventually(lambda: following.fetched)
    for version in (6, 7, 9):
        following.hear(*differs(version, version - 1))
    assert following.loaded == []
    following.may_answer.set()
    assert await until(asking) == 5
    await eventually(lambda: following.loaded == [5, 6, 7])
    assert [await following.get(version) for version in (6, 7, 9)] == [6, 7, 9]
    assert following.fetched == [5, 9]


async def test_what_is_asked_for_is_not_taken_as_a_difference() -> None:
    following = Following(differences=True)
    following.heard(4)
    following.answer = lambda version: differs(version, 4)
    with pytest.raises(BadShape, match="got body of 5 as what differs from 4"):
        await following.get(5)


async def test_the_versions_of_another_aggregator_are_no_base() -> None:
    following = Following(differences=True)
    following.heard(5)
    following.weights.follow(CARD)
    following.hear(*differs(6, 5))
    assert await following.get(6) == 6
    assert following.fetched == [6]


async def test_who_was_not_told_of_differences_keeps_what_they_differ_from_once_one_is_heard() -> None:
    following = Following()
    following.heard(5)
    for version in (6, 7, 8):
        following.hear(*differs(version, version - 1))
        assert await following.get(version) == version
    assert following.fetched == [6]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["whole", "differs", "missed", "ask", "ask an old one"]), st.booleans())))
def test_whatever_is_missed_no_version_is_another(events: list[tuple[str, bool]]) -> None:
    """`load` checks the tensors of each; only what was not heard, or was of no use, is fetched."""

    async def follow() -> None:
        following, version = Following(differences=True), 0
        for what, is_twice in events:
            version += what in ("whole", "differs", "missed")
            for _ in range(1 + is_twice):
                match what:
                    case "whole":
                        following.heard(version)
                    case "differs":
                        following.hear(*differs(version, version - 1))
                    case "missed":
                        pass
                    case "ask":
                        assert await following.get(version) == version
                    case _:
                        assert await following.get(version // 2) == version // 2

    with patch.object(Following, "load", _no_bad_luck):
        asyncio.run(follow())


def _no_bad_luck(following: Following, state: dict[str, torch.Tensor]) -> int:
    version = int(state["body.seen"])
    assert torch.equal(state["body.w"], torch.full((2,), float(version)))
    return version
