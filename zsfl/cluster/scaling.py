"""How many split servers there are to be, by what they have to do: decisions only."""

from __future__ import annotations

from collections import deque
from typing import Literal

MANY = 3.0
"""Requests that each server holds, on average: more servers are worth it from there on."""
FEW = 1.5
"""What each of those that stay may hold when one leaves: well below, or the next moment would bring it back."""
MORE_AFTER_S = 4.0
"""What lasts shorter is a burst."""
FEWER_AFTER_S = 60.0
"""A server that is started again takes longer than one that idles costs."""


class Scaling:
    """Takes in what split servers hold, as their heartbeats say it; times are by the monotonic clock."""

    def __init__(
        self, least: int, most: int, *, more_after_s: float = MORE_AFTER_S, fewer_after_s: float = FEWER_AFTER_S
    ) -> None:
        self._least = least
        self._most = most
        self._more_after_s = more_after_s
        self._fewer_after_s = fewer_after_s
        self._seen: deque[tuple[float, int]] = deque()
        """When, and what all of them held, since their number last changed."""
        self._servers = 0

    def decide(self, servers: int, held: int, now_s: float) -> Literal["more", "fewer", "stay"]:
        """What is to be done where so many servers hold so many requests."""
        if servers != self._servers:
            self._servers = servers
            self._seen.clear()
        self._seen.append((now_s, held))
        while self._seen[0][0] < now_s - self._fewer_after_s:
            self._seen.popleft()
        if servers < self._least:
            return "more"
        if servers > self._most:
            return "fewer"
        late = self._mean(now_s, self._more_after_s)
        if servers < self._most and late is not None and late >= MANY * servers:
            return "more"
        long = self._mean(now_s, self._fewer_after_s)
        if servers > self._least and long is not None and long <= FEW * (servers - 1):
            return "fewer"
        return "stay"

    def _mean(self, now_s: float, span_s: float) -> float | None:
        """What all held in the last so many seconds; None where less than most of them have been seen."""
        held = [held for at_s, held in self._seen if at_s >= now_s - span_s]
        if len(held) < 2 or now_s - self._seen[0][0] < 0.9 * span_s:
            return None
        return sum(held) / len(held)
