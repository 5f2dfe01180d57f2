"""Broadcasts over real sockets."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace

import msgpack  # pyright: ignore[reportMissingTypeStubs]
import pytest
import zmq
from helpers.descriptors import none_left
from helpers.waiting import HANG_S, eventually
from helpers.wires import HOST, Wires, wires

from zsfl.ids import NodeId
from zsfl.settings import WireLimits
from zsfl.wire import pubsub
from zsfl.wire.framing import Assembler, Buffer
from zsfl.wire.messages import Broadcast, Goodbye
from zsfl.wire.pubsub import Publisher, Subscriber
from zsfl.wire.sockets import up_to

LIMITS = WireLimits(frame_bytes=4096)
TOPIC, OTHER = b"body", b"client"


def saying(reason: str) -> Goodbye:
    return Goodbye(node=NodeId("a"), reason=reason)


class Ear:
    """What one subscriber heard."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, list[bytes]]] = []

    def __call__(self, broadcast: Broadcast, parts: list[Buffer]) -> None:
        assert isinstance(broadcast, Goodbye)
        self.heard.append((broadcast.reason, [bytes(part) for part in parts]))

    def said(self, reason: str) -> bool:
        return any(heard == reason for heard, _ in self.heard)


@asynccontextmanager
async def listening(
    w: Wires, port: int, ear: Callable[..., None], *topics: bytes, limits: WireLimits = LIMITS
) -> AsyncIterator[Subscriber]:
    """A subscriber that runs."""
    endpoint = f"tcp://{HOST}:{port}"
    subscriber = Subscriber(w.context, endpoint, topics or [TOPIC], ear, limits=limits, counters=w.asked)
    task = asyncio.create_task(subscriber.run())
    try:
        yield subscriber
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def publishing(w: Wires) -> AsyncIterator[Publisher]:
    publisher = Publisher(w.context, HOST, limits=LIMITS, counters=w.served)
    try:
        yield publisher
    finally:
        publisher.close()


async def until_joined(publisher: Publisher, ear: Ear, topic: bytes = TOPIC) -> None:
    """Returns once the subscription has reached the publisher."""

    def tried() -> bool:
        publisher.publish(topic, saying("joined?"))
        return ear.said("joined?")

    await eventually(tried)


async def test_each_hears_its_topics_only() -> None:
    one, both = Ear(), Ear()
    async with wires(LIMITS) as w, publishing(w) as publisher:
        async with listening(w, publisher.port, one), listening(w, publisher.port, both, TOPIC, OTHER):
            await until_joined(publisher, one)
            await until_joined(publisher, both)
            publisher.publish(OTHER, saying("other"), [b"x"])
            publisher.publish(TOPIC, saying("ours"), [b"y", b""])
            await eventually(lambda: one.said("ours") and both.said("ours"))
        assert ("ours", [b"y", b""]) in one.heard
        assert not one.said("other")
        assert ("other", [b"x"]) in both.heard


async def test_who_finds_no_file_descriptor_listens_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pubsub, "OPEN_AGAIN_S", 0.01)
    ear = Ear()
    async with wires(LIMITS) as w, publishing(w) as publisher, AsyncExitStack() as stack:
        with none_left():
            await stack.enter_async_context(listening(w, publisher.port, ear))
            await asyncio.sleep(0)  # it begins
        await until_joined(publisher, ear)


async def test_a_broadcast_longer_than_a_frame_arrives_whole() -> None:
    ear, tensor = Ear(), os.urandom(2_000_001)
    async with wires(LIMITS) as w, publishing(w) as publisher, listening(w, publisher.port, ear) as subscriber:
        await until_joined(publisher, ear)
        publisher.publish(TOPIC, saying("large"), [tensor, b"z"])
        await eventually(lambda: ear.said("large"))
        assert ear.heard[-1] == ("large", [tensor, b"z"])
        assert subscriber.arriving() == []


async def test_who_comes_late_misses_what_was_said_and_nothing_else() -> None:
    early, late = Ear(), Ear()
    async with wires(LIMITS) as w, publishing(w) as publisher, listening(w, publisher.port, early):
        await until_joined(publisher, early)
        publisher.publish(TOPIC, saying("first"), [bytes(50_000)])
        await eventually(lambda: early.said("first"))
        async with listening(w, publisher.port, late):
            await until_joined(publisher, late)
            publisher.publish(TOPIC, saying("second"), [bytes(50_000)])
            await eventually(lambda: early.said("second") and late.said("second"))
        assert not late.said("first")


