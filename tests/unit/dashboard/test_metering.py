"""Serving metrics: for whom they are, and that no scraper hurts another, or what is scraped."""

from __future__ import annotations

import asyncio
import re
import stat
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from helpers.waiting import until

from zsfl.dashboard.beside import Beside
from zsfl.dashboard.health import MAIN_S, Health
from zsfl.dashboard.metering import FRESH_S, TOKEN_FILE, MetricsServer, NodeMetrics
from zsfl.dashboard.serving import MAX_CONNECTIONS
from zsfl.errors import ConfigError
from zsfl.ids import Address, NodeCard, NodeId, Role
from zsfl.settings import NodeSettings, load_settings
from zsfl.wire.fields import PeerHint
from zsfl.wire.messages import Beat

HOST = "127.0.0.1"


def port_of(url: str) -> int:
    found = re.search(r"http://[0-9.]+:([0-9]+)/metrics", url)
    assert found, url
    return int(found[1])


def fetch(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as reply:  # noqa: S310
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@asynccontextmanager
async def serving(body: bytes = b"zsfl_x 1\n") -> AsyncIterator[tuple[int, list[int]]]:
    """Metrics that are served; the port, and how often they were made."""
    made = [0]

    def render() -> bytes:
        made[0] += 1
        return body

    server = MetricsServer(render)
    await server.open(HOST, 0, "")
    try:
        yield port_of(server.url), made
    finally:
        await server.close()


async def ask(port: int, request: bytes = b"") -> bytes:
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(request or f"GET /metrics HTTP/1.1\r\nHost: {HOST}:{port}\r\n\r\n".encode())
        return await until(reader.read())
    finally:
        writer.close()


async def test_many_scrapers_are_told_the_same_and_it_is_made_once() -> None:
    async with serving() as (port, made):
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        replies = await asyncio.gather(*(ask(port) for _ in range(60)))
        took_s = loop.time() - began_s
        assert {reply.partition(b"\r\n\r\n")[2] for reply in replies} == {b"zsfl_x 1\n"}
        assert b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n" in replies[0]
        assert made[0] <= 1 + took_s / FRESH_S


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: HERE\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\nHost: HERE\r\n\r\n", 405),
        (b"GET /metrics HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n", 421),
        (b"GET /metrics HTTP/1.1\r\nHost: HERE\r\nOrigin: http://elsewhere.example\r\n\r\n", 403),
        (b"\x16\x03\x01\x00\r\n\r\n", 400),
    ],
)
async def test_what_nobody_asks_for_that_may_is_refused(request_: bytes, status: int) -> None:
    async with serving() as (port, made):
        reply = await ask(port, request_.replace(b"HERE", f"{HOST}:{port}".encode()))
        assert reply.startswith(f"HTTP/1.1 {status} ".encode()), reply
        assert made == [0]


