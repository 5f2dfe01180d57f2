"""The page over HTTP: for whom it is, what is refused, and that viewers cannot hurt one another."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from helpers.waiting import eventually, until

from zsfl.dashboard.history import History
from zsfl.dashboard.http import MAX_HEAD_BYTES, MAX_HEADERS, HttpError, parse
from zsfl.dashboard.hub import Has, Hub
from zsfl.dashboard.serving import MAX_CONNECTIONS, Page, PageServer
from zsfl.errors import ConfigError
from zsfl.reports import RoundReport

HOST = "127.0.0.1"


class Served:
    """A page that is served, and how to ask for it."""

    def __init__(self, server: PageServer, hub: Hub, history: History) -> None:
        self.server, self.hub, self.history = server, hub, history
        found = re.search(r":([0-9]+)/", server.url)
        assert found
        self.port = int(found[1])

    async def raw(self, request: bytes) -> bytes:
        """All that comes back."""
        reader, writer = await asyncio.open_connection(HOST, self.port)
        try:
            writer.write(request)
            return await until(reader.read())
        finally:
            writer.close()

    async def ask(self, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
        """Status, headers and body."""
        sent = {"Host": f"{HOST}:{self.port}"} | {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items())]
        head, _, body = (await self.raw("\r\n".join([*lines, "", ""]).encode())).decode().partition("\r\n\r\n")
        status, *rest = head.split("\r\n")
        return int(status.split()[1]), {k.lower(): v for k, _, v in (line.partition(": ") for line in rest)}, body

    @asynccontextmanager
    async def viewer(self, read_bytes: int = 0) -> AsyncIterator[Viewer]:
        """The stream of snapshots, after the head of the reply; the system keeps `read_bytes` of it at most."""
        sock = socket.socket()
        if read_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, read_bytes)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (HOST, self.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 18)
        try:
            writer.write(f"GET /events HTTP/1.1\r\nHost: {HOST}:{self.port}\r\n\r\n".encode())
            await until(reader.readuntil(b"\r\n\r\n"))
            yield Viewer(reader)
        finally:
            writer.transport.abort()


class Viewer:
    """One stream of snapshots."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._got = bytearray()

    async def any(self) -> None:
        """Something has begun to come."""
        while not self._got:
            await self._more()

    async def _more(self) -> None:
        part = await until(self._reader.read(1 << 20))
        assert part, "the stream has ended"
        self._got += part

    async def event(self) -> tuple[str, Any]:
        """The next event."""
        while True:
            while (end := self._got.find(b"\n\n")) < 0:
                await self._more()
            text = bytes(self._got[:end])
            del self._got[: end + 2]
            if text.startswith(b"event: "):  # not only how soon to come back
                name, data = text.decode().split("\n")
                return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    async def live(self, wanted: object) -> None:
        """Reads on until this snapshot comes."""
        while (await self.event()) != ("live", wanted):
            pass


@asynccontextmanager
async def serving(token: str = "", stall_s: float = 60.0, head_s: float = 60.0) -> AsyncIterator[Served]:
    history = History()
    hub = Hub(history)
    server = PageServer(Page.load(), hub, stall_s=stall_s, head_s=head_s)
    await server.open(HOST, 0, token)
    try:
        yield Served(server, hub, history)
    finally:
        await server.close()


def round_(number: int) -> RoundReport:
    return RoundReport(
        round=number, rounds=9, version=number, train_loss=1.0, loss=1.0, accuracy=None, steps=1, samples=1,
        seconds=1.0, steps_per_s=1.0, bytes_sent=1, serving={}, peers={},
    )  # fmt: skip


