"""`zsfl bench` between two ends: real processes, real sockets, and what is said when something is wrong."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.processes import command, finished
from helpers.waiting import HANG_S, eventually
from helpers.wires import HOST, wires

from zsfl.bench import network
from zsfl.bench.network import SIZES, measure
from zsfl.cli import main
from zsfl.errors import ConfigError, DeadlineExceeded, NoPeer, RemoteProtocolError
from zsfl.ids import PROTOCOL
from zsfl.metrics import Counters
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import Hello, Reply, Request, Train


async def test_two_processes_measure_the_way_between_them(tmp_path: Path) -> None:
    async with command("bench", "--serve", cwd=tmp_path) as server:
        await eventually(lambda: bool(server.out))
        said = re.search(r"run: zsfl bench (127\.0\.0\.1:\d+)", server.text)
        assert said, server.text
        code, asked = await finished("bench", said[1], "--seconds", "0.02", cwd=tmp_path)
        assert code == 0, asked.text
        rows = [line.split() for line in asked.out[3:]]
        assert [" ".join(row[:2]) for row in rows] == ["1 KiB", "16 KiB", "256 KiB", "1 MiB", "16 MiB"]
        assert [int(row[6]) for row in rows] == [8, 8, 8, 8, 1]
        assert all(float(row[-1].replace(",", "")) > 0 for row in rows)
        server.signal(signal.SIGINT)
        assert await server.ended() == 0
        returned = re.search(r"sent back (\d+) tensors", server.text)
        assert returned
        assert int(returned[1]) >= 3 * len(SIZES)


async def test_each_size_is_measured_alone_and_with_others_open() -> None:
    async with wires() as w:
        server = w.serve(network._answers(HOST, Counters()))
        found = [one async for one in measure(f"{HOST}:{server.port}", seconds=0.01, request_s=HANG_S)]
    assert [one.size_bytes for one in found] == list(SIZES)
    assert all(0 < one.median_s <= one.slow_s for one in found)
    assert all(one.answers_per_s > 0 for one in found)


async def test_nobody_there_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "HELLO_S", 0.05)
    async with wires() as w:
        server = w.serve()
        await w.stop(server)
        with pytest.raises(NoPeer, match=rf"nobody answers at .* --serve --host 127.0.0.1 --port {server.port}"):
            _ = [one async for one in measure(f"{HOST}:{server.port}", seconds=0.01, request_s=1)]


async def test_a_node_that_is_no_bench_server_is_told_apart() -> None:
    async def node(request: Request, _parts: Sequence[Buffer]) -> tuple[Reply, Sequence[Buffer]]:
        assert isinstance(request, Hello)
        raise ConfigError("the jobs differ in name")

    async with wires() as w:
        with pytest.raises(NoPeer, match=r"is no bench server.*the jobs differ in name"):
            _ = [one async for one in measure(f"{HOST}:{w.serve(node).port}", seconds=0.01, request_s=HANG_S)]


@pytest.mark.parametrize(("size", "said"), [(1024, "other bytes than the 1024"), (1, "other than the 1024 bytes")])
async def test_a_server_that_sends_back_something_else_is_found_out(size: int, said: str) -> None:
    answers = network._answers(HOST, Counters())

    async def liar(request: Request, parts: Sequence[Buffer]) -> tuple[Reply, Sequence[Buffer]]:
        reply, back = answers(request, parts)
        return reply, [bytes(size) for _ in back]

    async with wires() as w:
        with pytest.raises(RemoteProtocolError, match=said):
            _ = [one async for one in measure(f"{HOST}:{w.serve(liar).port}", seconds=0.01, request_s=HANG_S)]


async def test_an_answer_that_does_not_come_ends_the_measurement() -> None:
    answers, inside = network._answers(HOST, Counters()), 0

    async def stuck_with_two(request: Request, parts: Sequence[Buffer]) -> tuple[Reply, Sequence[Buffer]]:
        nonlocal inside
        inside += 1
        try:
            with suppress(TimeoutError):
                await eventually(lambda: inside > 1, 0.05)
                await asyncio.Event().wait()
            return answers(request, parts)
        finally:
            inside -= 1

    async with wires() as w:
        server = w.serve(stuck_with_two)
        with pytest.raises(DeadlineExceeded, match="no answer from the bench server"):
            _ = [one async for one in measure(f"{HOST}:{server.port}", seconds=0.01, request_s=1)]


async def test_a_bench_server_joins_no_run_and_answers_nothing_else() -> None:
    async with wires() as w:
        connection = w.connect(w.serve(network._answers(HOST, Counters())))
        card = network._card(HOST)
        with pytest.raises(ConfigError, match="not a node of a run"):
            await connection.request(
                Hello(protocol=PROTOCOL, facts={"name": "x"}, card=card, codecs=()), deadline_s=HANG_S
            )
        with pytest.raises(ConfigError, match="use one version of zsfl"):
            await connection.request(Hello(protocol=PROTOCOL + 1, facts={}, card=card, codecs=()), deadline_s=HANG_S)
        with pytest.raises(RemoteProtocolError, match="does not answer Train"):
            await connection.request(Train(rounds=1), deadline_s=HANG_S)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([], "one of them"),
        (["127.0.0.1:7700", "--serve"], "one of them"),
        (["nowhere.py"], "'nowhere.py' is neither a job file that is there nor HOST:PORT"),
        (["127.0.0.1:0"], "nor HOST:PORT"),
        (["127.0.0.1:7700", "--seconds", "0"], "--seconds is 0"),
        (["--serve", "--host", "localhost"], "the IPv4 address of one interface"),
    ],
)
def test_what_cannot_be_measured_is_said(asked: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *asked]) == 2
    assert said in capsys.readouterr().err
