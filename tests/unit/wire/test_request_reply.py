"""Asking and answering over real sockets."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Sequence
from typing import Any, cast

import pytest
import zmq
from blockbuster import blockbuster_ctx
from helpers.descriptors import none_left
from helpers.waiting import HANG_S, eventually, until
from helpers.wires import echo, wires

from zsfl import errors
from zsfl.errors import (
    Busy,
    ConfigError,
    DeadlineExceeded,
    LocalProtocolError,
    NoPeer,
    RemoteProtocolError,
    Unavailable,
    ZsflError,
)
from zsfl.settings import WireLimits
from zsfl.wire.framing import Buffer, Header, decode_header, encode
from zsfl.wire.messages import Ok, Refusal, Reply, Request, Train
from zsfl.wire.refusals import refusal, to_error
from zsfl.wire.server import Server

ASK = Train(rounds=1)
SMALL_FRAMES = WireLimits(frame_bytes=4096)
Answered = tuple[Reply, Sequence[Buffer]]


class Stuck:
    """A handler that never answers, and tells how many are waiting in it and how many were cancelled."""

    def __init__(self) -> None:
        self.inside = 0
        self.cancelled = 0

    async def __call__(self, _request: Request, _parts: Sequence[Buffer]) -> Answered:
        self.inside += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.inside -= 1
        return Ok(), ()


def joined(parts: Sequence[Buffer]) -> list[bytes]:
    return [bytes(part) for part in parts]


async def test_a_request_is_answered() -> None:
    async with wires() as w:
        answer = await w.connect(w.serve()).request(ASK, [b"abc", b""], deadline_s=HANG_S)
        assert answer.body == Ok()
        assert joined(answer.parts) == [b"abc", b""]
        with pytest.raises(RemoteProtocolError, match="expected Refusal, got Ok"):
            answer.expect(Refusal)


async def test_requests_pass_one_another_and_each_gets_its_own_answer() -> None:
    release = asyncio.Event()

    async def handler(request: Request, parts: Sequence[Buffer]) -> Answered:
        if request == Train(rounds=1):
            await release.wait()
        return Ok(), parts

    async with wires() as w:
        connection = w.connect(w.serve(handler))
        slow = asyncio.create_task(connection.request(ASK, [b"slow"], deadline_s=HANG_S))
        for number in range(50):
            answer = await connection.request(Train(rounds=2), [b"%d" % number], deadline_s=HANG_S)
            assert joined(answer.parts) == [b"%d" % number]
        assert not slow.done()
        release.set()
        assert joined((await slow).parts) == [b"slow"]


@pytest.mark.parametrize("size", [4095, 4096, 4097, 3_000_000])
async def test_tensors_of_any_size_travel_both_ways(size: int) -> None:
    tensor = os.urandom(size)
    async with wires(SMALL_FRAMES) as w:
        connection = w.connect(w.serve())
        answers = await asyncio.gather(*(connection.request(ASK, [tensor, b"x"], deadline_s=HANG_S) for _ in range(3)))
        assert all(joined(answer.parts) == [tensor, b"x"] for answer in answers)


async def test_nothing_blocks_the_loop() -> None:
    async with wires(SMALL_FRAMES) as w:
        server = w.serve()
        connection = w.connect(server)
        with blockbuster_ctx():
            await connection.request(ASK, [bytes(100_000)], deadline_s=HANG_S)
            connection.close()


# --- deadlines and cancellation --------------------------------------------------------------------------


async def test_a_deadline_ends_both_sides() -> None:
    stuck = Stuck()

    async def handler(request: Request, parts: Sequence[Buffer]) -> Answered:
        return await stuck(request, parts) if request == ASK else (Ok(), ())

    async with wires() as w:
        connection = w.connect(w.serve(handler))
        await connection.request(Train(rounds=2), deadline_s=HANG_S)  # so that the next one is there in no time
        with pytest.raises(
            DeadlineExceeded, match=r"no answer from them at tcp://.* to Train within 0.5 s|its deadline"
        ):
            await until(connection.request(ASK, deadline_s=0.5))
        await eventually(lambda: stuck.cancelled == 1)


async def test_a_deadline_ends_a_request_to_nobody() -> None:
    async with wires() as w:
        server = w.serve()
        await w.stop(server)
        with pytest.raises(DeadlineExceeded):
            await w.connect(server).request(ASK, deadline_s=0.1)


async def test_cancelling_the_asker_cancels_the_handler() -> None:
    stuck = Stuck()
    async with wires() as w:
        asker = asyncio.create_task(w.connect(w.serve(stuck)).request(ASK, deadline_s=HANG_S))
        await eventually(lambda: stuck.inside == 1)
        asker.cancel()
        await eventually(lambda: stuck.cancelled == 1)
        with pytest.raises(asyncio.CancelledError):
            await asker


async def test_a_late_answer_harms_nobody() -> None:
    release = asyncio.Event()

    async def handler(request: Request, parts: Sequence[Buffer]) -> Answered:
        if request == ASK:
            with pytest.raises(asyncio.CancelledError):  # one that will not be cancelled
                await release.wait()
        return Ok(), [bytes(20_000)]

    async with wires(SMALL_FRAMES) as w:
        connection = w.connect(w.serve(handler))
        with pytest.raises(DeadlineExceeded):
            await connection.request(ASK, deadline_s=0.1)
        answer = await connection.request(Train(rounds=2), deadline_s=HANG_S)
        assert joined(answer.parts) == [bytes(20_000)]


async def test_a_request_given_up_while_it_is_sent_leaves_nothing_at_the_server() -> None:
    async with wires(WireLimits(frame_bytes=4096, max_arriving_bytes=64 << 20)) as w:
        connection = w.connect(w.serve())
        await connection.request(ASK, deadline_s=HANG_S)
        asker = asyncio.create_task(connection.request(ASK, [bytes(60 << 20)], deadline_s=HANG_S))
        await eventually(lambda: w.served.snapshot()["bytes_received"] > 1 << 20)
        asker.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asker
        assert w.served.snapshot()["bytes_received"] < 60 << 20
        # There is room for the whole of it again: the cancellation arrived, and the server forgot the first half.
        await connection.request(ASK, [bytes(63 << 20)], deadline_s=HANG_S)


async def test_closing_fails_what_is_in_flight_and_what_comes_later() -> None:
    stuck = Stuck()
    async with wires() as w:
        connection = w.connect(w.serve(stuck))
        askers = [asyncio.create_task(connection.request(ASK, deadline_s=HANG_S)) for _ in range(3)]
        await eventually(lambda: stuck.inside == 3)
        connection.close("is gone (silent)")
        connection.close()
        for asker in askers:
            with pytest.raises(NoPeer, match=r"is gone \(silent\)"):
                await asker
        with pytest.raises(NoPeer, match=r"is gone \(silent\)"):
            await connection.request(ASK, deadline_s=1)


async def test_closing_fails_what_waits_to_be_sent() -> None:
    async with wires() as w:
        server = w.serve()
        await w.stop(server)
        connection = w.connect(server)
        asker = asyncio.create_task(connection.request(ASK, deadline_s=HANG_S))
        await asyncio.sleep(0)
        connection.close("is gone")
        with pytest.raises(NoPeer, match="is gone"):
            await asker


async def test_a_reader_that_dies_takes_the_askers_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with wires() as w:
        connection = w.connect(w.serve())
        monkeypatch.setattr(connection, "_answered", lambda _: 1 / 0)
        with pytest.raises(NoPeer, match="can no longer be read: ZeroDivisionError"):
            await connection.request(ASK, deadline_s=HANG_S)
        with pytest.raises(NoPeer):
            await connection.request(ASK, deadline_s=HANG_S)


# --- surplus ---------------------------------------------------------------------------------------------


async def test_surplus_requests_are_refused_at_once() -> None:
    stuck = Stuck()
    async with wires() as w:
        server = w.serve(stuck, limits=WireLimits(max_inflight=2))
        connection = w.connect(server)
        askers = [asyncio.create_task(connection.request(ASK, deadline_s=HANG_S)) for _ in range(2)]
        await eventually(lambda: stuck.inside == 2)
        with pytest.raises(Busy, match="no room for more") as caught:
            await connection.request(ASK, deadline_s=HANG_S)
        assert caught.value.retry_after_s > 0
        askers[0].cancel()
        await eventually(lambda: stuck.inside == 1)
        last = asyncio.create_task(connection.request(ASK, deadline_s=HANG_S))
        await eventually(lambda: stuck.inside == 2)
        connection.close()
        await asyncio.gather(*askers, last, return_exceptions=True)


async def test_an_asker_has_a_bound_of_its_own() -> None:
    async with wires(WireLimits(max_inflight=1)) as w:
        stuck = Stuck()
        connection = w.connect(w.serve(stuck))
        asker = asyncio.create_task(connection.request(ASK, deadline_s=HANG_S))
        await eventually(lambda: stuck.inside == 1)
        with pytest.raises(LocalProtocolError, match="over 1 requests in flight"):
            await connection.request(ASK, deadline_s=HANG_S)
        connection.close()
        await asyncio.gather(asker, return_exceptions=True)


async def test_a_message_that_finds_no_room_is_refused_while_others_are_served() -> None:
    small = WireLimits(frame_bytes=4096, max_arriving_bytes=100_000)
    async with wires(SMALL_FRAMES) as w:
        server = w.serve(limits=small)
        connection = w.connect(server)
        with pytest.raises(Busy, match="no room for more"):
            await connection.request(ASK, [bytes(1_000_000)], deadline_s=HANG_S)
        answer = await connection.request(ASK, [bytes(50_000)], deadline_s=HANG_S)
        assert len(answer.parts[0]) == 50_000


async def test_an_answer_that_finds_no_room_fails_its_asker_only() -> None:
    async with wires(SMALL_FRAMES) as w:
        server = w.serve()
        connection = w.connect(server, limits=WireLimits(frame_bytes=4096, max_arriving_bytes=100_000))
        with pytest.raises(Busy, match="no room for more"):
            await connection.request(ASK, [bytes(1_000_000)], deadline_s=HANG_S)
        assert (await connection.request(ASK, [b"x"], deadline_s=HANG_S)).body == Ok()


async def test_an_answer_over_the_limit_is_an_error_and_not_the_end_of_the_server() -> None:
    async def handler(request: Request, parts: Sequence[Buffer]) -> Answered:
        return Ok(), [bytes(2000)] if parts else ()

    async with wires() as w:
        connection = w.connect(w.serve(handler, limits=WireLimits(max_message_bytes=1000)))
        with pytest.raises(Unavailable, match="raise max_message_bytes"):
            await connection.request(ASK, [b"x"], deadline_s=HANG_S)
        assert (await connection.request(ASK, deadline_s=HANG_S)).body == Ok()


# --- errors ----------------------------------------------------------------------------------------------

TRAVELLERS: list[ZsflError] = [
    *(
        kind(f"about {kind.__name__}")
        for kind in (
            errors.ConfigError,
            errors.RemoteProtocolError,
            errors.Unavailable,
            errors.NoPeer,
            errors.DeadlineExceeded,
            errors.Rejected,
            errors.StaleWeights,
            errors.InputNeeded,
            errors.BadShape,
            errors.Unauthorised,
            errors.SpillFull,
            errors.SpillCorrupt,
        )
    ),
    Busy("about Busy", 1.25),
]


@pytest.mark.parametrize("error", TRAVELLERS, ids=lambda error: type(error).__name__)
async def test_errors_travel_by_type(error: ZsflError) -> None:
    async def handler(_request: Request, _parts: Sequence[Buffer]) -> Answered:
        raise error

    async with wires() as w:
        with pytest.raises(type(error)) as caught:
            await w.connect(w.serve(handler)).request(ASK, deadline_s=HANG_S)
        assert type(caught.value) is type(error)
        assert str(caught.value) == f"them: {error}"
        if isinstance(caught.value, Busy):
            assert caught.value.retry_after_s == 1.25


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError("x"), LocalProtocolError("x"), errors.StorageError("x"), OSError("no \udcff such file")],
    ids=lambda error: type(error).__name__,
)
async def test_any_other_fault_is_worth_another_server(error: Exception) -> None:
    async def handler(_request: Request, _parts: Sequence[Buffer]) -> Answered:
        raise error

    async with wires() as w:
        connection = w.connect(w.serve(handler))
        for _ in range(2):
            with pytest.raises(Unavailable, match=type(error).__name__):
                await connection.request(ASK, deadline_s=HANG_S)


def test_an_unknown_refusal_is_unavailable_and_long_ones_are_cut() -> None:
    assert type(to_error(Refusal(kind="FromTheFuture", message="x"), "them")) is Unavailable
    assert len(refusal(ConfigError("x" * 100_000)).message) == 2000


async def test_a_handler_that_answers_nonsense_is_not_the_end_of_the_server() -> None:
    async def handler(request: Request, parts: Sequence[Buffer]) -> Answered:
        return (Refusal(kind="\udcff", message=""), ()) if parts else (Ok(), ())

    async with wires() as w:
        connection = w.connect(w.serve(handler))
        with pytest.raises(Unavailable, match="UnicodeEncodeError"):
            await connection.request(ASK, [b"x"], deadline_s=HANG_S)
        assert (await connection.request(ASK, deadline_s=HANG_S)).body == Ok()


# --- more than one ---------------------------------------------------------------------------------------


async def test_a_control_request_passes_while_a_large_one_is_on_its_way() -> None:
    async with wires() as w:
        control, data = w.connect(w.serve()), w.connect(w.serve())
        await asyncio.gather(control.request(ASK, deadline_s=HANG_S), data.request(ASK, deadline_s=HANG_S))
        large = asyncio.create_task(data.request(ASK, [bytes(64 << 20)], deadline_s=HANG_S))
        await eventually(lambda: w.served.snapshot()["bytes_received"] > 4 << 20)
        await control.request(ASK, deadline_s=HANG_S)
        assert not large.done()
        assert len((await large).parts[0]) == 64 << 20


async def test_small_requests_pass_a_large_one_on_the_same_connection() -> None:
    async with wires(SMALL_FRAMES) as w:
        connection = w.connect(w.serve())
        await connection.request(ASK, deadline_s=HANG_S)
        large = asyncio.create_task(connection.request(ASK, [bytes(32 << 20)], deadline_s=HANG_S))
        await eventually(lambda: w.served.snapshot()["bytes_received"] > 1 << 20)
        await connection.request(ASK, deadline_s=HANG_S)
        assert not large.done()
        await large


async def test_a_server_that_comes_back_on_its_port_is_found_again() -> None:
    async with wires() as w:
        server = w.serve()
        connection = w.connect(server)
        await connection.request(ASK, deadline_s=HANG_S)
        await w.stop(server)
        with pytest.raises(DeadlineExceeded):
            await connection.request(ASK, deadline_s=0.1)
        again: list[Server] = []

        def bound() -> bool:
            try:
                again.append(w.serve(port=server.port))
            except ConfigError:  # ZeroMQ gives a port back a moment after its socket is closed
                return False
            return True

        await eventually(bound)
        assert (await connection.request(ASK, [b"x"], deadline_s=HANG_S)).body == Ok()


async def test_a_port_that_is_taken_is_said_so() -> None:
    async with wires() as w:
        server = w.serve()
        with pytest.raises(ConfigError, match=f"port {server.port} on 127.0.0.1 is taken"):
            w.serve(port=server.port)


async def test_many_connections_come_and_go() -> None:
    async with wires() as w:
        server = w.serve(echo)
        for _ in range(30):
            connection = w.connect(server)
            assert joined((await connection.request(ASK, [b"x"], deadline_s=HANG_S)).parts) == [b"x"]
            connection.close()


async def test_the_last_words_of_who_leaves_at_once_are_heard() -> None:
    async with wires() as w:
        bound: queue.Queue[int] = queue.Queue()
        times = 100

        def answer_and_leave() -> None:
            for _ in range(times):
                router = cast(Any, w.context).socket(zmq.ROUTER, socket_class=zmq.Socket)
                bound.put(router.bind_to_random_port("tcp://127.0.0.1"))
                identity, frame, *_ = router.recv_multipart()
                header = Header(kind="reply", id=decode_header(frame, w.limits).id, body=Ok())
                for frames in encode(header, [], w.limits):
                    router.send_multipart([identity, *frames])
                router.close(linger=int(HANG_S * 1000))

        leaver = threading.Thread(target=answer_and_leave, daemon=True)
        leaver.start()
        for _ in range(times):
            connection = w.connect(await asyncio.to_thread(bound.get), last_words=True)
            assert (await connection.request(ASK, deadline_s=10.0)).body == Ok()
            connection.close()
        leaver.join()


async def test_a_connection_that_finds_no_file_descriptor_is_made_with_a_later_request() -> None:
    async with wires() as w:
        server = w.serve()
        with none_left():
            connection = w.connect(server)
            with pytest.raises(NoPeer, match="cannot be asked: this process may open no more files and connections"):
                await connection.request(ASK, deadline_s=HANG_S)
        assert (await connection.request(ASK, deadline_s=HANG_S)).body == Ok()
        with none_left():
            w.connect(server).close()
