"""What all viewers of a page are sent, encoded once for all of them. No sockets here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import NamedTuple

import msgspec

from zsfl.dashboard.history import History, Mark


class Has(NamedTuple):
    """What a viewer has been sent."""

    serial: int = -1
    mark: Mark | None = None


class Hub:
    """The newest snapshot, and how a viewer gets from what it has to what there is.

    Nothing is kept for a viewer: one that is slow misses snapshots, and is sent the whole history once it is further
    behind than the last addition to it.
    """

    def __init__(self, history: History) -> None:
        self._history = history
        self._live = b""
        self._at, self._before = history.mark, history.mark
        self._added = b""
        self._whole = b""
        self._serial = 0
        self._news = asyncio.Event()
        self.viewers = 0
        self.on_viewer: Callable[[], object] = lambda: None
        """Called when somebody comes."""

    @contextmanager
    def viewer(self) -> Generator[None, None, None]:
        """While inside, there is one viewer more."""
        self.viewers += 1
        self.on_viewer()
        try:
            yield
        finally:
            self.viewers -= 1

    def forget(self) -> None:
        """Show nothing until the next snapshot."""
        self._live = b""

    def publish(self, live: object) -> None:
        """Show this from now on, and the history as it stands."""
        self._live = _event("live", live)
        mark = self._history.mark
        if mark != self._at:
            rows = self._history.since(self._at)
            self._added = b"" if rows is None else _event("more", rows)
            self._before, self._at, self._whole = self._at, mark, b""
        self._serial += 1
        self._news.set()
        self._news = asyncio.Event()

    def follow(self, history: History) -> None:
        """Show another history with the next snapshot."""
        self._history = history
        self._at = self._before = Mark(-1, 0, 0)
        self._added = self._whole = b""

    async def next(self, has: Has) -> tuple[bytes, Has]:
        """What to send to a viewer that has so much, as soon as there is anything, and what it has then."""
        while has.serial == self._serial or not self._live:
            await self._news.wait()
        now = Has(self._serial, self._at)
        if has.mark == self._at:
            return self._live, now
        if has.mark == self._before and self._added:
            return self._added + self._live, now
        self._whole = self._whole or _event("history", self._history.whole())
        return self._whole + self._live, now


def _event(name: str, value: object) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(value) + b"\n\n"
