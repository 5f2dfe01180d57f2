"""Waiting aloud: what a node waits for, and when to say so."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

FIRST_WORD_S = 1.0
"""A wait shorter than this is not worth a word."""
LONELY_S = 10.0
"""After so long a wait the node says what to check, and again each time as long has passed."""


@dataclass(slots=True, eq=False)
class _Wait:
    what: str | Callable[[], str]
    since_s: float
    due_s: float


@dataclass(frozen=True, slots=True)
class Overdue:
    """A wait that is worth a word."""

    what: str
    seconds: float
    lonely: bool
    """So long that it should say what to check."""


class Waits:
    """What a node waits for now."""

    def __init__(self) -> None:
        self._waits: list[_Wait] = []

    @contextmanager
    def waiting(self, what: str | Callable[[], str]) -> Iterator[None]:
        """While inside, the node waits for `what`."""
        now_s = time.monotonic()
        wait = _Wait(what, now_s, now_s + FIRST_WORD_S)
        self._waits.append(wait)
        try:
            yield
        finally:
            self._waits.remove(wait)

    def overdue(self, now_s: float) -> list[Overdue]:
        """Waits to speak of now; each again after `LONELY_S`."""
        found: list[Overdue] = []
        for wait in self._waits:
            if now_s < wait.due_s:
                continue
            lonely = now_s - wait.since_s >= LONELY_S
            wait.due_s = (wait.due_s if lonely else wait.since_s) + LONELY_S
            what = wait.what if isinstance(wait.what, str) else wait.what()
            found.append(Overdue(what, now_s - wait.since_s, lonely))
        return found
