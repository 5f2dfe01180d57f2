"""Admitted clients that lie about who aggregates: only for its machine's own shards is anybody believed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from zsfl.aggregator.mirror import Mirror
from zsfl.aggregator.reign import Reign
from zsfl.aggregator.stage import Stage
from zsfl.aggregator.standby import StandbyRole
from zsfl.aggregator.standing import Standing
from zsfl.errors import Fenced
from zsfl.ids import NodeCard, NodeId, Role, Version
from zsfl.lease import Candidate, Promise, clock_s
from zsfl.settings import NodeSettings
from zsfl.wire.succession import Follow, Grant, Granted

LEASE_S = 1000.0
NEVER = 1 << 53
KEYS = {f"key-{shard}": (shard,) for shard in range(3)}
Answer = Callable[[Grant], Awaitable[Granted]]


def card(name: str, role: Role = Role.CLIENT, key: str = "") -> NodeCard:
    return NodeCard(id=NodeId(name), name=name, role=role, host="127.0.0.1", control_port=1, key=key or f"key-{name}")


def promises(shard: int) -> Answer:
    """An honest client."""
    return answering(Promise(clock_s() - LEASE_S, LEASE_S), shard)


def answering(promise: Promise, shard: int) -> Answer:
    async def answer(grant: Grant) -> Granted:
        by = Candidate(
            holder=grant.holder, name=grant.name, epoch=grant.epoch, known=grant.known, version=grant.version
        )
        refused = promise.ask(by, grant.lease_s, clock_s())
        return granted(shard, refused=refused, epoch=promise.epoch)

    return answer


def granted(*shards: int, refused: str = "", epoch: int = 1, newest: int = 0) -> Granted:
    return Granted(
        shards=shards, refused=refused, lease_s=LEASE_S, epoch=epoch, newest=(newest and epoch, Version(newest))
    )


def says(*shards: int, refused: str = "epoch has begun") -> Answer:
    async def answer(_: Grant) -> Granted:
        return granted(*shards, refused=refused, epoch=NEVER, newest=NEVER)

    return answer


async def silence(_: Grant) -> Granted:
    await asyncio.Event().wait()
    return granted()


class FakeNode:
    """A node with clients of several machines, and somebody who stands by."""

    def __init__(self, clients: dict[str, Answer], key: str = "key-me", **settings: Any) -> None:
        self.name, self.card = "me", SimpleNamespace(id=NodeId("me"), key=key)
        self.settings = NodeSettings(lost_after_s=LEASE_S, **settings)
        self.there = [card("standby", Role.STANDBY), *map(card, clients)]
        self.answers = clients
        self.notes: list[str] = []

    def peers(self, role: Role) -> list[NodeCard]:
        return [one for one in self.there if one.role is role]

    def peer(self, node: NodeId) -> NodeCard | None:
        return next((one for one in self.there if one.id == node), None)

    def note(self, message: str, level: str = "info") -> None:
        self.notes.append(message)

    def publish(self, broadcast: object) -> None:
        pass

    def trusts(self, key: str, role: Role) -> bool:
        return True

    async def persistently(self, write: Any) -> Any:
        return write()

    def waiting(self, what: object) -> AbstractContextManager[None]:
        return nullcontext()

    def link(self, to: NodeCard) -> Any:
        async def request(grant: Grant, deadline_s: float) -> Any:
            answer = await self.answers[to.name](grant)
            return SimpleNamespace(expect=lambda _: answer)

        return SimpleNamespace(request=request)


HONEST = {"0": promises, "1": promises, "2": promises}
LIARS: dict[str, Callable[[], Answer]] = {
    "without a shard": says,
    "for everybody": lambda: says(0, 1, 2),
    "promises for everybody": lambda: says(0, 1, 2, refused=""),
}


def clients(*liars: Answer, honest: int = 3) -> dict[str, Answer]:
    return {str(shard): promises(shard) for shard in range(honest)} | {f"evil-{n}": one for n, one in enumerate(liars)}


async def reigning(folder: Path, node: FakeNode) -> Reign:
    reign = Reign(cast(Any, node), folder, Stage(cast(Any, node)), shards=3, bound=0)
    reign.begin(Version(0))
    reign._keep(epoch=1)
    for one in node.peers(Role.CLIENT):
        if one.name in HONEST:
            await reign.joined(one, [int(one.name)])
    wish = Follow(
        node=NodeId("standby"), version=Version(0), ledger_bytes=0, last="", since=Version(0), checkpoint=None
    )
    reign.answer(wish)
    return reign


@pytest.mark.parametrize("lie", LIARS)
async def test_who_holds_no_shard_does_not_keep_an_aggregator_from_recording(lie: str, tmp_path: Path) -> None:
    node = FakeNode(clients(LIARS[lie]()))
    reign = await reigning(tmp_path, node)
    for _ in range(3):
        await reign._renew()
    assert reign._lease.held_of(clock_s()) == 3


@pytest.mark.parametrize("lie", LIARS)
async def test_who_holds_one_shard_of_three_does_not_either(lie: str, tmp_path: Path) -> None:
    node = FakeNode(clients(honest=2) | {"2": LIARS[lie]()})
    reign = await reigning(tmp_path, node)
    for _ in range(3):
        await reign._renew()
    assert reign._lease.is_held(clock_s())


async def test_who_holds_a_shard_has_one_voice_whatever_it_says(tmp_path: Path) -> None:
    node = FakeNode(clients(honest=1) | {"2": LIARS["promises for everybody"]()})
    reign = await reigning(tmp_path, node)
    await reign._renew()
    assert reign._lease.held_of(clock_s()) == 2


async def test_most_of_those_who_hold_shards_end_a_reign(tmp_path: Path) -> None:
    node = FakeNode(clients(honest=1) | {"1": says(1), "2": says(2)})
    reign = await reigning(tmp_path, node)
    with pytest.raises(Fenced):
        await reign._renew()


@pytest.mark.parametrize("ahead", [1, 3])
async def test_a_client_that_promised_itself_to_one_who_never_led_is_led_again(ahead: int, tmp_path: Path) -> None:
    """It hears nothing that is said in an earlier epoch than that, though most follow whoever leads in it."""
    promise = Promise(clock_s() - LEASE_S, LEASE_S)
    rival = Candidate(holder="c" * 12, name="rival", epoch=1 + ahead, known=1, version=9)
    assert not promise.ask(rival, 0.0, clock_s())  # which lasts no longer than that
    node = FakeNode(clients(honest=2) | {"2": answering(promise, 2)})
    reign = await reigning(tmp_path, node)
    for _ in range(2 * ahead + 2):
        await reign._renew()
    assert Standing.of(tmp_path).epoch == reign._stage.state.epoch == promise.epoch == 2 + ahead
    assert reign._lease.held_of(clock_s()) == 3


async def test_an_epoch_that_most_do_not_promise_is_not_led_in(tmp_path: Path) -> None:
    async def no_later(grant: Grant) -> Granted:
        return granted(1, refused="no" if grant.epoch > 1 else "", epoch=1)

    async def later(_: Grant) -> Granted:
        return granted(2, refused="epoch 2 has begun", epoch=2)

    node = FakeNode(clients(honest=1) | {"1": no_later, "2": later})
    reign = await reigning(tmp_path, node)
    for _ in range(3):
        await reign._renew()
    assert Standing.of(tmp_path).epoch < 2
    assert not reign._lease.is_held(clock_s())


class Slow:
    """A client that answers as another one does, once it may."""

    def __init__(self, answer: Answer) -> None:
        self._answer, self._may = answer, asyncio.Event()

    async def __call__(self, grant: Grant) -> Granted:
        await self._may.wait()
        return await self._answer(grant)

    def hurry(self) -> None:
        self._may.set()


@pytest.mark.parametrize("liar", [2, 3])
async def test_promises_that_come_late_are_enough_for_a_later_epoch(
    liar: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever somebody says meanwhile who would have it later still each time."""
    monkeypatch.setattr("zsfl.aggregator.consent.WAITED", 1e-5)

    async def always_later(grant: Grant) -> Granted:
        return granted(2, refused="a later epoch has begun", epoch=grant.epoch + liar)

    slow = [Slow(promises(0)), Slow(promises(1))]
    node = FakeNode({"0": slow[0], "1": slow[1], "2": always_later})
    reign = await reigning(tmp_path, node)
    async with asyncio.timeout(60):
        while not await reign._renew():
            pass
        for _ in range(5):
            assert not await reign._renew(), "it waits for those who did not answer yet"
        assert Standing.of(tmp_path).epoch < 2
        for one in slow:
            one.hurry()
        await reign._promised.wait_for(lambda _: reign._lease.is_held(clock_s()))
        await reign._renew()
    assert Standing.of(tmp_path).epoch == reign._stage.state.epoch == 2 + liar
    assert reign.is_held


