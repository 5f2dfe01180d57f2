"""Peers that talk nonsense, vanish, or do not listen: a server goes on, and its memory stays bounded."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Sequence

import msgpack  # pyright: ignore[reportMissingTypeStubs]
import msgspec
import pytest
import zmq
import zmq.asyncio
from helpers.waiting import HANG_S, eventually
from helpers.wires import HOST, Wires, echo, wires

from zsfl.errors import NoPeer
from zsfl.settings import WireLimits
from zsfl.wire import server as server_module
from zsfl.wire.framing import Buffer, Header, encode
from zsfl.wire.messages import Ok, Reply, Request, Train
from zsfl.wire.server import Server

ASK = Train(rounds=1)
LIMITS = WireLimits(frame_bytes=4096, max_header_bytes=4096)


def request(message_id: int, parts: Sequence[Buffer] = (), deadline_s: float = HANG_S) -> Iterator[list[Buffer]]:
    return encode(Header(kind="request", id=message_id, deadline_s=deadline_s, body=ASK), parts, LIMITS)


def packed(**fields: object) -> bytes:
    data = msgpack.packb(fields)  # pyright: ignore[reportUnknownMemberType]
    assert data is not None
    return data


async def still_serves(w: Wires, server: Server) -> None:
    answer = await w.connect(server).request(ASK, [b"still"], deadline_s=HANG_S)
    assert bytes(answer.parts[0]) == b"still"


async def reply_to(dealer: zmq.asyncio.Socket) -> tuple[int, str]:
    async with asyncio.timeout(HANG_S):
        frames = await dealer.recv_multipart()
    fields = msgspec.msgpack.decode(frames[0])
    return fields["id"], fields["body"].get("kind", fields["body"]["t"])


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"", b""],
        [b"garbage"],
        [b"\x91" * 4096],
        [bytes(4097)],
        [packed(kind="request", id="seven", body={"t": "ok"})],
        [packed(kind="chunk", id=1), b"abc"],
    ],
    ids=["empty", "delimiter", "text", "deep", "long", "id", "chunk"],
)
async def test_garbage_from_a_dealer_is_survived(frames: list[bytes]) -> None:
    async with wires(LIMITS) as w:
        server = w.serve()
        dealer = w.raw(zmq.DEALER, server)
        for _ in range(10):
            await dealer.send_multipart(frames)
        await dealer.send_multipart(next(request(5)))
        assert await reply_to(dealer) == (5, "ok")
        await still_serves(w, server)


@pytest.mark.parametrize(
    "frames",
    [
        [packed(kind="request", id=9, body={"t": "from-the-future", "x": 1})],
        [packed(kind="request", id=9)],
        [packed(kind="request", id=9, body={"t": "ok"})],
        [packed(kind="reply", id=9, body={"t": "train", "rounds": None})],
        [packed(kind="request", id=9, sizes=[5], body={"t": "train", "rounds": 1}), b"abc"],
        [packed(kind="request", id=9, sizes=[1 << 62], body={"t": "train", "rounds": 1})],
    ],
    ids=["future", "bodyless", "reply as request", "wrong kind", "sizes", "huge"],
)
async def test_where_an_id_can_be_read_the_sender_is_told(frames: list[bytes]) -> None:
    async with wires(LIMITS) as w:
        dealer = w.raw(zmq.DEALER, w.serve())
        await dealer.send_multipart(frames)
        assert await reply_to(dealer) == (9, "RemoteProtocolError")


async def test_an_id_that_is_in_use_is_refused() -> None:
    async def stuck(_request: Request, _parts: Sequence[Buffer]) -> tuple[Reply, Sequence[Buffer]]:
        await asyncio.Event().wait()
        return Ok(), ()

    async with wires(LIMITS) as w:
        dealer = w.raw(zmq.DEALER, w.serve(stuck))
        for _ in range(2):
            await dealer.send_multipart(next(request(5)))
        assert await reply_to(dealer) == (5, "RemoteProtocolError")


async def test_garbage_from_a_bare_socket_is_survived() -> None:
    async with wires(LIMITS) as w:
        server = w.serve()
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
        for junk in (b"GET / HTTP/1.1\r\n\r\n", bytes(1000), b"\xff" * 1000, greeting + b"\xff" * 200, b""):
            with socket.create_connection((HOST, server.port)) as bare:
                bare.sendall(junk)
        await still_serves(w, server)


async def test_a_frame_over_the_limit_is_cut_off_before_it_takes_memory() -> None:
    async with wires(LIMITS) as w:
        server = w.serve()
        dealer = w.raw(zmq.DEALER, server)
        events = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        await dealer.send_multipart(next(request(1)))
        assert await reply_to(dealer) == (1, "ok")
        await dealer.send_multipart([packed(kind="chunk", id=1), bytes(1 << 20)])
        async with asyncio.timeout(HANG_S):
            await events.recv_multipart()
        assert w.served.snapshot()["bytes_received"] < 1 << 20
        dealer.disable_monitor()
        await still_serves(w, server)


async def test_a_caller_that_vanishes_holds_up_nobody() -> None:
    release = asyncio.Event()

    async def handler(request: Request, parts: Sequence[Buffer]) -> tuple[Reply, Sequence[Buffer]]:
        if not parts:
            await release.wait()
        return Ok(), parts

    async with wires(LIMITS) as w:
        server = w.serve(handler)
        dealer = w.raw(zmq.DEALER, server)
        await dealer.send_multipart(next(request(1)))
        await dealer.send_multipart(next(request(2, [b"x"])))
        assert await reply_to(dealer) == (2, "ok")
        dealer.close(linger=0)
        await still_serves(w, server)
        release.set()
        await still_serves(w, server)
        assert server._sent([b"nobody", b"header"])  # pyright: ignore[reportPrivateUsage]
        assert w.served.snapshot()["replies_unroutable"] >= 1


async def test_half_a_message_of_a_caller_that_vanished_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "SWEEP_S", 0.02)
    async with wires(LIMITS) as w:
        server = w.serve(limits=WireLimits(frame_bytes=4096, max_arriving_bytes=100_000))
        dealer = w.raw(zmq.DEALER, server)
        for _, frames in zip(range(24), request(1, [bytes(99_000)], deadline_s=0.2), strict=False):
            await dealer.send_multipart(frames)
        await eventually(lambda: w.served.snapshot().get("bytes_received", 0) > 90_000)
        dealer.close(linger=0)

        def room() -> bool:
            return server._room.used_bytes == 0  # pyright: ignore[reportPrivateUsage]

        await eventually(room)
        await still_serves(w, server)


async def never_read(w: Wires, server: Server, limits: WireLimits) -> None:
    """Somebody asks until replies are dropped, as none is ever read."""
    deaf = w.context.socket(zmq.DEALER)
    deaf.linger = 0
    deaf.set_hwm(1)
    deaf.setsockopt(zmq.RCVBUF, 4096)
    deaf.connect(f"tcp://{HOST}:{server.port}")
    for message_id in range(600):
        header = Header(kind="request", id=message_id, body=ASK)
        await deaf.send_multipart(next(encode(header, [bytes(60_000)], limits)))
        if w.served.snapshot().get("replies_dropped"):
            break
    await eventually(lambda: w.served.snapshot().get("replies_dropped"))


async def test_a_caller_that_never_reads_holds_up_nobody_and_fills_no_more_than_its_outbox() -> None:
    limits = WireLimits(frame_bytes=65536, max_outbox_bytes=1 << 20)
    async with wires() as w:
        server = w.serve(limits=limits)
        await never_read(w, server, limits)
        (caller,) = server._callers.values()  # pyright: ignore[reportPrivateUsage]

        def counted() -> bool:  # also what is still collected for one multipart
            waiting = server._outbox_bytes  # pyright: ignore[reportPrivateUsage]
            assert 0 < waiting <= limits.max_outbox_bytes
            return waiting == sum(len(frame) for multipart in caller.outbox for frame in multipart[1:])

        await eventually(counted)
        await still_serves(w, server)


async def test_what_a_caller_never_reads_is_dropped_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "SWEEP_S", 0.02)
    monkeypatch.setattr(server_module, "UNREAD_S", 0.1)
    limits = WireLimits(frame_bytes=65536, max_outbox_bytes=1 << 20)
    async with wires() as w:
        server = w.serve(limits=limits)
        await never_read(w, server, limits)
        await eventually(lambda: not server.has_unsent)
        await still_serves(w, server)


async def test_a_caller_that_reads_late_gets_all_that_waited_in_order() -> None:
    limits = WireLimits(frame_bytes=4096)
    async with wires() as w:
        dealer = w.raw(zmq.DEALER, w.serve(limits=limits))
        parts = [bytes([number]) * 4000 for number in range(250)]
        for frames in encode(Header(kind="request", id=3, body=ASK), parts * 8, limits):
            await dealer.send_multipart(frames)
        received = bytearray()
        async with asyncio.timeout(HANG_S):
            while len(received) < 8_000_000:
                _, *frames = await dealer.recv_multipart()
                received += b"".join(frames)
        assert received == b"".join(parts * 8)


async def test_callers_that_are_being_served_outlive_those_that_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_CALLERS", 4)
    release = asyncio.Event()
    inside = asyncio.Event()

    async def handler(request: Request, parts: Sequence[Buffer]) -> tuple[Reply, Sequence[Buffer]]:
        if not parts:
            inside.set()
            await release.wait()
        return await echo(request, parts)

    async with wires() as w:
        server = w.serve(handler)
        asker = asyncio.create_task(w.connect(server).request(ASK, deadline_s=HANG_S))
        await inside.wait()
        for _ in range(20):
            await still_serves(w, server)
        assert len(server._callers) == 4  # pyright: ignore[reportPrivateUsage]
        release.set()
        assert (await asker).body == Ok()


async def test_of_too_many_callers_that_are_all_served_the_longest_silent_is_let_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "MAX_CALLERS", 2)
    cancelled: list[Request] = []

    async def handler(request: Request, parts: Sequence[Buffer]) -> tuple[Reply, Sequence[Buffer]]:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(request)
            raise
        return Ok(), ()

    async with wires() as w:
        server = w.serve(handler)
        connections = [w.connect(server) for _ in range(3)]
        askers: list[asyncio.Task[object]] = []
        for number, connection in enumerate(connections):
            askers.append(asyncio.create_task(connection.request(Train(rounds=number + 1), deadline_s=HANG_S)))
            await eventually(lambda number=number: len(server._callers) == min(number + 1, 2))  # pyright: ignore[reportPrivateUsage]
        await eventually(lambda: cancelled == [Train(rounds=1)])
        for connection in connections:
            connection.close()
        assert all(isinstance(end, NoPeer) for end in await asyncio.gather(*askers, return_exceptions=True))


@pytest.mark.parametrize(
    "frames",
    [
        [b"garbage"],
        [packed(kind="request", id=1, body={"t": "train", "rounds": 1})],
        [packed(kind="reply", id=1)],
        [packed(kind="reply", id=1, sizes=[7], body={"t": "ok"}), b"abc"],
    ],
    ids=["text", "request", "bodyless", "sizes"],
)
async def test_a_server_that_answers_nonsense_fails_its_askers_at_once(frames: list[bytes]) -> None:
    async with wires(LIMITS) as w:
        router = w.context.socket(zmq.ROUTER)
        port = router.bind_to_random_port(f"tcp://{HOST}")
        asker = asyncio.create_task(w.connect(port).request(ASK, deadline_s=HANG_S))
        identity, *_ = await router.recv_multipart()
        await router.send_multipart([identity, *frames])
        with pytest.raises(NoPeer, match="cannot be read"):
            await asker


async def test_answers_to_nobody_take_no_memory() -> None:
    async with wires(LIMITS) as w:
        router = w.context.socket(zmq.ROUTER)
        connection = w.connect(router.bind_to_random_port(f"tcp://{HOST}"))
        asker = asyncio.create_task(connection.request(ASK, deadline_s=HANG_S))
        identity, *_ = await router.recv_multipart()
        for message_id in range(2, 2000):
            await router.send_multipart([identity, packed(kind="reply", id=message_id, sizes=[9000], body={"t": "ok"})])
        await router.send_multipart([identity, packed(kind="reply", id=1, body={"t": "ok"})])
        assert (await asker).body == Ok()
        assert connection._assembler.idle  # pyright: ignore[reportPrivateUsage]