async def test_the_page_loads_nothing_and_may_run_only_its_own_script() -> None:
    async with serving() as page:
        status, headers, body = await page.ask()
        assert status == 200
        assert headers["content-type"] == "text/html; charset=utf-8"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert len(re.findall(r"'sha256-[A-Za-z0-9+/=]{44}'", policy)) == 2
        assert not re.findall(r"(?:src|href)=\"?(?:https?:)?//", body), "everything is in the one file"
        assert not re.findall(r"\bstyle=|\bon[a-z]+=\"", body), "which the policy would not let pass"
        assert int(headers["content-length"]) == len(body.encode())
        head = await page.ask(method="HEAD")
        assert (head[0], head[1], head[2]) == (200, headers, "")
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"\r\n\r\n", 400),
        (b"GET / HTTP/1.1 x\r\n\r\n", 400),
        (b"GET http://elsewhere/ HTTP/1.1\r\n\r\n", 400),
        (b"get / HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /\x00 HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 505),
        (b"POST / HTTP/1.1\r\nHost: HERE\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\nHost: HERE\r\nContent-Length: 3\r\n\r\nabc", 400),
        (b"GET / HTTP/1.1\r\nHost: HERE\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: HERE\r\nHost: HERE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : HERE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: HERE\r\n folded: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: HERE\r\nX: a\x00b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: HERE\nX: y\r\n\r\n", 400),
        (b"GET /?" + b"&".join(b"a%d=1" % n for n in range(99)) + b" HTTP/1.1\r\nHost: HERE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: HERE\r\n" + b"X: y\r\n" * MAX_HEADERS + b"\r\n", 431),
        (b"GET /" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n", 431),
        (b"GET /other HTTP/1.1\r\nHost: HERE\r\n\r\n", 404),
        (b"GET /../../etc/passwd HTTP/1.1\r\nHost: HERE\r\n\r\n", 404),
        (b"GET / HTTP/1.0\r\nHost: HERE\r\n\r\n", 200),
    ],
)
async def test_malformed_requests_are_told_what_is_wrong(request_: bytes, status: int) -> None:
    async with serving() as page:
        answer = await page.raw(request_.replace(b"HERE", f"{HOST}:{page.port}".encode()))
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:200]
        assert (await page.ask())[0] == 200


@pytest.mark.parametrize("blank", [b" ", b"\t", b" \t"])
def test_blanks_that_lead_to_nothing_take_no_time(blank: bytes) -> None:
    many = blank * (8_000 // len(blank))  # which would take an hour, were they tried in all ways
    with pytest.raises(HttpError, match="a header is malformed"):
        parse(b"GET / HTTP/1.1\r\nA:" + many + b"\x01\r\n\r\n")
    assert parse(b"GET / HTTP/1.1\r\nA:" + many + b"b c" + many + b"\r\n\r\n").headers == {"a": "b c"}


async def test_who_asks_too_slowly_or_hangs_up_is_let_go_of() -> None:
    async with serving(head_s=0.05) as page:
        assert (await page.raw(b"GET / HT")).startswith(b"HTTP/1.1 408 ")
        _, writer = await asyncio.open_connection(HOST, page.port)
        writer.write(b"GET /")
        writer.close()
        await eventually(lambda: not page.server._tasks)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:PORT", "127.0.0.1", "127.0.0.1:1", "", "127.0.0.1.evil:PORT"]
)
async def test_a_name_of_the_world_that_means_this_machine_opens_nothing(host: str) -> None:
    async with serving() as page:
        for path in ("/", "/events"):
            status, _, body = await page.ask(path, Host=host.replace("PORT", str(page.port)))
            assert status == 421
            assert "by the address that was printed" in body
        assert (await page.ask(Host=f"localhost:{page.port}"))[0] == 200


async def test_pages_from_elsewhere_read_nothing() -> None:
    async with serving() as page:
        own = f"http://{HOST}:{page.port}"
        assert (await page.ask("/events", "HEAD", Origin=own))[0] == 200
        assert (await page.ask("/events", Origin="http://elsewhere.example"))[0] == 403
        assert (await page.ask("/events", Origin=f"http://{HOST}:1"))[0] == 403
        assert (await page.ask("/", Origin="null"))[0] == 403
        assert (await page.ask("/events", Sec_Fetch_Site="cross-site"))[0] == 403
        assert (await page.ask("/events", Sec_Fetch_Site="same-site"))[0] == 403
        assert (await page.ask("/", Sec_Fetch_Site="cross-site"))[0] == 200, "a link to it may be followed"