async def test_one_that_lies_and_one_that_is_late_end_no_reign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsfl.aggregator.consent.WAITED", 1e-5)
    node = FakeNode({"0": promises(0), "1": Slow(promises(1)), "2": says(2)})
    reign = await reigning(tmp_path, node)
    async with asyncio.timeout(60):
        for _ in range(3):
            await reign._renew()


async def test_one_that_does_not_answer_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsfl.aggregator.consent.WAITED", 1e-5)
    node = FakeNode(clients(silence))
    reign = await reigning(tmp_path, node)
    async with asyncio.timeout(60):
        await reign._renew()
    assert reign._lease.held_of(clock_s()) == 3


async def test_a_late_promise_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsfl.aggregator.consent.WAITED", 1e-5)
    comes, honest = asyncio.Event(), promises(0)

    async def late(grant: Grant) -> Granted:
        await comes.wait()
        return await honest(grant)

    node = FakeNode({"0": late, "1": promises(1)})
    reign = await reigning(tmp_path, node)
    await reign._renew()
    assert not reign._lease.is_held(clock_s())
    comes.set()
    async with asyncio.timeout(60):
        await reign._promised.wait_for(lambda _: reign._lease.is_held(clock_s()))


def standby(folder: Path, node: FakeNode) -> Any:
    standing = Standing(holder="a" * 12, origin="b" * 12, epoch=1, shared=True, holders=KEYS)
    standing.keep(folder)
    return StandbyRole(cast(Any, node), Mirror(folder, 0, syncs=False), standing, shards=3, warm_up=lambda: None)


