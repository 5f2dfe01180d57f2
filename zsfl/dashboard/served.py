"""Who served whom over all rounds of a run, in as much memory as a few rounds take."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

Serving = Mapping[str, Mapping[str, int]]
"""Client name to split-server name to steps."""
KEPT_ROUNDS = 30
"""After a kill some rounds are told again; earlier ones than these are not, and are added up."""


class Served:
    """Told of one round after another, adds them up."""

    def __init__(self) -> None:
        self._last: dict[int, Serving] = {}
        """By round."""
        self._earlier: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._span = (0, 0)
        """The first round that is added up there, and the last; 0 where there is none."""

    def add(self, round_: int, serving: Serving) -> None:
        """That is what it was in this round, whatever was told of it before."""
        if round_ > self._span[1]:
            self._last[round_] = serving
        while len(self._last) > KEPT_ROUNDS:
            oldest = min(self._last)
            for client, servers in self._last.pop(oldest).items():
                self._earlier[client].update(servers)
            self._span = self._span[0] or oldest, oldest

    @property
    def all(self) -> tuple[Serving, ...]:
        """To be added up."""
        return self._earlier, *self._last.values()

    @property
    def rounds(self) -> tuple[int, int] | None:
        """The first one and the last; None where there is none."""
        return (self._span[0] or min(self._last), max(self._last)) if self._last else None