async def test_scrapers_that_take_nothing_keep_nobody_waiting() -> None:
    async with serving(b"x" * (8 << 20)) as (port, _):
        stuck = [await asyncio.open_connection(HOST, port, limit=1 << 10) for _ in range(MAX_CONNECTIONS // 2)]
        try:
            for _, writer in stuck:
                writer.write(f"GET /metrics HTTP/1.1\r\nHost: {HOST}:{port}\r\n\r\n".encode())
            assert len(await ask(port)) > 8 << 20
        finally:
            for _, writer in stuck:
                writer.transport.abort()


async def test_off_loopback_the_token_beside_the_keys_is_wanted(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    for _ in range(2):  # it is the same after a new start, as whoever scrapes has it in a file
        metrics = NodeMetrics(NodeSettings(metrics="0.0.0.0:0", keys=str(keys)))
        said = metrics.open()
        try:
            assert said.endswith(f"for who sends the token in {keys / TOKEN_FILE}")
            assert stat.S_IMODE((keys / TOKEN_FILE).stat().st_mode) == 0o600
            token = (keys / TOKEN_FILE).read_text().strip()
            url = f"http://{HOST}:{port_of(said)}/metrics"
            status, why = fetch(url)
            assert status == 401
            assert TOKEN_FILE in why
            assert fetch(url, Authorization=f"Bearer {token}x")[0] == 401
            status, text = fetch(url, Authorization=f"Bearer {token}")
            assert status == 200
            assert "zsfl_node_up" in text
        finally:
            metrics.close()
    (keys / TOKEN_FILE).chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        NodeMetrics(NodeSettings(metrics="0.0.0.0:0", keys=str(keys)))
    (keys / TOKEN_FILE).write_text("short\n")
    (keys / TOKEN_FILE).chmod(0o600)
    with pytest.raises(ConfigError, match="remove it"):
        NodeMetrics(NodeSettings(metrics="0.0.0.0:0", keys=str(keys)))


@pytest.mark.parametrize("wrong", ["port", "1.2.3.4", "localhost:9464", "1.2.3.4:", "-1", "123456", "::1:9464"])
def test_an_address_that_is_none_is_said(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"--metrics is .* expected a port such as 9464"):
        load_settings({"metrics": wrong}, {})


async def test_a_port_that_cannot_be_is_said() -> None:
    metrics = NodeMetrics(NodeSettings(metrics="0"))
    said = metrics.open()
    for port in (str(port_of(said)), "99999"):
        other = NodeMetrics(NodeSettings(metrics=port))
        with pytest.raises(ConfigError, match=f"cannot serve metrics at {HOST}:{port} .*another port with --metrics"):
            other.open()
        other.close()
    metrics.close()


def test_what_fails_beside_a_run_is_a_line_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    async def serve(is_open: object) -> None:
        assert callable(is_open)
        is_open("here")
        raise OSError("no more")

    beside = Beside("the page", serve)
    assert beside.open() == "here"
    beside._thread.join(60)
    beside.soon(lambda: None)
    beside.close()
    assert capsys.readouterr().err == "zsfl: the page has ended: no more\n"


async def test_whoever_asks_is_told_whether_a_node_is_well(tmp_path: Path) -> None:
    metrics = NodeMetrics(NodeSettings(metrics="0.0.0.0:0", keys=str(tmp_path)))
    base = f"http://{HOST}:{port_of(metrics.open())}"

    async def told(path: str) -> tuple[int, str]:
        return await asyncio.to_thread(fetch, base + path)

    def heard(role: Role, *peers: Role) -> None:
        card = NodeCard(id=NodeId("n"), name="n", role=role, host=HOST, control_port=1)
        hints = tuple(PeerHint(id=NodeId(one), role=one, address=Address(f"{HOST}:2")) for one in peers)
        metrics.beat(Beat(card=card, peers=hints, counters={}))

    try:
        assert await told("/healthz") == (200, "ok\n")
        assert (await told("/readyz"))[0] == 503
        heard(Role.AGGREGATOR)
        assert await told("/readyz") == (200, "ok\n")
        heard(Role.CLIENT, Role.SPLIT_SERVER)
        assert await told("/readyz") == (503, "it knows no aggregator yet\n")
        metrics.rest()
        assert await told("/readyz") == (200, "ok\n")
        heard(Role.CLIENT, Role.AGGREGATOR, Role.SPLIT_SERVER)
        assert await told("/readyz") == (200, "ok\n")
        assert (await told("/metrics"))[0] == 401
    finally:
        metrics.close()


def test_a_loop_that_answers_no_more_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.new_event_loop()
    try:
        asked = Health(loop)
        assert asked.not_alive() == ""  # by now nobody can know better
        assert asked.not_alive() == ""
        monkeypatch.setattr("zsfl.dashboard.health.time.monotonic", lambda: time.monotonic_ns() / 1e9 + MAIN_S)
        assert asked.not_alive() == "no answer comes from the main loop any more"
        loop.call_soon(loop.stop)
        loop.run_forever()
        assert asked.not_alive() == ""
    finally:
        loop.close()
