"""Requests over several connections to one peer: when these are opened, and that each request keeps to one."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import closing

import pytest
from helpers.waiting import HANG_S, eventually, until
from helpers.wires import HOST, wires

from zsfl.errors import DeadlineExceeded, NoPeer
from zsfl.settings import WireLimits
from zsfl.wire import connection, trunk
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import Ok, ReleaseSpills, Reply, Request
from zsfl.wire.sockets import round_trip_s
from zsfl.wire.trunk import MOST, MUCH_BYTES, Trunk

ASKING = ReleaseSpills(cids=())
LARGE = b"x" * MUCH_BYTES


class Holding:
    """Answers what is large when it is told to."""

    def __init__(self) -> None:
        self.held = 0
        self.cancelled = 0
        self.go = asyncio.Event()

    async def answer(self, _request: Request, parts: Sequence[Buffer]) -> tuple[Reply, Sequence[Buffer]]:
        if parts:
            self.held += 1
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return Ok(), parts


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not say how long a round trip is")
async def test_a_long_link_that_is_busy_gets_further_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    async with wires(WireLimits()) as net:
        holding = Holding()
        server = net.serve(holding.answer)
        with closing(Trunk(lambda: net.connect(server))) as asking:
            await asking.request(ASKING, deadline_s=HANG_S)
            round_trip_s = asking._first.round_trip_s()
            assert round_trip_s is not None
            assert 0 < round_trip_s < trunk.LONG_S
            short = [asyncio.ensure_future(asking.request(ASKING, [LARGE], deadline_s=HANG_S)) for _ in range(2)]
            await eventually(lambda: holding.held == 2)
            assert asking.connections == 1  # as long as the link is a short one
            monkeypatch.setattr(trunk, "LOOK_S", 0.0)
            monkeypatch.setattr(trunk, "LONG_S", round_trip_s / 1e6)
            held = [asyncio.ensure_future(asking.request(ASKING, [LARGE], deadline_s=HANG_S)) for _ in range(2 * MOST)]
            await eventually(lambda: holding.held == 2 + 2 * MOST)
            assert asking.connections == MOST
            for one in held:
                one.cancel()
            await eventually(lambda: holding.cancelled == 2 * MOST)  # each by the connection that it went by
            holding.go.set()
            for answer in await until(asyncio.gather(*short)):
                assert [bytes(part) for part in answer.parts] == [LARGE]
            assert set(asking._under_way.values()) == {0}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not say how long a round trip is")
def test_a_connection_that_is_none_any_more_has_no_round_trip_and_leaves_nothing_open() -> None:
    with open(os.devnull) as file:
        before = os.listdir("/proc/self/fd")
        assert round_trip_s(file.fileno()) is None
        assert os.listdir("/proc/self/fd") == before


async def test_as_many_as_are_asked_for_are_there_from_the_beginning() -> None:
    async with wires(WireLimits()) as net:
        server = net.serve()
        asking = Trunk(lambda: net.connect(server), 3)
        assert asking.connections == 3
        await until(asyncio.gather(*(asking.request(ASKING, [LARGE], deadline_s=HANG_S) for _ in range(12))))
        assert len(server._callers) == 3
        asking.close("is gone")
        with pytest.raises(NoPeer, match="is gone"):
            await asking.request(ASKING, deadline_s=HANG_S)


async def test_a_further_one_that_finds_no_descriptor_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    async with wires(WireLimits()) as net:
        server = net.serve()
        with closing(Trunk(lambda: net.connect(server))) as asking:
            monkeypatch.setattr(asking, "_reaches_far", lambda: True)
            await asking.request(ASKING, deadline_s=HANG_S)

            def none_left(*_: object) -> None:
                raise connection.zmq.ZMQError(24)

            monkeypatch.setattr(connection, "open_socket", none_left)
            await until(asyncio.gather(*(asking.request(ASKING, [LARGE], deadline_s=HANG_S) for _ in range(4))))
            assert asking.connections == 1


async def test_a_further_one_that_never_comes_about_takes_no_more_than_its_first_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with wires(WireLimits()) as net:
        holding = Holding()
        server = net.serve(holding.answer)
        with closing(socket.create_server((HOST, 0))) as mute:
            ports = iter((server.port, mute.getsockname()[1]))
            with closing(Trunk(lambda: net.connect(next(ports)))) as asking:
                monkeypatch.setattr(asking, "_reaches_far", lambda: True)
                await asking.request(ASKING, deadline_s=HANG_S)
                held = asyncio.ensure_future(asking.request(ASKING, [LARGE], deadline_s=HANG_S))
                await eventually(lambda: holding.held == 1)
                with pytest.raises(DeadlineExceeded):
                    await asking.request(ASKING, deadline_s=0.05)
                assert asking.connections == 1
                holding.go.set()
                more = (asking.request(ASKING, [LARGE], deadline_s=HANG_S) for _ in range(2))
                await until(asyncio.gather(held, *more))
                assert set(asking._under_way.values()) == {0}
