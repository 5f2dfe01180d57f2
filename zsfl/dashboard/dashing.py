"""`zsfl dash`, and the same beside a run that this process starts (`--dash`)."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from zsfl.dashboard.beside import Beside, warn
from zsfl.dashboard.dash import Dash, Place, Started
from zsfl.dashboard.pages import folder_of, where
from zsfl.dashboard.serving import Page, PageServer
from zsfl.errors import ConfigError
from zsfl.reports import ADDRESS, AnyReport
from zsfl.settings import NodeSettings, load_settings
from zsfl.wire.door import is_loopback

LOOPBACK = "127.0.0.1"


def find_place(run: str | None, settings: NodeSettings) -> Place:
    """Where a run is, as `zsfl ls` finds it; a folder without an address is shown all the same."""
    folder = folder_of(run, settings)
    if folder is not None and not (folder / ADDRESS).is_file():
        return Place(folder, settings, {}, is_known=False)
    settings, facts = where(run, settings)
    if settings.peers and all(is_loopback(peer.rpartition(":")[0]) for peer in settings.peers):
        settings = replace(settings, host=LOOPBACK)  # a run of this machine alone, wherever its page is served
    return Place(folder, settings, facts)


def serve_dash(run: str | None, settings: NodeSettings, host: str, port: int) -> int:
    """Serve the page until SIGINT or SIGTERM; the exit code."""
    _check_port(port)
    token = "" if is_loopback(host) else secrets.token_urlsafe(24)

    if run is not None and not settings.named and folder_of(run, settings) is None:
        warn(f"there is no run {run} in {settings.runs}: the page waits for nodes of a job that is called so")

    async def serve() -> None:
        dash = Dash(lambda: find_place(run, settings), settings.beat_s, warn)
        serving, loop = (
            asyncio.ensure_future(dash.run(PageServer(Page.load(), dash.hub), host, port, token, _say_url)),
            asyncio.get_running_loop(),
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, serving.cancel)
        with suppress(asyncio.CancelledError):
            await serving

    asyncio.run(serve())
    return 0


class _PageBeside:
    """The page beside a run."""

    def __init__(self, settings: NodeSettings, port: int) -> None:
        self._started = Started(settings)
        self._port = port
        self._dash: Dash
        self._beside = Beside("the page", self._serve)
        self.open, self.close = self._beside.open, self._beside.close

    def tell(self, report: AnyReport) -> None:
        """What the nodes report."""
        self._started.take(report)
        self._beside.soon(lambda: self._dash.tell(report))

    async def _serve(self, is_open: Callable[[str], None]) -> None:
        self._dash = Dash(self._started.find, self._started.settings.beat_s, lambda _: None)
        server = PageServer(Page.load(), self._dash.hub)
        server.flag = "--dash-port"
        await self._dash.run(server, LOOPBACK, self._port, "", is_open)


@contextmanager
def watched(flags: Mapping[str, Any]) -> Generator[Callable[[AnyReport], None], None, None]:
    """Where the flags ask for it, a page beside a run; what is yielded is to be told all that the nodes report."""
    if not flags["dash"]:
        yield lambda _: None
        return
    _check_port(flags["dash_port"])
    beside = _PageBeside(load_settings(flags, os.environ), flags["dash_port"])
    _say_url(beside.open())
    try:
        yield beside.tell
    finally:
        beside.close()


def _check_port(port: int) -> None:
    if not 0 <= port <= 65535:
        raise ConfigError(f"{port} is no port for a page: expected a whole number from 0 to 65535")


def _say_url(url: str) -> None:
    print(f"watch it at {url}", flush=True)
