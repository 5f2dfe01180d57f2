"""`zsfl dash`, and the same beside a run that this process starts (`--dash`)."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from zsfl.dashboard.dash import Dash, Place, Started
from zsfl.dashboard.pages import folder_of, where
from zsfl.errors import ConfigError
from zsfl.reports import ADDRESS, AnyReport
from zsfl.settings import NodeSettings, load_settings
from zsfl.wire.door import is_loopback

LOOPBACK = "127.0.0.1"
LEAVE_S = 5.0
"""What the page beside a run may take to end."""


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

    async def serve() -> None:
        dash = Dash(lambda: find_place(run, settings), settings.beat_s, _warn)
        serving, loop = asyncio.ensure_future(dash.run(host, port, token, _say_url)), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, serving.cancel)
        with suppress(asyncio.CancelledError):
            await serving

    asyncio.run(serve())
    return 0


class _Beside:
    """The page beside a run, in a thread with an event loop of its own, so that neither waits for the other."""

    def __init__(self, settings: NodeSettings, port: int) -> None:
        self._started = Started(settings)
        self._port = port
        self._opened = Future[str]()
        self._dash: Dash
        self._loop: asyncio.AbstractEventLoop
        self._ended: asyncio.Event
        self._thread = threading.Thread(target=self._run, name="zsfl-dash", daemon=True)

    def open(self) -> str:
        """The page's address, once it is served."""
        self._thread.start()
        return self._opened.result()

    def close(self) -> None:
        """End the page, unless it has ended."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(LEAVE_S)

    def tell(self, report: AnyReport) -> None:
        """What the nodes report."""
        self._started.take(report)
        with suppress(RuntimeError):  # the page has ended
            self._loop.call_soon_threadsafe(self._dash.tell, report)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:
            if self._opened.done():
                _warn(f"the page has ended: {error}")
            else:
                self._opened.set_exception(error)

    async def _serve(self) -> None:
        settings = self._started.settings
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        self._dash = Dash(self._started.find, settings.beat_s, lambda _: None)
        serving = asyncio.ensure_future(self._dash.run(LOOPBACK, self._port, "", self._opened.set_result))
        ended = asyncio.ensure_future(self._ended.wait())
        await asyncio.wait({serving, ended}, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving


@contextmanager
def watched(flags: Mapping[str, Any]) -> Generator[Callable[[AnyReport], None], None, None]:
    """Where the flags ask for it, a page beside a run; what is yielded is to be told all that the nodes report."""
    if not flags["dash"]:
        yield lambda _: None
        return
    _check_port(flags["dash_port"])
    beside = _Beside(load_settings(flags, os.environ), flags["dash_port"])
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


def _warn(message: str) -> None:
    print(f"zsfl: {message}", file=sys.stderr, flush=True)
