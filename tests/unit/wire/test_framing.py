"""Messages to frames and back, and everything that is not a message."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Sequence
from contextlib import suppress
from random import Random
from unittest.mock import patch

import msgpack  # pyright: ignore[reportMissingTypeStubs]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsfl import ids
from zsfl.errors import LocalProtocolError, RemoteProtocolError
from zsfl.ids import Version
from zsfl.settings import WireLimits
from zsfl.wire import framing
from zsfl.wire.framing import (
    HEADER_TIMES,
    STALLED_S,
    Arrived,
    Assembler,
    Buffer,
    Header,
    NoRoom,
    Room,
    decode_header,
    encode,
    nbytes,
)
from zsfl.wire.messages import FetchWeights, Ok, Train

LIMITS = WireLimits(frame_bytes=64, max_message_bytes=4096, max_header_bytes=512, max_parts=8, max_inflight=4)
BODY = Train(rounds=3)

sizes_around_a_frame = st.sampled_from([0, 1, 31, 63, 64, 65, 127, 128, 129, 300])
part_lists = st.lists(
    sizes_around_a_frame.flatmap(lambda size: st.binary(min_size=size, max_size=size)), max_size=LIMITS.max_parts
)


def fed(assembler: Assembler, frames: Sequence[Buffer]) -> Arrived | None:
    """The one message that these frames complete, if any."""
    arrived = list(assembler.feed(frames))
    assert len(arrived) <= 1
    return arrived[0] if arrived else None


def frames_of(parts: list[bytes], message_id: int = 1, limits: WireLimits = LIMITS) -> list[list[Buffer]]:
    header = Header(kind="request", id=message_id, deadline_s=2.0, body=BODY)
    return [list(frames) for frames in encode(header, parts, limits)]


def whole(arrived: Arrived | None) -> tuple[int, list[bytes]]:
    assert arrived is not None
    assert arrived.body == BODY
    assert (arrived.kind, arrived.deadline_s) == ("request", 2.0)
    return arrived.id, [bytes(part) for part in arrived.parts]


def head(**fields: object) -> bytes:
    """A header packed by a plain msgpack, whatever it says."""
    packed = msgpack.packb(fields)  # pyright: ignore[reportUnknownMemberType]
    assert packed is not None
    return packed


OK = {"t": "ok"}


# --- round trips -----------------------------------------------------------------------------------------


@given(part_lists)
def test_parts_of_any_size_come_back_as_they_were(parts: list[bytes]) -> None:
    assembler = Assembler(LIMITS)
    multiparts = frames_of(parts)
    for frames in multiparts[:-1]:
        assert fed(assembler, frames) is None
    assert whole(fed(assembler, multiparts[-1])) == (1, parts)
    assert assembler.idle


@given(part_lists)
def test_no_multipart_is_longer_than_a_frame_size(parts: list[bytes]) -> None:
    for frames in frames_of(parts):
        assert sum(nbytes(frame) for frame in frames[1:]) <= LIMITS.frame_bytes


@given(part_lists, st.sampled_from([1, 31, 1 << 16]), st.lists(st.integers(1, 200), min_size=1))
def test_frames_may_be_cut_anywhere(parts: list[bytes], kept_from_bytes: int, cuts: list[int]) -> None:
    limits = WireLimits(frame_bytes=1)
    assembler, (begun, *_) = Assembler(limits), frames_of([*parts, b"!!"], limits=limits)
    with patch.object(framing, "KEPT_FROM_BYTES", kept_from_bytes):
        arrived, rest = fed(assembler, begun), memoryview(b"".join(parts) + b"!!")
        for cut in itertools.cycle(cuts):
            arrived, rest = fed(assembler, [head(kind="chunk", id=1), rest[:cut]]), rest[cut:]
            if not rest:
                break
    assert whole(arrived) == (1, [*parts, b"!!"])


def test_a_part_is_cut_only_where_it_does_not_fit_one_frame() -> None:
    limits = WireLimits(frame_bytes=100, piece_bytes=30)
    cut = [
        list(map(nbytes, frames[1:])) for frames in frames_of([bytes(n) for n in (20, 5, 10, 100, 0, 130)], 1, limits)
    ]
    assert cut == [[], [20, 5], [10], [100], [30], [30], [30], [30], [10]]


@given(st.lists(part_lists, min_size=2, max_size=LIMITS.max_inflight), st.randoms(use_true_random=False))
def test_messages_of_one_peer_may_be_interleaved(messages: list[list[bytes]], rng: Random) -> None:
    room = Room(LIMITS.max_arriving_bytes)
    assembler = Assembler(LIMITS, room)
    queues = {number: frames_of(parts, number) for number, parts in enumerate(messages)}
    found: dict[int, list[bytes]] = {}
    while queues:
        number = rng.choice(list(queues))
        if arrived := fed(assembler, queues[number].pop(0)):
            message_id, parts = whole(arrived)
            found[message_id] = parts
        if not queues[number]:
            del queues[number]
    assert found == dict(enumerate(messages))
    assert room.used_bytes == 0


def test_parts_need_not_be_bytes_of_one_dimension() -> None:
    grid = memoryview(bytes(range(96))).cast("B", (8, 12))
    assembler = Assembler(LIMITS)
    header = Header(kind="request", id=1, deadline_s=2.0, body=BODY)
    arrived = [fed(assembler, frames) for frames in encode(header, [grid, memoryview(bytes(8)).cast("i")], LIMITS)]
    assert whole(arrived[-1]) == (1, [bytes(range(96)), bytes(8)])


def test_the_header_is_a_plain_msgpack_map() -> None:
    body = FetchWeights(portion=ids.BODY, version=Version(7))
    (frames,) = encode(Header(kind="request", id=9, deadline_s=1.5, body=body), [b"ab", b""], LIMITS)
    fields = msgpack.unpackb(frames[0])  # pyright: ignore[reportUnknownMemberType,reportUnknownVariableType]
    assert fields == {
        "kind": "request",
        "id": 9,
        "deadline_s": 1.5,
        "sizes": [2, 0],
        "body": {"t": "fetch-weights", "portion": "body", "version": 7},
    }


@pytest.mark.parametrize(
    "parts", [[bytes(LIMITS.max_message_bytes + 1)], [b"x"] * (LIMITS.max_parts + 1)], ids=["bytes", "parts"]
)
def test_what_breaks_a_limit_is_not_sent(parts: list[bytes]) -> None:
    with pytest.raises(LocalProtocolError, match="over the limit"):
        frames_of(parts)


def test_a_header_over_the_cap_is_not_sent() -> None:
    with pytest.raises(LocalProtocolError, match="header"):
        frames_of([], limits=WireLimits(max_header_bytes=16))


# --- what is no message ----------------------------------------------------------------------------------


def refused(frames: list[Buffer], limits: WireLimits = LIMITS) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as caught:
        fed(Assembler(limits), frames)
    return caught.value


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_random_frames_are_never_more_than_a_protocol_error(frames: list[bytes]) -> None:
    assembler = Assembler(LIMITS)
    with suppress(RemoteProtocolError, NoRoom):
        fed(assembler, frames)
    assert assembler.idle


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8) | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
field_names = st.sampled_from(["kind", "id", "deadline_s", "sizes", "body", "t", "rounds"])
kinds = st.sampled_from(["request", "reply", "publish", "chunk", "cancel"])


@given(
    st.dictionaries(field_names, json_like | kinds | st.just(OK) | st.just(1), max_size=6),
    st.lists(st.binary(max_size=70), max_size=3),
)
def test_headers_of_any_structure_are_at_most_a_protocol_error(fields: dict[str, object], parts: list[bytes]) -> None:
    with suppress(RemoteProtocolError, NoRoom):
        fed(Assembler(LIMITS), [head(**fields), *parts])


@given(st.data())
def test_a_truncated_header_is_a_protocol_error(data: st.DataObject) -> None:
    packed = bytes(frames_of([b"abc"])[0][0])
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(RemoteProtocolError):
        decode_header(packed[:cut], LIMITS)


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (b"", "not a zsfl message"),
        (b"\x91" * 500, "not a zsfl message"),
        (b"\x81" * 500, "not a zsfl message"),
        (b"\xdd\xff\xff\xff\xff", "not a zsfl message"),
        (b"\xc7\x05\x7fabcde", "not a zsfl message"),
        (head(kind="requst", id=1, body=OK), "not a zsfl message"),
        (head(kind="request", id=-1, body=OK), "not a zsfl message"),
        (head(kind="request", id=2**63, body=OK), "not a zsfl message"),
        (head(kind="request", id=1, body={"t": "exec"}), "not a zsfl message"),
        (head(kind="request", id=1, body=OK, more=1), "not a zsfl message"),
        (head(kind="request", id=1, sizes=[-1], body=OK), "not a zsfl message"),
        (head(kind="request", id=1, deadline_s=float("nan"), body=OK), "not a zsfl message"),
        (head(kind="request", id=1, deadline_s=1e9, body=OK), "not a zsfl message"),
        (head(kind="request", id=1), "without a body"),
        (head(kind="request", id=1, sizes=[2**63, 2**63], body=OK), "at most 4096"),
        (head(kind="request", id=1, sizes=[1] * 9, body=OK), "at most 4096 bytes in 8 parts"),
    ],
)  # fmt: skip
def test_a_bad_header_is_a_protocol_error(frame: bytes, says: str) -> None:
    assert says in str(refused([frame]))


@pytest.mark.parametrize("sizes", [[3], [4, 0], [2, 2, 0]])
def test_sizes_that_lie_are_a_protocol_error_with_the_id(sizes: list[int]) -> None:
    error = refused([head(kind="request", id=5, sizes=sizes, body=OK), b"ab", b"cd"])
    assert error.message_id == 5


def test_the_id_of_a_message_of_another_version_is_found() -> None:
    assert refused([head(kind="request", id=77, body={"t": "from-the-future", "x": 1})]).message_id == 77
    assert refused([head(kind="request", id=True, body=OK)]).message_id is None
    assert refused([head(kind="request", id="7", body=OK)]).message_id is None


@pytest.mark.parametrize(
    "more", [b"\x91" * 400_000 + b"\x01", b"\xdc\xff\xff" * 60_000, b"\x81\x01" * 400_000 + b"\x01"]
)
def test_a_body_of_another_version_costs_no_memory_however_it_is_nested(more: bytes) -> None:
    packed = b"\x83\xa4kind\xa7request\xa2id\x07\xa4body\x82\xa1t\xa2ok\xa1x" + more
    tracemalloc.start()
    try:
        error = refused([packed], WireLimits())
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert error.message_id is None  # the rest of the header cannot be skipped to see whether it is whole


def test_an_oversized_header_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack(*_: object, **__: object) -> None:
        raise AssertionError("unpacked")

    monkeypatch.setattr(framing, "_unpack", unpack)
    monkeypatch.setattr(framing, "_unpack_named", unpack)
    assert "header of 513 bytes" in str(refused([bytes(LIMITS.max_header_bytes + 1)]))


def test_more_bytes_than_declared_end_the_message() -> None:
    assembler = Assembler(LIMITS)
    assert fed(assembler, [head(kind="request", id=3, sizes=[100], body=OK)]) is None
    assert fed(assembler, [head(kind="chunk", id=3), bytes(60)]) is None
    with pytest.raises(RemoteProtocolError, match="more bytes") as caught:
        fed(assembler, [head(kind="chunk", id=3), bytes(60)])
    assert caught.value.message_id == 3
    assert assembler.idle


def test_chunks_without_a_beginning_are_ignored() -> None:
    assembler = Assembler(LIMITS)
    assert fed(assembler, [head(kind="chunk", id=3), bytes(60)]) is None
    assert assembler.idle


def test_cancelling_forgets_what_has_arrived() -> None:
    room = Room(1 << 20)
    assembler = Assembler(LIMITS, room)
    fed(assembler, [head(kind="request", id=3, sizes=[100], body=OK)])
    fed(assembler, [head(kind="chunk", id=3), bytes(60)])
    arrived = fed(assembler, [head(kind="cancel", id=3)])
    assert arrived is not None
    assert (arrived.kind, arrived.id) == ("cancel", 3)
    assert assembler.idle
    assert room.used_bytes == 0


# --- bounds ----------------------------------------------------------------------------------------------


def begin(message_id: int, size: int) -> list[Buffer]:
    return [head(kind="request", id=message_id, sizes=[size], body=OK)]


def test_too_many_half_finished_messages_find_no_room() -> None:
    assembler = Assembler(LIMITS)
    for message_id in range(LIMITS.max_inflight):
        fed(assembler, begin(message_id, 100))
    with pytest.raises(NoRoom) as caught:
        fed(assembler, begin(99, 100))
    assert caught.value.message_id == 99
    assert caught.value.retry_after_s > 0
    fed(assembler, begin(0, 100))  # beginning one again takes no more room


def test_declared_bytes_cost_the_declarer_nothing() -> None:
    limits = WireLimits()
    tracemalloc.start()
    try:
        assemblers = [Assembler(limits) for _ in range(8)]
        for assembler in assemblers:
            for message_id in range(8):
                fed(assembler, begin(message_id, limits.max_message_bytes))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_arriving_bytes_take_no_more_than_their_multiple_however_many_are_declared() -> None:
    limits = WireLimits()
    assembler = Assembler(limits)
    fed(assembler, begin(1, limits.max_message_bytes))
    tracemalloc.start()
    try:
        for _ in range(10):
            fed(assembler, [head(kind="chunk", id=1), bytes(1000)])
        assert tracemalloc.get_traced_memory()[0] < (framing.AHEAD + 1) * 10_000
    finally:
        tracemalloc.stop()


def test_where_there_is_no_memory_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> memoryview:
        raise MemoryError

    room = Room(1000)
    assembler = Assembler(LIMITS, room)
    fed(assembler, begin(1, 100))
    monkeypatch.setattr(framing, "memory", none)
    with pytest.raises(NoRoom, match="no memory for 100 bytes") as caught:
        fed(assembler, [head(kind="chunk", id=1), bytes(60)])
    assert caught.value.message_id == 1
    assert assembler.idle
    assert room.used_bytes == 0


def test_bytes_that_arrive_one_by_one_take_little_more_than_their_number() -> None:
    assembler, size = Assembler(WireLimits(frame_bytes=64)), 100_000
    fed(assembler, begin(1, size))
    chunk = head(kind="chunk", id=1)
    tracemalloc.start()
    try:
        for number in range(size - 1):
            fed(assembler, [chunk, bytes([number % 256])])
        assert tracemalloc.get_traced_memory()[1] < 3 * size
    finally:
        tracemalloc.stop()
    arrived = fed(assembler, [chunk, b"!"])
    assert arrived is not None
    assert bytes(arrived.parts[0]) == bytes(number % 256 for number in range(size - 1)) + b"!"


def test_a_part_that_came_in_one_frame_is_not_copied() -> None:
    assembler, parts = Assembler(WireLimits()), [bytes(n) for n in (framing.KEPT_FROM_BYTES, 3, 0, 1 << 18)]
    fed(assembler, [head(kind="request", id=1, sizes=list(map(len, parts)), body=OK)])
    frames = [bytearray(part) for part in parts]
    arrived = fed(assembler, [head(kind="chunk", id=1), *frames])
    assert arrived is not None
    assert list(map(bytes, arrived.parts)) == parts
    assert [memoryview(part).obj is frame for part, frame in zip(arrived.parts, frames, strict=True)] == [
        True, False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("chunk_bytes", [1, 1000, 1 << 16])
def test_parts_that_came_in_chunks_are_whole_writable_and_their_own(chunk_bytes: int) -> None:
    limits = WireLimits(frame_bytes=chunk_bytes)
    parts = [bytearray(Random(number).randbytes(size)) for number, size in enumerate((1 << 14, 3, 1 << 17, 70_000))]
    assembler = Assembler(limits)
    frames = [[bytearray(frame) for frame in multipart] for multipart in frames_of(list(map(bytes, parts)), 1, limits)]
    arrived = [fed(assembler, multipart) for multipart in frames][-1]
    assert whole(arrived) == (1, list(map(bytes, parts)))
    assert arrived is not None
    for multipart in frames:
        for frame in multipart:
            frame[:] = bytes(len(frame))
    assert whole(arrived) == (1, list(map(bytes, parts)))
    assert not any(memoryview(part).readonly for part in arrived.parts)


def unpacked_bytes(frames: Sequence[Buffer]) -> int:
    """What the header that these frames begin with takes of a room."""
    return HEADER_TIMES * len(frames[0])


def test_peers_share_one_room_and_what_overflows_is_dropped() -> None:
    room = Room(100 + 2 * unpacked_bytes(begin(1, 90)))
    one, other = Assembler(LIMITS, room), Assembler(LIMITS, room)
    fed(one, begin(1, 90))
    fed(other, begin(2, 90))
    assert room.used_bytes == 2 * unpacked_bytes(begin(1, 90))
    fed(one, [head(kind="chunk", id=1), bytes(60)])
    with pytest.raises(NoRoom) as caught:
        fed(other, [head(kind="chunk", id=2), bytes(60)])
    assert caught.value.message_id == 2
    assert room.used_bytes == 60 + unpacked_bytes(begin(1, 90))
    assert fed(one, [head(kind="chunk", id=1), bytes(30)]) is not None
    assert room.used_bytes == 0


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_half_finished_message_is_forgotten_when_its_sender_has_given_up() -> None:
    clock, room = Clock(), Room(10_000)
    assembler = Assembler(LIMITS, room, clock=clock)
    fed(assembler, [head(kind="request", id=1, deadline_s=5.0, sizes=[90], body=OK)])
    other = [head(kind="request", id=2, sizes=[90], body=OK)]
    fed(assembler, other)
    fed(assembler, [head(kind="chunk", id=1), bytes(60)])
    clock.now_s += 5.1
    assembler.forget_overdue()
    assert room.used_bytes == unpacked_bytes(other)
    assert len(assembler.arriving()) == 0
    assert not assembler.idle  # the other one states no deadline, and has the default
    clock.now_s += LIMITS.default_deadline_s
    assembler.forget_overdue()
    assert assembler.idle


def test_a_message_that_goes_on_arriving_has_not_stalled_however_long_it_takes() -> None:
    clock = Clock()
    assembler = Assembler(LIMITS, clock=clock)
    fed(assembler, begin(1, 200))
    for _ in range(3):
        clock.now_s += LIMITS.default_deadline_s * 0.9
        fed(assembler, [head(kind="chunk", id=1), bytes(60)])
        assembler.forget_stalled()
        assert not assembler.idle
    clock.now_s += LIMITS.default_deadline_s * 1.1
    assembler.forget_stalled()
    assert assembler.idle


def test_one_that_lost_a_chunk_is_no_longer_arriving() -> None:
    clock = Clock()
    assembler = Assembler(LIMITS, clock=clock)
    fed(assembler, begin(1, 200))
    assert assembler.arriving() == [Ok()]
    clock.now_s += STALLED_S * 0.9
    fed(assembler, [head(kind="chunk", id=1), bytes(60)])
    clock.now_s += STALLED_S * 0.9
    assert assembler.arriving() == [Ok()]
    clock.now_s += STALLED_S
    assert assembler.arriving() == []


def test_in_order_a_new_message_ends_one_that_lost_a_chunk() -> None:
    room = Room(10_000)
    assembler = Assembler(LIMITS, room, in_order=True)
    for message_id in range(3 * LIMITS.max_inflight):
        fed(assembler, begin(message_id, 200))
        fed(assembler, [head(kind="chunk", id=message_id), bytes(60)])
    assert room.used_bytes == 60 + unpacked_bytes(begin(3 * LIMITS.max_inflight - 1, 200))


def test_what_nobody_waits_for_is_not_kept() -> None:
    assembler = Assembler(LIMITS, wanted={7}.__contains__)
    fed(assembler, begin(6, 100))
    assert assembler.idle
    fed(assembler, begin(7, 100))
    assert not assembler.idle


# --- schemas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cid", ["../../etc/passwd", "3fa9c1-v00000012-s00003\n", "", "3FA9C1-v00000012-s00003"])
def test_no_message_carries_what_is_not_a_cid(cid: str) -> None:
    body = {"t": "release-spills", "cids": [cid]}
    refused([head(kind="request", id=1, body=body)])


@pytest.mark.parametrize("service_s", [float("nan"), float("inf"), -1.0])
def test_no_message_carries_a_service_time_that_is_no_time(service_s: float) -> None:
    body = {"t": "spilled", "grad": None, "loss_sum": None, "load": {"slots": 1, "busy": 0, "service_s": service_s}}
    refused([head(kind="reply", id=1, body=body)])


EVERY_HEADER = [
    *(Header(kind=kind, id=1, body=Ok()) for kind in ("request", "reply", "publish")),
    *(Header(kind=kind, id=1) for kind in ("chunk", "cancel")),
]


@pytest.mark.parametrize("header", EVERY_HEADER, ids=lambda header: header.kind)
def test_every_kind_of_header_comes_back(header: Header) -> None:
    (frames,) = encode(header, (), LIMITS)
    assert decode_header(frames[0], LIMITS) == header


@given(st.lists(st.lists(st.binary(max_size=40), max_size=3), min_size=1, max_size=6))
def test_several_messages_may_share_a_multipart(messages: list[list[bytes]]) -> None:
    frames: list[Buffer] = []
    for number, parts in enumerate(messages):
        (multipart,) = encode(Header(kind="request", id=number, body=Ok()), parts, LIMITS)
        frames += multipart
    arrived = list(Assembler(LIMITS).feed(frames))
    assert [(one.id, [bytes(part) for part in one.parts]) for one in arrived] == list(enumerate(messages))


def test_what_follows_a_bad_message_is_lost_and_what_went_before_is_not() -> None:
    good = head(kind="request", id=1, body=OK)
    feeding = Assembler(LIMITS).feed([good, head(kind="request", id=2, sizes=[3], body=OK), b"four", good])
    assert next(feeding).id == 1
    with pytest.raises(RemoteProtocolError, match="sizes that the header declares") as caught:
        next(feeding)
    assert caught.value.message_id == 2


def test_an_empty_chunk_is_no_harm() -> None:
    assembler = Assembler(LIMITS)
    assert fed(assembler, [head(kind="request", id=3, sizes=[4], body=OK)]) is None
    assert fed(assembler, [head(kind="chunk", id=3), b"", b""]) is None
    arrived = fed(assembler, [head(kind="chunk", id=3), b"", b"abcd"])
    assert arrived is not None
    assert [bytes(part) for part in arrived.parts] == [b"abcd"]


@pytest.mark.parametrize(
    "wrong", [{"data_port": -1}, {"news_port": 65536}, {"host": "bad host"}, {"host": ""}, {"name": "n" * 201}]
)
def test_no_card_names_what_nobody_can_dial(wrong: dict[str, object]) -> None:
    card = {"id": "1", "name": "n", "role": "client", "host": "127.0.0.1", "control_port": 1, **wrong}
    hello = {"t": "hello", "protocol": 1, "facts": {}, "card": card, "codecs": []}
    with pytest.raises(RemoteProtocolError, match="not a zsfl message"):
        decode_header(head(kind="request", id=1, body=hello), WireLimits())


@pytest.mark.parametrize("address", ["nonsense", "a b:1", "127.0.0.1:", ":1", "127.0.0.1:123456"])
def test_no_hint_leads_to_what_is_no_address(address: str) -> None:
    hint = {"id": "1", "role": "client", "address": address}
    card = {"id": "1", "name": "n", "role": "client", "host": "127.0.0.1", "control_port": 1}
    beat = {"t": "beat", "card": card, "peers": [hint], "counters": {}}
    with pytest.raises(RemoteProtocolError, match="not a zsfl message"):
        decode_header(head(kind="publish", id=1, body=beat), WireLimits())
