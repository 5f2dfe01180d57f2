"""Whatever the schemas allow fits the header, and what does not fit harms nobody."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from helpers.wires import HOST, wires
from msgspec import structs

from zsfl.front import in_turn
from zsfl.ids import Address, Cid, NodeCard, NodeId, PartName, Portion, Role, RunId, Version
from zsfl.settings import WireLimits
from zsfl.tensors.spec import MAX_NDIM, MAX_TENSOR_BYTES, TensorSpec
from zsfl.wire.examining import MAX_TOLD, Condition, Hearing, Wait
from zsfl.wire.fields import (
    MAX_CLASSES,
    MAX_JOINED,
    MAX_LINE,
    MAX_OFFERS,
    MAX_PEERS_EXCHANGED,
    MAX_SETTLED,
    MAX_SHARDS,
    MAX_TENSORS,
    Load,
    PeerHint,
    ShardInfo,
)
from zsfl.wire.framing import Header, decode_header, encode
from zsfl.wire.messages import (
    Announcement,
    AnyMessage,
    Beat,
    CheckNeed,
    FetchSpills,
    Goodbye,
    Hello,
    Join,
    Offers,
    Refusal,
    ReleaseSpills,
    RunState,
    SpillOffer,
    Spills,
    Weights,
    Welcome,
)
from zsfl.wire.pubsub import Publisher, in_pieces

MOST = 1 << 53
WIDE = "\N{GRINNING FACE}"
CID = Cid("abcdef-v9999999999999999-s999999999-k999999")
CARD = NodeCard(
    id=NodeId("f" * 12),
    name="n" * 63,
    role=Role.SPLIT_SERVER,
    host="255.255.255.255",
    control_port=65535,
    data_port=65535,
    pub_port=65535,
    news_port=65535,
)
WIDEST = structs.replace(CARD, id=NodeId(WIDE * 200), name=WIDE * 200, key="k" * 40)
HINTS = (PeerHint(id=CARD.id, role=CARD.role, address=Address(CARD.address)),) * MAX_PEERS_EXCHANGED
TEXTS = {f"{number:02}" + WIDE * 198: WIDE * 200 for number in range(64)}
COUNTERS = {text: float(1 << 53) for text in TEXTS}
CODECS = (WIDE * 200,) * 32
OFFER = SpillOffer(cid=CID, part="client", version=Version(MOST), size_bytes=MOST)
KEY: tuple[Cid, PartName] = (CID, "client")
KEYS = (KEY,) * MAX_OFFERS
LOAD = Load(slots=MOST, busy=MOST, service_s=86_400.0)
SPEC = TensorSpec("t" * 128, "bfloat16", (MAX_TENSOR_BYTES,) * MAX_NDIM, "bf16+shuffle+lz4", MAX_TENSOR_BYTES)
STATE = RunState(
    run=RunId("abcdef"),
    phase="training",
    version=Version(MOST),
    round=MOST,
    rounds=MOST,
    window=MOST,
    windows=MOST,
    slices=((MOST, MOST, MOST),) * MAX_SHARDS,
    merger=CARD.id,
    merged=(MOST,) * MAX_SHARDS,
    present_classes=(MOST,) * MAX_CLASSES,
    all_classes=(MOST,) * MAX_CLASSES,
    tested=Version(MOST),
    evaluation=MOST,
    reason=WIDE * 4000,
)
MOST_OF_ONE = 1 << 40
SHARD = ShardInfo(shard=MOST, train_samples=MOST_OF_ONE, test_samples=MOST_OF_ONE, classes=(MOST_OF_ONE,) * MAX_CLASSES)
WORST: Sequence[AnyMessage] = [
    Hello(protocol=MOST, facts=TEXTS, card=CARD, codecs=CODECS),
    Welcome(card=CARD, codecs=CODECS, peers=HINTS),
    Condition(
        card=CARD,
        protocol=MOST,
        facts=TEXTS,
        clock_s=1e12,
        mdns=True,
        peers=MOST,
        hears=(Hearing(card=WIDEST, heard_s=86_400.0),) * MAX_PEERS_EXCHANGED,
        refused={f"{number:02}" + WIDE * 198: WIDE * MAX_LINE for number in range(MAX_TOLD)},
        waits=(Wait(what=WIDE * MAX_LINE, seconds=86_400.0),) * MAX_TOLD,
        versions=dict(list(TEXTS.items())[:16]),
        free_bytes=MOST,
        writable=True,
    ),
    Join(node=CARD.id, shards=(SHARD,) * MAX_JOINED),
    Refusal(kind=WIDE * 200, message=WIDE * 4000, retry_after_s=86_400.0),
    FetchSpills(wanted=KEYS),
    Spills(found=KEYS),
    CheckNeed(parts=(KEY,) * MAX_OFFERS),
    ReleaseSpills(cids=(CID,) * MAX_OFFERS),
    Weights(
        portion=Portion("client/" + 40 * "x"), version=Version(MOST), base=Version(MOST), tensors=(SPEC,) * MAX_TENSORS
    ),
    Beat(
        card=CARD,
        peers=HINTS,
        counters=COUNTERS,
        load=LOAD,
        offers=(OFFER,) * MAX_OFFERS,
        state=STATE,
        merging=(CID,) * MAX_OFFERS,
    ),
    Offers(node=CARD.id, offers=(OFFER,) * MAX_OFFERS, counters=COUNTERS),
    Announcement(node=CARD.id, state=STATE, counted=(CID,) * MAX_SETTLED, dropped=(CID,) * MAX_SETTLED),
]


@pytest.mark.parametrize("body", WORST, ids=lambda body: type(body).__name__)
def test_the_largest_message_of_its_kind_fits(body: AnyMessage) -> None:
    limits = WireLimits()
    sizes = tuple(1 << 30 for _ in range(len(body.tensors) if isinstance(body, Weights) else 0))
    frames = next(encode(Header(kind="publish", id=1 << 62, deadline_s=86_400.0, sizes=sizes, body=body), (), limits))
    assert decode_header(frames[0], limits).body == body


async def test_a_broadcast_over_the_limit_is_dropped_counted_and_noted_once() -> None:
    notes: list[str] = []
    async with wires() as w:
        limits = WireLimits(max_header_bytes=256, max_message_bytes=1024)
        publisher = Publisher(w.context, HOST, limits=limits, counters=w.served, note=notes.append)
        try:
            for _ in range(2):
                publisher.publish(b"", Goodbye(node=CARD.id, reason="r" * 200), [bytes(2048)])
                publisher.publish(b"", WORST[-1])  # type: ignore[arg-type]
            publisher.publish(b"", Goodbye(node=CARD.id, reason=""))
        finally:
            publisher.close()
    assert w.served.snapshot()["broadcasts_dropped"] == 4
    assert ["Goodbye" in notes[0], "Announcement" in notes[1], len(notes)] == [True, True, 2]


@pytest.mark.parametrize("count", [0, 1, MAX_SETTLED, MAX_SETTLED + 1, 3 * MAX_SETTLED])
def test_an_announcement_of_many_cids_becomes_several(count: int) -> None:
    counted = tuple(Cid(str(number)) for number in range(count))
    whole = Announcement(node=CARD.id, state=STATE, counted=counted, dropped=counted[:3])
    pieces = list(in_pieces(whole))
    assert len(pieces) == max(1, -(-count // MAX_SETTLED))
    assert all(len(piece.counted) <= MAX_SETTLED and piece.state == STATE for piece in pieces)
    assert tuple(cid for piece in pieces for cid in piece.counted) == counted
    assert tuple(cid for piece in pieces for cid in piece.dropped) == counted[:3]


@pytest.mark.parametrize("count", [0, 1, MAX_OFFERS, 2 * MAX_OFFERS + 1])
def test_heartbeats_repeat_every_offer_in_its_turn(count: int) -> None:
    offers = tuple(SpillOffer(cid=CID, part="body", version=Version(number), size_bytes=1) for number in range(count))
    turns = max(1, -(-count // MAX_OFFERS))
    assert in_turn(offers, 0) == offers[:MAX_OFFERS]
    assert tuple(offer for turn in range(turns) for offer in in_turn(offers, 5 * turns + turn)) == offers
