"""Asking somebody to leave who is not there, is no node, does not answer, or does not go."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
from helpers.waiting import HANG_S, eventually, until
from helpers.wires import HOST, Wires, wires

from zsfl.cluster import leaving
from zsfl.cluster.leaving import drain, print_drain
from zsfl.errors import NoPeer, Rejected, RemoteProtocolError, Unavailable
from zsfl.ids import Address, NodeId, Role
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import Drain, Draining, Reply, Request
from zsfl.wire.server import Server
from zsfl.wire.sockets import is_free

STAYS = Draining(node=NodeId("me"), name="stays", role=Role.SPLIT_SERVER, busy=1, offered=2)


def address(port: int) -> Address:
    return Address(f"{HOST}:{port}")


async def stay(request: Request, _parts: Sequence[Buffer]) -> tuple[Reply, Sequence[Buffer]]:
    """A node that says it is leaving, and stays."""
    assert isinstance(request, Drain)
    assert request.node in (None, STAYS.node)
    return STAYS, ()


@asynccontextmanager
async def listener(says: bytes | None) -> AsyncIterator[Address]:
    """Something that takes connections; it says this and hangs up, or with None nothing at all."""
    held: list[asyncio.StreamWriter] = []

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)
        if says is not None:
            writer.write(says)
            writer.close()

    server = await asyncio.start_server(greet, HOST, 0)
    try:
        yield address(server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for writer in held:
            writer.transport.abort()


async def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
        with pytest.raises(NoPeer, match=f"nobody listens at {HOST}:{port}: has it left already"):
            await until(drain(address(port), HANG_S))


@pytest.mark.parametrize("says", [b"HTTP/1.0 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n", b""])
async def test_what_listens_is_no_node(says: bytes) -> None:
    async with listener(says) as where:
        with pytest.raises(NoPeer, match=f"what listens at {where} is no zsfl node"):
            await until(drain(where, HANG_S))


async def test_what_listens_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "ANSWER_S", 0.1)
    async with listener(None) as where:
        with pytest.raises(NoPeer, match=r"does not answer within 0\.1 s: is it a zsfl node"):
            await until(drain(where, HANG_S))


async def test_a_node_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    check_is_node = leaving._check_is_node

    async def checked(where: Address) -> None:
        """It greets in no time, and then has little to answer in."""
        await check_is_node(where)
        monkeypatch.setattr(leaving, "ANSWER_S", 0.1)

    monkeypatch.setattr(leaving, "ANSWER_S", HANG_S)
    monkeypatch.setattr(leaving, "_check_is_node", checked)

    async def hang(*_: object) -> tuple[Reply, Sequence[Buffer]]:
        await asyncio.Event().wait()
        raise AssertionError

    async with wires() as w:
        with pytest.raises(NoPeer, match="takes connections and does not answer: is it the address in the node's"):
            await until(drain(address(w.serve(hang).port), HANG_S))


async def test_whoever_refuses_is_quoted() -> None:
    async def refuse(*_: object) -> tuple[Reply, Sequence[Buffer]]:
        raise RemoteProtocolError("a bench server does not answer Drain")

    async with wires() as w:
        where = address(w.serve(refuse).port)
        with pytest.raises(NoPeer, match=f"what listens at {where}: a bench server does not answer Drain. Give the"):
            await until(drain(where, HANG_S))


async def test_a_node_that_does_not_go() -> None:
    told: list[Draining] = []
    async with wires() as w:
        where = address(w.serve(stay).port)
        with pytest.raises(Unavailable, match=rf"stays at {where} was asked to leave and is still there after 0\.3 s"):
            await until(drain(where, 0.3, told.append))
    assert told == [STAYS]


async def gone(w: Wires, server: Server) -> None:
    await w.stop(server)


async def replaced(w: Wires, server: Server) -> None:
    async def refuse(*_: object) -> tuple[Reply, Sequence[Buffer]]:
        raise Rejected("this is another node")

    await w.stop(server)
    await eventually(lambda: is_free("127.0.0.1", server.port))  # ZeroMQ closes a socket a moment later
    w.serve(refuse, server.port)


@pytest.mark.parametrize("goes", [gone, replaced])
async def test_it_has_left_when_its_socket_is_closed_or_somebody_elses(
    goes: Callable[[Wires, Server], Awaitable[None]],
) -> None:
    async with wires() as w:
        server = w.serve(stay)
        asked = asyncio.Event()
        leaves = asyncio.create_task(drain(address(server.port), HANG_S, lambda _: asked.set()))
        await until(asked.wait())
        await goes(w, server)
        assert await until(leaves) == "stays"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("drain", "here"), "'here' is no HOST:PORT, such as"),
        (("drain", "127.0.0.1:0"), "'127.0.0.1:0' is no HOST:PORT"),
        (("drain", "127.0.0.1:1", "--wait-s", "0"), "--wait-s is 0: expected a number of seconds above 0"),
        (("drain", "127.0.0.1:1", "--wait-s", "nan"), "--wait-s is nan: expected"),
    ],
)
def test_what_cannot_be_meant(args: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from zsfl.cli import main

    assert main(args) == 2
    assert message in capsys.readouterr().err


def test_each_is_told_of_and_one_that_is_not_there_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as one, socket.socket() as other:
        ports: list[int] = []
        for free in (one, other):
            free.bind((HOST, 0))
            ports.append(free.getsockname()[1])
        assert print_drain([address(port) for port in (*ports, ports[0])], 1.0) == 1
    said = capsys.readouterr().err
    assert [said.count(f"nobody listens at {HOST}:{port}") for port in ports] == [1, 1]
