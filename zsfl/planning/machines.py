"""A clock that stands still between events, and what takes time: processors, threads and links."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Any

Do = Callable[..., object]


class Clock:
    """Events in the order of their times; those of one time in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.events = 0
        self._is_stopped = False
        self._due: list[tuple[float, int, Do, tuple[Any, ...]]] = []
        self._asked = 0

    def at(self, when_s: float, do: Do, *given: Any) -> None:
        """Have something done, now at the earliest."""
        self._asked += 1
        heapq.heappush(self._due, (max(when_s, self.now_s), self._asked, do, given))

    def run(self, most_events: int) -> None:
        """One event after the other, while there are any, so many at most, or until `stop`."""
        due = self._due
        while due and not self._is_stopped and self.events < most_events:
            self.now_s, _, do, given = heapq.heappop(due)
            self.events += 1
            do(*given)

    def stop(self) -> None:
        """No further event is due."""
        self._is_stopped = True


class Cores:
    """The processors of one machine, equally shared by those who compute at the moment."""

    def __init__(self, clock: Clock, cores: float) -> None:
        self._clock, self._cores = clock, cores
        self._running: list[tuple[float, int, Do]] = []
        """By how much each of those who run will have had when this one is done."""
        self._had_s = self._at_s = self.busy_s = 0.0
        self._asked = self._turn = 0

    def use(self, cpu_s: float, then: Do) -> None:
        """`then` once so much was computed."""
        self._go_on()
        self._asked += 1
        heapq.heappush(self._running, (self._had_s + cpu_s, self._asked, then))
        self._plan()

    def _go_on(self) -> None:
        """What was computed since the last look."""
        passed_s, count = self._clock.now_s - self._at_s, len(self._running)
        self._at_s = self._clock.now_s
        if count:
            self._had_s += passed_s * min(1.0, self._cores / count)
            self.busy_s += passed_s * min(self._cores, count)

    def _plan(self) -> None:
        self._turn += 1
        if self._running:
            each = min(1.0, self._cores / len(self._running))
            left_s = max(0.0, self._running[0][0] - self._had_s)
            self._clock.at(self._clock.now_s + left_s / each, self._end, self._turn)

    def _end(self, turn: int) -> None:
        if turn != self._turn:  # others came meanwhile, and it takes longer
            return
        self._go_on()
        _, _, then = heapq.heappop(self._running)
        self._plan()
        then()


class Lane:
    """A node's thread: one thing after the other."""

    def __init__(self, clock: Clock, cores: Cores | None) -> None:
        self._clock, self._cores = clock, cores
        self._waiting: deque[tuple[float, float, Do, tuple[Any, ...]]] = deque()
        self._is_busy = False
        self.busy_s = 0.0
        """What it had to do so far, without the wait for a processor."""

    def do(self, cpu_s: float, then: Do, *given: Any, held_s: float = 0.0) -> None:
        """`then` once the processor has computed for so long, and the thread waited for a device for so long."""
        self._waiting.append((cpu_s, held_s, then, given))
        if not self._is_busy:
            self._next()

    def _next(self) -> None:
        cpu_s, held_s, then, given = self._waiting.popleft()
        self._is_busy = True
        self.busy_s += cpu_s + held_s
        if self._cores is None:
            self._clock.at(self._clock.now_s + cpu_s + held_s, self._end, then, given)
        elif held_s:
            self._cores.use(cpu_s, lambda: self._clock.at(self._clock.now_s + held_s, self._end, then, given))
        else:
            self._cores.use(cpu_s, lambda: self._end(then, given))

    def _end(self, then: Do, given: tuple[Any, ...]) -> None:
        self._is_busy = False
        then(*given)
        if self._waiting and not self._is_busy:
            self._next()


class Port:
    """Where a node is plugged in: what it sends and what it is sent, each one after the other."""

    __slots__ = ("_in_free_s", "_out_free_s", "in_busy_s", "out_busy_s", "rate")

    def __init__(self, bytes_per_s: float) -> None:
        self.rate = bytes_per_s
        self._out_free_s = self._in_free_s = self.out_busy_s = self.in_busy_s = 0.0

    def send(self, clock: Clock, to: Port, size_bytes: float, latency_s: float, then: Do, *given: Any) -> None:
        """`then` once all of it is there. It streams: the slower of the two ends says how long it takes."""
        takes_s = size_bytes / self.rate
        start_s = max(clock.now_s, self._out_free_s)
        self._out_free_s = start_s + takes_s
        self.out_busy_s += takes_s
        if start_s > clock.now_s:  # it takes no room at the other end before it has begun
            clock.at(start_s, to._take, clock, size_bytes, self._out_free_s, latency_s, then, given)
        else:
            to._take(clock, size_bytes, self._out_free_s, latency_s, then, given)

    def _take(
        self, clock: Clock, size_bytes: float, sent_s: float, latency_s: float, then: Do, given: tuple[Any, ...]
    ) -> None:
        takes_s = size_bytes / self.rate
        self._in_free_s = max(clock.now_s, self._in_free_s) + takes_s
        self.in_busy_s += takes_s
        clock.at(max(sent_s, self._in_free_s) + latency_s, then, *given)
