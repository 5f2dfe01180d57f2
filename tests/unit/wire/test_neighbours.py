"""What is wrong with one message is no matter to those around it, and what a message holds is counted."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
import pytest
import zmq
from helpers.waiting import eventually
from helpers.wires import wires

from zsfl.errors import DeadlineExceeded
from zsfl.settings import WireLimits
from zsfl.wire import server as server_module
from zsfl.wire.framing import HEADER_TIMES, Assembler, Buffer, Fault, Header, NoRoom, Room, encode
from zsfl.wire.messages import Ok, Reply, Request, Train
from zsfl.wire.pump import MOST_FRAMES

ASK = Train(rounds=1)
LIMITS = WireLimits(frame_bytes=4096, max_header_bytes=4096)


def asked(message_id: int, *parts: bytes) -> list[Buffer]:
    return next(encode(Header(kind="request", id=message_id, deadline_s=30.0, body=ASK), parts, LIMITS))


def packed(**fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


BAD: dict[str, Sequence[bytes]] = {
    "an unknown message": [packed(kind="request", id=2, body={"t": "from-the-future"})],
    "with parts": [packed(kind="request", id=2, sizes=[3, 1], body={"t": "from-the-future"}), b"abc", b"d"],
    "an unknown kind": [packed(kind="shout", id=2)],
    "without a body": [packed(kind="request", id=2, sizes=[1]), b"x"],
    "of other sizes": [packed(kind="request", id=2, sizes=[5], body={"t": "train", "rounds": 1}), b"abc"],
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_one_bad_message_among_several_leaves_its_neighbours_whole(bad: Sequence[bytes]) -> None:
    faults: list[Fault] = []
    frames = [*asked(1, b"one"), *bad, *asked(3, b"three", b""), *asked(4)]
    arrived = [(one.id, [bytes(part) for part in one.parts]) for one in Assembler(LIMITS).feed(frames, faults.append)]
    assert arrived == [(1, [b"one"]), (3, [b"three", b""]), (4, [])]
    assert [fault.message_id for fault in faults] == [2]


def test_where_it_ends_cannot_be_told_what_came_before_is_given() -> None:
    faults: list[Fault] = []
    frames = [*asked(1), b"no header", *asked(3)]
    assert [one.id for one in Assembler(LIMITS).feed(frames, faults.append)] == [1]
    assert [fault.message_id for fault in faults] == [None]


async def test_each_of_them_gets_its_answer() -> None:
    async with wires(LIMITS) as w:
        dealer = w.raw(zmq.DEALER, w.serve())
        bad = [packed(kind="request", id=2, sizes=[1], body={"t": "no"}), b"x"]
        reply = [packed(kind="reply", id=5, body={"t": "ok"})]
        await dealer.send_multipart([*asked(1), *bad, *asked(3), *reply, *asked(6)])
        answers: dict[int, str] = {}
        async with asyncio.timeout(10):
            while len(answers) < 5:
                frames = await dealer.recv_multipart()
                for frame in frames:
                    head = msgspec.msgpack.decode(frame)
                    answers[head["id"]] = head["body"].get("kind", head["body"]["t"])
        refused = "RemoteProtocolError"
        assert answers == {1: "ok", 2: refused, 3: "ok", 5: refused, 6: "ok"}


def test_headers_of_messages_that_never_come_take_room() -> None:
    room = Room(1 << 14)
    assemblers = [Assembler(LIMITS, room) for _ in range(40)]
    frames = [packed(kind="request", id=1, sizes=[100], body={"t": "train", "rounds": 1})]
    faults: list[Fault] = []
    for assembler in assemblers:
        assert list(assembler.feed(frames, faults.append)) == []
    assert len(faults) > 1
    assert all(isinstance(fault, NoRoom) for fault in faults)
    assert room.limit_bytes - HEADER_TIMES * len(frames[0]) < room.used_bytes <= room.limit_bytes
    for assembler in assemblers:
        assembler.forget_all()
    assert room.used_bytes == 0


async def test_a_request_is_not_served_for_longer_than_the_server_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "SWEEP_S", 0.01)
    futures: list[asyncio.Future[tuple[Reply, Sequence[Buffer]]]] = []

    def never(_request: Request, _parts: Sequence[Buffer]) -> asyncio.Future[tuple[Reply, Sequence[Buffer]]]:
        futures.append(asyncio.get_running_loop().create_future())
        return futures[-1]

    async with wires(WireLimits(max_deadline_s=0.05)) as w:
        with pytest.raises(DeadlineExceeded, match="longer than its deadline"):
            await w.connect(w.serve(never)).request(ASK, deadline_s=80_000)
        assert futures[0].done()


async def test_a_multipart_of_too_many_frames_is_read_past() -> None:
    async with wires() as w:
        server = w.serve()
        dealer = w.raw(zmq.DEALER, server)
        await dealer.send_multipart([b"x"] * (3 * MOST_FRAMES + 5))
        await dealer.send_multipart(asked(7))
        async with asyncio.timeout(30):
            answer = msgspec.msgpack.decode((await dealer.recv_multipart())[0])
        assert (answer["id"], answer["body"]) == (7, msgspec.to_builtins(Ok()))
        await eventually(lambda: w.served.snapshot()["protocol_errors"] == 1)
