"""Waiting aloud: what a node waits for, and when to say so."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from zsfl.errors import NO_DESCRIPTORS, StorageError, StoreAway, lacks_descriptors

_Result = TypeVar("_Result")
FIRST_WORD_S = 3.0
"""A wait shorter than this is not worth a word: on a busy machine a normal start takes as long."""
LOOK_S = 0.5
"""How often to look whether a wait has become worth one."""
LONELY_S = 10.0
"""After so long a wait the node says what to check, and again each time as long has passed."""


@dataclass(slots=True, eq=False)
class _Wait:
    what: str | Callable[[], str]
    since_s: float
    due_s: float
    hints: Callable[[], tuple[str, ...]] | None


@dataclass(frozen=True, slots=True)
class Overdue:
    """A wait that is worth a word."""

    what: str
    seconds: float
    lonely: bool
    """So long that it should say what to check."""
    hints: tuple[str, ...] = ()
    """What that is, where whoever waits knows it."""


class Waits:
    """What a node waits for now."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waits: list[_Wait] = []

    @contextmanager
    def waiting(
        self, what: str | Callable[[], str], hints: Callable[[], tuple[str, ...]] | None = None
    ) -> Iterator[None]:
        """While inside, the node waits for `what`; one that is empty is not worth a word yet."""
        now_s = self._clock()
        wait = _Wait(what, now_s, now_s + FIRST_WORD_S, hints)
        self._waits.append(wait)
        try:
            yield
        finally:
            self._waits.remove(wait)

    def now(self) -> list[tuple[str, float]]:
        """All that are worth a word, and how many seconds each has lasted."""
        now_s = self._clock()
        return [(said, now_s - wait.since_s) for wait in self._waits if (said := _said(wait))]

    def overdue(self, now_s: float) -> list[Overdue]:
        """Waits to speak of now: after `FIRST_WORD_S`, then each time `LONELY_S` more have passed."""
        found: list[Overdue] = []
        for wait in self._waits:
            if now_s < wait.due_s or not (said := _said(wait)):
                continue
            waited_s = now_s - wait.since_s
            wait.due_s = wait.since_s + LONELY_S * (waited_s // LONELY_S + 1)
            lonely = waited_s >= LONELY_S
            if said in [one.what for one in found]:  # several things at once may wait for the same
                continue
            found.append(Overdue(said, waited_s, lonely, wait.hints() if lonely and wait.hints else ()))
        return found


def _said(wait: _Wait) -> str:
    return wait.what if isinstance(wait.what, str) else wait.what()


async def stored(write: Callable[[], Awaitable[_Result]]) -> _Result:
    """What is written; StorageError also where no file can be opened, whatever it was for."""
    try:
        return await write()
    except OSError as error:
        if not lacks_descriptors(error):
            raise
        raise StorageError(str(error)) from error


def lacking(refusal: StorageError) -> str:
    """What a node waits for that cannot write, for people."""
    if lacks_descriptors(refusal):
        return f"a file descriptor, as {NO_DESCRIPTORS}"
    return f"{'the store' if isinstance(refusal, StoreAway) else 'a disk'}: {refusal}"
