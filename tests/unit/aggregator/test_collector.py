"""What the collector takes of what is offered, and what it says of spills that do not come."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import torch
from helpers.waiting import eventually

from zsfl.aggregator.collector import REFUSALS, Collector
from zsfl.aggregator.gathering import Gathering
from zsfl.aggregator.journal import Journal
from zsfl.aggregator.roster import Roster
from zsfl.errors import DeadlineExceeded, NoPeer, RemoteProtocolError, Unavailable, ZsflError
from zsfl.ids import Cid, NodeCard, NodeId, PartName, Role, RunId, Version, step_cid
from zsfl.latest import Latest
from zsfl.learning.averaging import Contribution, StepShare
from zsfl.metrics import Counters
from zsfl.spill.layout import SpillMeta, decode_meta, encode
from zsfl.wire.fields import MAX_CARRIED_BYTES, MAX_OFFERS, ShardInfo
from zsfl.wire.messages import FetchSpills, Recheck, ReleaseSpills, Remake, Request, SpillOffer, Spills

CARD = NodeCard(id=NodeId("1"), name="server", role=Role.SPLIT_SERVER, host="127.0.0.1", control_port=1, data_port=2)
CLIENT = NodeCard(id=NodeId("2"), name="client", role=Role.CLIENT, host="127.0.0.1", control_port=1, data_port=2)


def cid(version: int, shard: int = 0) -> Cid:
    return step_cid(RunId("3fa9c1"), shard, Version(version))


class Refusing:
    """A node whose one peer refuses every request with the same error."""

    def __init__(self, error: ZsflError) -> None:
        self.error = error
        self.asked: list[Request] = []
        self.notes: list[str] = []
        self.settings = SimpleNamespace(request_s=1.0, beat_s=0.01, lost_after_s=0.03)
        self.counters = Counters()
        self.tasks: list[asyncio.Task[None]] = []
        self.handed: tuple[Spills, list[bytes]] | None = None
        """What it hands over instead, whatever it is asked for."""

    def connect(self, *_: object) -> Refusing:
        return self

    async def request(self, body: Request, deadline_s: float) -> Any:
        self.asked.append(body)
        if self.handed is None or not isinstance(body, FetchSpills):
            raise self.error
        found, parts = self.handed
        return SimpleNamespace(parts=parts, expect=lambda _: found)

    def start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        self.tasks.append(asyncio.create_task(work, name=name))
        return self.tasks[-1]

    def note(self, message: str, level: str = "info") -> None:
        assert level == "warning"
        self.notes.append(message)

    def close(self, reason: str) -> None:
        assert reason == "is gone"

    async def end(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def said_of(error: ZsflError, folder: Path) -> list[str]:
    """What is noted when two spills are offered three times each, and then one of the next version."""
    node = Refusing(error)
    gathering = Gathering(RunId("3fa9c1"), max_staleness=0, steps_per_version=1, shards=2)
    roster = Roster(2)
    roster.join(CLIENT.id, CLIENT.name, [ShardInfo(shard=shard, train_samples=9, test_samples=0) for shard in (0, 1)])
    collector = Collector(cast(Any, node), gathering, Journal(folder), lambda _: None, Latest(roster))
    collector.joined(CARD)
    for version, shard in [(4, 0), (4, 1), (4, 0), (4, 1), (4, 0), (4, 1), (5, 0)]:
        gathering.begin(Version(version), {cid(version, shard) for shard in (0, 1)})
        asked = len(node.asked)
        offer = SpillOffer(cid=cid(version, shard), part="body", version=Version(version), size_bytes=9)
        collector.offered(CARD.id, [offer])
        await eventually(lambda asked=asked: len(node.asked) > asked)
    collector.lost(CARD)
    await node.end()
    return node.notes


async def test_why_a_spill_does_not_come_is_said_once(tmp_path: Path) -> None:
    notes = await said_of(Unavailable("server: LocalProtocolError: 9 bytes are over the limit of 8"), tmp_path)
    assert [note.split(":")[0] for note in notes] == [
        f"server does not hand over body of {cid(4, 0)}",
        f"server does not hand over body of {cid(4, 1)}",
        f"server does not hand over body of {cid(5, 0)}",
    ]
    assert all("over the limit of 8" in note for note in notes)


async def test_a_holder_that_is_gone_is_left_to_presence(tmp_path: Path) -> None:
    assert await said_of(NoPeer("server is gone"), tmp_path) == []


# --- spills that come with their offers ------------------------------------------------------------------


def spill(version: int, shards: tuple[int, ...], part: PartName = "body") -> tuple[SpillOffer, bytes]:
    """A spill of a step, or of several merged, and what its holder offers."""
    shares = tuple(StepShare(cid=cid(version, shard), n=2.0, samples=2, client=f"c{shard}") for shard in shards)
    meta = SpillMeta(
        cid=shares[0].cid,
        part=part,
        version=Version(version),
        n=2.0 * len(shards),
        samples=2 * len(shards),
        loss_sum=None,
        client="c",
        node="server",
        members=shares if len(shares) > 1 else (),
    )
    data = encode(meta, {"grad/a": torch.ones(3)})
    members = tuple(share.cid for share in meta.members)
    offer = SpillOffer(cid=meta.cid, part=part, version=meta.version, size_bytes=len(data), members=members)
    return offer, data


class Collecting:
    """A collector at version 4 of two shards."""

    def __init__(self, folder: Path) -> None:
        self.node = Refusing(Unavailable("not now"))
        journal = Journal(folder)
        journal.begin(Version(4))
        self.gathering = Gathering(RunId("3fa9c1"), max_staleness=0, steps_per_version=1, shards=2)
        self.gathering.begin(Version(4), [cid(4, 0), cid(4, 1)])
        self.took: list[Contribution] = []
        roster = Roster(2)
        infos = [ShardInfo(shard=shard, train_samples=9, test_samples=0) for shard in range(2)]
        roster.join(CLIENT.id, CLIENT.name, infos)
        self.collector = Collector(cast(Any, self.node), self.gathering, journal, self.took.append, Latest(roster))
        self.collector.joined(CARD)

    async def ends(self) -> None:
        self.collector.lost(CARD)
        await self.node.end()


async def test_a_spill_that_came_along_is_taken_without_being_asked_for(tmp_path: Path) -> None:
    at = Collecting(tmp_path)
    (merged, data), (client, its) = spill(4, (0, 1)), spill(4, (1,), "client")
    at.collector.joined(CLIENT)
    for _ in range(2):  # the second time is no news
        at.collector.offered(CARD.id, [merged], [data])
        at.collector.offered(CLIENT.id, [client], [its])
    assert [(one.cid, one.part, len(one.members)) for one in at.took] == [
        (cid(4, 0), "body", 2),
        (cid(4, 1), "client", 0),
    ]
    await asyncio.sleep(0)
    assert at.node.asked == []
    await at.ends()


async def test_whose_it_is_is_known_from_who_hands_it_over_and_not_from_what_it_says(tmp_path: Path) -> None:
    at = Collecting(tmp_path)
    data = encode(
        msgspec.structs.replace(decode_meta(spill(4, (1,))[1]), client="client-0", node="client-0"),
        {"grad/a": torch.ones(3)},
    )
    merged, data_of_both = spill(4, (0, 1))
    single = SpillOffer(cid=cid(4, 1), part="body", version=Version(4), size_bytes=len(data))
    at.collector.offered(CARD.id, [single, merged], [data, data_of_both])
    first, both = at.took
    assert (first.client, first.node) == ("client", "server")
    assert [member.client for member in both.members] == ["client", "client"]
    await at.ends()


async def test_one_that_came_along_damaged_is_asked_for(tmp_path: Path) -> None:
    at = Collecting(tmp_path)
    offer, data = spill(4, (0, 1))
    at.collector.offered(CARD.id, [offer], [data[:-1] + b"x"])
    await eventually(lambda: bool(at.node.asked))
    assert at.node.asked[0] == FetchSpills(wanted=((cid(4, 0), "merged"),))
    assert at.took == []
    assert at.node.notes[0].startswith("server handed over a corrupt spill")
    await at.ends()


async def test_one_that_is_not_what_was_offered_is_not_taken(tmp_path: Path) -> None:
    at = Collecting(tmp_path)
    (offer, _), (_, other) = spill(4, (0,)), spill(4, (1,))
    at.collector.offered(CARD.id, [offer], [other])
    assert at.took == []
    await at.ends()


@pytest.mark.parametrize("carried", [[b""] * 2, [bytes(MAX_CARRIED_BYTES + 1)]], ids=["too many", "too long"])
async def test_what_comes_along_must_fit_the_offers(tmp_path: Path, carried: list[bytes]) -> None:
    at = Collecting(tmp_path)
    with pytest.raises(RemoteProtocolError):
        at.collector.offered(CARD.id, [spill(4, (0,))[0]], carried)
    await at.ends()


# --- what its holder does not hand over ------------------------------------------------------------------


async def test_a_body_part_that_nobody_offers_is_made_again_by_its_client(tmp_path: Path) -> None:
    at = Collecting(tmp_path)
    at.collector.joined(CLIENT)
    offer, data = spill(4, (1,), "client")
    at.collector.offered(CLIENT.id, [offer], [data])
    await eventually(lambda: Remake(lost=((cid(4, 1), "body"),)) in at.node.asked)
    body, data = spill(4, (1,))
    at.collector.offered(CARD.id, [body], [data])
    await eventually(lambda: not at.collector.has_lost)
    await at.ends()


async def test_what_a_server_does_not_hand_over_in_time_is_made_again(tmp_path: Path) -> None:
    at = Collecting(tmp_path)
    at.node.error = DeadlineExceeded("no answer")
    at.collector.joined(CLIENT)
    at.collector.offered(CARD.id, [spill(4, (0, 1))[0]])
    wanted = Remake(lost=((cid(4, 0), "body"), (cid(4, 1), "body")))
    await eventually(lambda: wanted in at.node.asked)
    await at.ends()


async def test_what_a_client_does_not_hand_over_in_time_is_waited_for(tmp_path: Path) -> None:
    at = Collecting(tmp_path)
    at.node.error = DeadlineExceeded("no answer")
    at.collector.joined(CLIENT)
    offer = spill(4, (1,), "client")[0]
    for _ in range(3):  # as often as its heartbeats offer it
        asked = len(at.node.asked)
        at.collector.offered(CLIENT.id, [offer])
        await eventually(lambda asked=asked: len(at.node.asked) > asked)
    assert not any(isinstance(request, Remake) for request in at.node.asked)
    await at.ends()


# --- what is lost ----------------------------------------------------------------------------------------


class Losing(Refusing):
    """A node whose server lost what it offered; of its clients the first never answers."""

    def __init__(self) -> None:
        super().__init__(Unavailable("not now"))
        self.settings = SimpleNamespace(request_s=1.0, lost_after_s=30.0, beat_s=0.01)
        self.remade: dict[str, list[tuple[Cid, PartName]]] = {}

    def connect(self, *args: Any) -> Any:
        card: NodeCard = args[0]

        async def request(body: FetchSpills | Recheck | Remake, deadline_s: float) -> object:
            match body:
                case FetchSpills():
                    answer = Spills(found=())
                case Recheck():
                    answer = Spills(found=body.wanted)
                case Remake():
                    assert deadline_s == 60.0
                    self.remade.setdefault(card.name, []).extend(body.lost)
                    await asyncio.sleep(3600 if card.name == "client-0" else 0)
                    raise self.error
            return SimpleNamespace(parts=(), expect=lambda _: answer)

        return SimpleNamespace(request=request, close=lambda _: None)


async def test_those_who_hold_the_shard_are_asked_to_make_it_again_and_nobody_waits_for_another(tmp_path: Path) -> None:
    node, roster = Losing(), Roster(3)
    gathering = Gathering(RunId("3fa9c1"), max_staleness=0, steps_per_version=1, shards=3)
    gathering.begin(Version(4), [cid(4, shard) for shard in range(3)])
    collector = Collector(cast(Any, node), gathering, Journal(tmp_path), lambda _: None, Latest(roster))
    collector.joined(CARD)
    for shard in range(3):
        card = msgspec.structs.replace(CARD, id=NodeId(f"c{shard}"), name=f"client-{shard}", role=Role.CLIENT)
        roster.join(card.id, card.name, [ShardInfo(shard=shard, train_samples=9, test_samples=0, classes=())])
        collector.joined(card)
    collector.offered(CARD.id, [spill(4, (shard,))[0] for shard in (0, 1)])
    await eventually(lambda: "client-1" in node.remade)
    assert node.remade == {"client-0": [(cid(4, 0), "body")], "client-1": [(cid(4, 1), "body")]}
    for task in node.tasks:
        task.cancel()
    await asyncio.gather(*node.tasks, return_exceptions=True)


# --- what cannot be counted, and who may not have it -------------------------------------------------------


async def test_spills_are_taken_only_from_whoever_can_rightly_have_them(tmp_path: Path) -> None:
    at = Collecting(tmp_path)
    stranger = msgspec.structs.replace(CLIENT, id=NodeId("3"), name="stranger")
    for card in (CLIENT, stranger):
        at.collector.joined(card)
    (client, its), (body, data) = spill(4, (1,), "client"), spill(4, (1,))
    for holder, offer, carried in ((CARD, client, its), (stranger, client, its), (stranger, body, data)):
        at.collector.offered(holder.id, [offer], [carried])
        at.collector.offered(holder.id, [offer])
    await asyncio.sleep(0)
    assert at.took == []
    assert not any(isinstance(request, FetchSpills) for request in at.node.asked)
    at.collector.offered(CLIENT.id, [client], [its])
    at.collector.offered(CARD.id, [body], [data])
    assert [one.part for one in at.took] == ["client", "body"]
    await at.ends()


async def test_a_holder_that_offers_without_end_takes_no_memory(tmp_path: Path) -> None:
    at = Collecting(tmp_path)
    stranger = msgspec.structs.replace(CLIENT, id=NodeId("3"), name="stranger")
    at.collector.joined(stranger)
    holder = at.collector._holders[stranger.id]
    for first in range(0, 40_000, 100):
        ks = range(first + 1, first + 101)
        impossible = tuple(step_cid(RunId("3fa9c1"), 0, Version(4), k) for k in ks)
        possible = SpillOffer(cid=cid(4), part="body", version=Version(4), size_bytes=9, members=(cid(4), cid(4, 1)))
        merged = SpillOffer(cid=impossible[0], part="body", version=Version(4), size_bytes=9, members=impossible[:64])
        at.collector.offered(stranger.id, [merged, possible])
    assert len(holder.release) == MAX_OFFERS
    assert holder.members == {}
    await eventually(lambda: bool(at.node.asked))
    (told,) = at.node.asked
    assert isinstance(told, ReleaseSpills)
    assert set(told.cids) == {
        step_cid(RunId("3fa9c1"), 0, Version(4), k)
        for k in [*range(1, 65), *range(101, 165), *range(201, 265), *range(301, 365)]
    }
    at.collector.lost(stranger)
    await at.ends()


async def test_of_what_is_handed_over_only_what_was_offered_is_taken(tmp_path: Path) -> None:
    """Not the step of somebody else, nor a sum of other steps than those that were said."""
    at = Collecting(tmp_path)
    own, (_, others) = spill(4, (0,), "client"), spill(4, (1,), "client")
    at.node.handed = Spills(found=((cid(4, 1), "client"),)), [others]
    at.collector.joined(CLIENT)
    at.collector.offered(CLIENT.id, [own[0]])
    await eventually(lambda: len(at.node.asked) > 1, 5)
    sum_offer, _ = spill(4, (0, 1))
    _, other_sum = spill(4, (0, 2))
    at.node.handed = Spills(found=((cid(4, 0), "merged"),)), [other_sum]
    at.collector.offered(CARD.id, [sum_offer])
    await eventually(lambda: any("others than were offered" in note for note in at.node.notes), 5)
    assert at.took == []
    await at.ends()


async def test_what_cannot_be_counted_is_made_again_and_then_given_up(tmp_path: Path) -> None:
    at = Collecting(tmp_path)
    given_up: list[str] = []

    class Refusing:
        most_bytes = 1 << 20

        def too_long(self, offer: SpillOffer) -> str:
            return ""

        def objection(self, one: Contribution) -> str:
            return "it has a gradient of nothing"

        def give_up(self, cids: Sequence[Cid], why: str) -> None:
            given_up.append(f"{', '.join(cids)}: {why}")

    at.collector._judge = cast(Any, Refusing())
    at.collector.joined(CLIENT)
    body, data = spill(4, (1,))
    for _ in range(REFUSALS):
        assert given_up == []
        at.collector.offered(CARD.id, [body], [data])
    assert given_up == [f"{cid(4, 1)}: it has a gradient of nothing"]
    await eventually(lambda: Remake(lost=((cid(4, 1), "body"),)) in at.node.asked, 5)
    await eventually(lambda: ReleaseSpills(cids=(cid(4, 1),)) in at.node.asked, 5)
    assert at.took == []
    refused = [note for note in at.node.notes if note.startswith("refused")]
    assert refused == [f"refused what server holds of {cid(4, 1)}: it has a gradient of nothing"]
    await at.ends()


@pytest.mark.parametrize("part", ["client", "body"])
async def test_what_is_longer_than_it_can_be_is_not_fetched_and_given_up_like_what_cannot_be_counted(
    tmp_path: Path, part: PartName
) -> None:
    at = Collecting(tmp_path)
    given_up: list[str] = []
    long, good = 1 << 30, 9

    class Judge:
        def too_long(self, offer: SpillOffer) -> str:
            return "it is too long" * (offer.size_bytes == long)

        def give_up(self, cids: Sequence[Cid], why: str) -> None:
            given_up.append(f"{', '.join(cids)}: {why}")
            at.gathering.refuse(cids, why)

    at.collector._judge = cast(Any, Judge())
    at.collector.joined(CLIENT)
    holder = CLIENT if part == "client" else CARD
    offers = [
        SpillOffer(cid=cid(4, shard), part=part, version=Version(4), size_bytes=size)
        for shard, size in ((0, long), (1, good))
    ]
    for _ in range(REFUSALS):
        assert given_up == []
        at.collector.offered(holder.id, offers)
    assert given_up == [f"{cid(4, 0)}: it is too long"]
    at.collector.offered(holder.id, offers)
    await eventually(lambda: FetchSpills(wanted=((cid(4, 1), part),)) in at.node.asked, 5)
    fetched = [key for one in at.node.asked if isinstance(one, FetchSpills) for key in one.wanted]
    assert (cid(4, 0), part) not in fetched
    assert [note for note in at.node.notes if "too long" in note] == [
        f"refused what {holder.name} holds of {cid(4, 0)}: it is too long"
    ]
    assert at.node.counters.snapshot()["spills_refused"] == REFUSALS
    await at.ends()


@pytest.mark.parametrize("error", [TypeError("a"), OverflowError("a"), RuntimeError("a")])
async def test_whatever_goes_wrong_while_a_spill_is_read_it_is_not_taken_and_the_aggregator_goes_on(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def decode(*_: object) -> Contribution:
        raise error

    at = Collecting(tmp_path)
    body, data = spill(4, (1,))
    with monkeypatch.context() as patched:
        patched.setattr("zsfl.aggregator.collector.decode_contribution", decode)
        for _ in range(3):
            at.collector.offered(CARD.id, [body], [data])
    assert at.took == []
    said = f"it leads to an error, {type(error).__name__}: a"
    assert at.node.notes[0] == f"server handed over a corrupt spill of {cid(4, 1)}: {said}"
    assert capfd.readouterr().err.count("Traceback") == 1
    await at.ends()
