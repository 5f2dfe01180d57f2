"""Versions come by broadcast or are fetched, each is loaded once, and those not asked for longest go first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from helpers.waiting import eventually, until
from hypothesis import given, settings
from hypothesis import strategies as st

from zsfl.errors import BadShape, NoPeer, StaleWeights
from zsfl.ids import BODY, NodeCard, NodeId, Portion, Role, Version
from zsfl.weights import follower as followers
from zsfl.weights.follower import KEPT_VERSIONS, MOST_VERSIONS, WeightsFollower
from zsfl.weights.shelf import Packed, pack
from zsfl.wire.messages import FetchWeights, Goodbye, Weights

CARD = NodeCard(id=NodeId("1"), name="agg", role=Role.AGGREGATOR, host="127.0.0.1", control_port=1, data_port=2)


def packed(version: int, portion: Portion = BODY) -> Packed:
    return pack(Version(version), portion, {f"{portion}.w": torch.full((2,), float(version))})


class Following:
    """A follower, and what it meets: a node without sockets and an aggregator that answers with `answer`."""

    def __init__(self) -> None:
        self.settings = SimpleNamespace(request_s=1.0)
        self.fetched: list[int | None] = []
        self.loaded: list[int] = []
        self.closed: list[str] = []
        self.begun: list[Weights] = []
        """Broadcasts that have begun to arrive."""
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.answer: Callable[[int], Packed] = packed
        self.weights = WeightsFollower(cast(Any, self), BODY, self.load)
        self.weights.follow(CARD)

    def load(self, state: dict[str, torch.Tensor]) -> int:
        version = int(state["body.w"][0])
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
