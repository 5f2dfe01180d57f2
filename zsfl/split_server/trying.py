"""How much of a split server the test batches of clients get: decisions only.

Steps are of shards whose holders are known; how much a machine has tested, nobody orders. So tests have places of their
own, of which one machine takes half at most of what others leave, and, while steps come, a part of the time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Protocol, TypeVar

from zsfl.errors import Busy

MAX_TESTS = 96
"""Test batches that are taken at once, beside the steps; of a server with few slots half as many as those."""
MAX_TEST_BYTES = 1 << 28
"""Of those test batches; a longer one is taken when no other is there."""
STEPS_TO_TESTS = 2
"""For so many times as long as a test took no other begins, unless steps need the server less."""
RETRY_AFTER_S = 0.05
"""At least: each try brings its tensors along. Else as long as those that wait may take."""


class _Test(Protocol):
    @property
    def peer(self) -> str: ...


_T = TypeVar("_T", bound=_Test)


class HeldOutShare:
    """Which test batches are taken, and which goes through the body when."""

    def __init__(self, slots: int) -> None:
        self._most = max(1, min(MAX_TESTS, slots // 2))
        self._taken, self._bytes = Counter[str](), Counter[str]()
        """By peer."""
        self._spent_s: dict[str, float] = {}
        """Of the body, by peer: whose is least goes next. Who had nothing tested saves up no time by that."""
        self._least_s = 0.0
        """What the peer had spent that was chosen last."""
        self._stepped = True
        """A step came since the last test began."""
        self._is_quiet = False
        """None had come between that one and the test before."""
        self._ended_s, self._took_s = -math.inf, 0.0

    def enter(self, peer: str, size_bytes: int) -> None:
        """Take a test batch of a peer; Busy where it, or all together, have as many here as they may."""
        taken, mine = self._taken.total(), self._taken[peer]
        if taken and (taken >= self._most or mine >= max(1, (self._most - taken + mine) // 2)):
            raise Busy(f"{taken} test batches wait here, {mine} of them yours; ask another", self._retry_after_s)
        held, my_bytes = self._bytes.total(), self._bytes[peer]
        room = MAX_TEST_BYTES - held + my_bytes
        if taken and my_bytes + size_bytes > (room // 2 if mine else room):
            said = f"{held} bytes of test batches wait here, {my_bytes} of them yours; ask another"
            raise Busy(said, self._retry_after_s)
        self._taken[peer] += 1
        self._bytes[peer] += size_bytes

    def leave(self, peer: str, size_bytes: int) -> None:
        """It is answered, or taken back."""
        self._taken[peer] -= 1
        self._bytes[peer] -= size_bytes
        if not self._taken[peer]:
            del self._taken[peer], self._bytes[peer]

    def stepped(self) -> None:
        """A step is here."""
        self._stepped = True

    @property
    def _retry_after_s(self) -> float:
        return max(RETRY_AFTER_S, self._took_s * self.count)

    @property
    def count(self) -> int:
        """Those that are here."""
        return self._taken.total()

    @property
    def due_s(self) -> float:
        """From when on a test may go before steps that wait."""
        # Where no step came for as long as they had been waited for, nobody trains: tests follow one another at once.
        return self._ended_s + (0.0 if self._is_quiet and not self._stepped else STEPS_TO_TESTS * self._took_s)

    def begun(self, waiting: Iterable[_T]) -> _T:
        """Which of those that wait goes next, in the order of peers by what they spent."""
        chosen = min(waiting, key=lambda one: max(self._spent_s.get(one.peer, 0.0), self._least_s))
        self._least_s = max(self._spent_s.get(chosen.peer, 0.0), self._least_s)
        self._spent_s = {peer: spent_s for peer, spent_s in self._spent_s.items() if spent_s > self._least_s}
        self._is_quiet, self._stepped = not self._stepped, False
        return chosen

    def ended(self, peer: str, took_s: float, now_s: float) -> None:
        """One that was chosen is done."""
        self._spent_s[peer] = self._least_s + took_s
        self._ended_s, self._took_s = now_s, took_s
