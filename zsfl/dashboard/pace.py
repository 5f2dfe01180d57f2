"""How long a run goes on, by its pace as somebody sees it who may have come when most of it was done."""

from __future__ import annotations

from collections import deque

PACE_S = 60.0
"""The pace of a run is that of the last so many seconds."""


class Pace:
    """Of what is seen alone; `now_s` is monotonic."""

    def __init__(self) -> None:
        self._done: float | None = None
        self._marks: deque[tuple[float, float]] = deque()
        """When, and how many rounds were done, whenever that changed in the last seconds, and once before.

        What was seen first is none: since when so many were done is not known.
        """

    def see(self, done: float, now_s: float) -> None:
        """So many rounds are done, the present one as a fraction."""
        if self._done is not None and done < self._done:  # a resume went back, or it is another run
            self._done = None
            self._marks.clear()
        if self._done is not None and done > self._done:
            self._marks.append((now_s, done))
        self._done = done
        while len(self._marks) > 2 and self._marks[1][0] <= now_s - PACE_S:
            self._marks.popleft()

    def left_s(self, rounds: float, now_s: float) -> float | None:
        """Seconds until so many are done; None while no pace was seen."""
        if len(self._marks) < 2:
            return None
        (first_s, first), (last_s, last) = self._marks[0], self._marks[-1]
        if last_s <= first_s:
            return None
        return max(0.0, (rounds - last) * (last_s - first_s) / (last - first) - (now_s - last_s))