async def test_where_others_reach_it_the_token_is_wanted_once_and_kept_as_a_cookie() -> None:
    async with serving("se-cret") as page:
        assert page.server.url.endswith("/?token=se-cret")
        for path in ("/", "/events", "/?token=", "/?token=wrong", "/?token=%C3%A9", "/?token=se-cret2"):
            assert (await page.ask(path))[0] == 401
        status, headers, _ = await page.ask("/?token=se-cret")
        assert (status, headers["location"]) == (303, "/")
        cookie, *about = headers["set-cookie"].split("; ")
        assert {"HttpOnly", "SameSite=Strict", "Path=/"} == set(about)
        assert (await page.ask("/", Cookie=f"other=1; {cookie}"))[0] == 200
        assert (await page.ask("/", Cookie=cookie + "x"))[0] == 401
        assert (await page.ask("/events?token=se-cret", "HEAD"))[0] == 200
        assert (await page.ask("/?token=se-cret", Origin="http://elsewhere.example"))[0] == 403
        assert (await page.ask("/", Host="name-on-this-lan", Cookie=cookie))[0] == 200


async def test_many_viewers_see_the_same_and_one_more_is_told_to_come_back() -> None:
    async with serving() as page, AsyncExitStack() as stack:
        page.hub.publish({"at": 1})
        readers = [await stack.enter_async_context(page.viewer()) for _ in range(MAX_CONNECTIONS)]
        for reader in readers:
            await reader.live({"at": 1})
        assert page.hub.viewers == MAX_CONNECTIONS
        status, _, body = await page.ask()
        assert status == 503
        assert "too many" in body
        page.hub.publish({"at": 2})
        for reader in readers:
            assert await reader.event() == ("live", {"at": 2})


async def test_a_slow_viewer_misses_snapshots_and_keeps_nobody_waiting() -> None:
    big = "x" * (8 << 20)  # more than systems keep for a connection
    async with serving() as page, page.viewer(read_bytes=1 << 18) as slow, page.viewer() as quick:
        page.hub.publish({"at": 0, "big": big})
        await quick.live({"at": 0, "big": big})
        await slow.any()
        for number in range(1, 20):
            page.hub.publish({"at": number})
            await quick.live({"at": number})
        await slow.live({"at": 0, "big": big})
        assert await slow.event() == ("live", {"at": 19})


async def test_a_viewer_that_takes_nothing_is_let_go_of() -> None:
    async with serving(stall_s=0.05) as page, page.viewer(read_bytes=1 << 18):
        await eventually(lambda: page.hub.viewers == 1)
        page.hub.publish({"big": "x" * (8 << 20)})
        await eventually(lambda: not page.server._tasks)
        assert page.hub.viewers == 0


async def test_history_comes_whole_first_and_then_what_is_added() -> None:
    async with serving() as page:
        page.history.on(round_(1))
        page.hub.publish({})
        async with page.viewer() as first:
            name, rows = await first.event()
            assert (name, len(rows["rounds"])) == ("history", 1)
            assert await first.event() == ("live", {})
            page.history.on(round_(2))
            page.hub.publish({})
            name, rows = await first.event()
            assert (name, [row["round"] for row in rows["rounds"]]) == ("more", [2])
            page.hub.follow(other := History())
            other.on(round_(7))
            page.hub.publish({})
            assert (await first.event())[0] == "live"
            name, rows = await first.event()
            assert (name, [row["round"] for row in rows["rounds"]]) == ("history", [7])


async def test_what_is_sent_is_encoded_once_for_all() -> None:
    history = History()
    hub = Hub(history)
    hub.publish({"at": 1})
    (_, has), (_, also) = await hub.next(Has()), await hub.next(Has())
    hub.publish({"at": 2})
    (one, has), (other, also) = await hub.next(has), await hub.next(also)
    assert one is other
    waiting = asyncio.ensure_future(hub.next(has))
    hub.forget()
    late = asyncio.ensure_future(hub.next(Has()))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert not late.done(), "what was true when somebody looked last is shown to nobody"
    hub.publish({"at": 3})
    assert (await until(waiting))[0] in (await until(late))[0]


async def test_a_port_that_is_taken_is_said() -> None:
    async with serving() as page:
        taken = rf"^cannot serve the page at {HOST}:{page.port} \(something listens there already\)"
        with pytest.raises(ConfigError, match=rf"{taken}; choose another --port$"):
            await PageServer(Page.load(), page.hub).open(HOST, page.port, "")