@pytest.mark.parametrize("takeover", ["majority", "always"])
@pytest.mark.parametrize("lie", LIARS)
async def test_nor_a_standby_from_taking_over(lie: str, takeover: str, tmp_path: Path) -> None:
    role = standby(tmp_path, FakeNode(clients(LIARS[lie]()), takeover=takeover))
    assert await role._asked()
    assert (Standing.of(tmp_path).epoch, role.elected.is_behind) == (2, False)


@pytest.mark.parametrize(("who", "is_behind"), [(0, False), (1, True)])
async def test_one_client_that_knows_of_a_lost_version_is_enough_to_make_its_steps_again(
    who: int, is_behind: bool, tmp_path: Path
) -> None:
    answers = {str(shard): says(shard, refused="") if shard < who else promises(shard) for shard in range(3)}
    role = standby(tmp_path, FakeNode(answers))
    assert await role._asked()
    assert role.elected.is_behind == is_behind


async def test_one_that_lies_stops_no_takeover_where_the_others_answer_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zsfl.aggregator.consent.WAITED", 1e-5)
    slow = [Slow(promises(0)), Slow(promises(1))]
    role = standby(tmp_path, FakeNode({"0": slow[0], "1": slow[1], "2": says(2)}))
    async with asyncio.timeout(60):
        for _ in range(5):
            assert not await role._asked()
        assert (role._epoch, role._has_rival) == (2, False)
        for one in slow:
            one.hurry()
        while not await role._asked():
            await asyncio.sleep(0)
    assert Standing.of(tmp_path).epoch == 2


async def test_one_that_holds_a_shard_names_no_epoch_to_a_standby(tmp_path: Path) -> None:
    role = standby(tmp_path, FakeNode(clients(honest=1) | {"2": says(2)}))
    assert not await role._asked()
    assert (role._epoch, role._has_rival) == (3, True)
    role = standby(tmp_path, FakeNode(clients(honest=1) | {"1": says(1), "2": says(2)}))
    assert not await role._asked()
    assert role._epoch == NEVER + 1, "most of them do"