async def test_malformed_broadcasts_are_counted_and_ignored() -> None:
    ear = Ear()
    request = msgpack.packb({"kind": "request", "id": 1, "body": {"t": "train", "rounds": 1}})  # pyright: ignore[reportUnknownMemberType]
    not_one = msgpack.packb({"kind": "publish", "id": 1, "body": {"t": "ok"}})  # pyright: ignore[reportUnknownMemberType]
    fine = msgpack.packb({"kind": "publish", "id": 1, "body": {"t": "goodbye", "node": "a", "reason": "fine"}})  # pyright: ignore[reportUnknownMemberType]
    async with wires(LIMITS) as w:
        bare = w.context.socket(zmq.PUB)
        bare.linger = 0
        port = bare.bind_to_random_port(f"tcp://{HOST}")
        async with listening(w, port, ear):
            while not ear.said("fine"):  # until the subscription has reached the publisher
                await bare.send_multipart([TOPIC, fine])
                await asyncio.sleep(0)
            for frames in ([], [b"garbage"], [request], [not_one], [b"\x91" * 1000]):
                await bare.send_multipart([TOPIC, *frames])
            await eventually(lambda: w.asked.snapshot().get("protocol_errors") == 5)
            before = len(ear.heard)
            await bare.send_multipart([TOPIC, fine])
            await eventually(lambda: len(ear.heard) > before)


async def test_a_subscriber_that_never_reads_harms_nobody() -> None:
    ear = Ear()
    async with wires(LIMITS) as w, publishing(w) as publisher, listening(w, publisher.port, ear):
        deaf = w.context.socket(zmq.SUB)
        deaf.linger = 0
        deaf.set_hwm(1)
        deaf.setsockopt(zmq.RCVBUF, 4096)
        deaf.subscribe(TOPIC)
        deaf.connect(f"tcp://{HOST}:{publisher.port}")
        await until_joined(publisher, ear)
        for number in range(300):
            publisher.publish(TOPIC, saying(str(number)), [bytes(40_000)])
            await eventually(lambda number=number: ear.said(str(number)))


async def test_broadcasts_that_lost_chunks_do_not_deafen_a_subscriber() -> None:
    ear = Ear()
    async with wires(LIMITS) as w:
        bare = w.context.socket(zmq.PUB)
        bare.linger = 0
        bare.set_hwm(0)
        port = bare.bind_to_random_port(f"tcp://{HOST}")

        async def say(number: int, reason: str, *chunks: int) -> None:
            body = {"t": "goodbye", "node": "a", "reason": reason}
            header = {"kind": "publish", "id": number, "sizes": [9000], "body": body}
            await bare.send_multipart([TOPIC, msgpack.packb(header)])  # pyright: ignore[reportUnknownMemberType]
            for size in chunks:
                chunk = msgpack.packb({"kind": "chunk", "id": number})  # pyright: ignore[reportUnknownMemberType]
                await bare.send_multipart([TOPIC, chunk, bytes(size)])

        async with listening(w, port, ear) as subscriber:
            while not ear.said("joined"):
                await say(1, "joined", 4096, 4096, 808)
                await asyncio.sleep(0)
            for number in range(2, 1000):
                await say(number, "torn", 4096)
            await say(1000, "whole", 4096, 4096, 808)
            await eventually(lambda: ear.said("whole"))
            assert not ear.said("torn")
            assert subscriber.arriving() == []


async def test_a_broadcast_that_is_broken_off_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    ear, swept = Ear(), asyncio.Event()
    forget_stalled = Assembler.forget_stalled

    def looked(assembler: Assembler) -> None:
        forget_stalled(assembler)
        if assembler.idle:
            swept.set()

    monkeypatch.setattr(Assembler, "forget_stalled", looked)
    monkeypatch.setattr(pubsub, "SWEEP_S", 0.01)
    async with wires(LIMITS) as w:
        bare = w.context.socket(zmq.PUB)
        bare.linger = 0
        port = bare.bind_to_random_port(f"tcp://{HOST}")

        async def say(kind: str, reason: str, *frames: bytes, sizes: tuple[int, ...] = ()) -> None:
            body = {"t": "goodbye", "node": "a", "reason": reason}
            head = {"kind": kind, "id": 1} | ({"sizes": sizes, "body": body} if kind == "publish" else {})
            await bare.send_multipart([TOPIC, msgpack.packb(head), *frames])  # pyright: ignore[reportUnknownMemberType]

        async with listening(w, port, ear, limits=replace(LIMITS, default_deadline_s=0.02)):
            while not ear.said("joined"):
                await say("publish", "joined")
                await asyncio.sleep(0)
            await say("publish", "broken off", sizes=(9000,))
            await say("chunk", "", bytes(4096))
            async with asyncio.timeout(HANG_S):
                await swept.wait()
            await say("chunk", "", bytes(4904))
            await say("publish", "the next")
            await eventually(lambda: ear.said("the next"))
            assert not ear.said("broken off")


async def test_where_nothing_long_is_said_nothing_long_is_heard() -> None:
    ear = Ear()
    async with (
        wires(LIMITS) as w,
        publishing(w) as publisher,
        listening(w, publisher.port, ear, limits=up_to(LIMITS, 0)),
    ):
        await until_joined(publisher, ear)
        publisher.publish(TOPIC, saying("long"), [bytes(9000)])
        publisher.publish(TOPIC, saying("short"))
        await eventually(lambda: ear.said("short"))
        assert not ear.said("long")
        assert w.asked.snapshot()["protocol_errors"] == 1
