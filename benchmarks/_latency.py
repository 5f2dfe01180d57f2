"""How long each step takes, as its client sees it: timed inside the client processes of a benchmark's job.

The job file calls `watch`; then every step that a client of that process makes is written down, from the beginning of
the head's forward (its wait for the thread that computes included) until both its spills are acknowledged.
"""

from __future__ import annotations

import asyncio
import os
import random
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_RECORD = struct.Struct("dd")
"""Begun and ended, seconds of the machine's monotonic clock, the same for all processes."""
PAUSE_FILE = "pause"
LOOK_S = 0.05
"""How often a process looks up how long its clients are to pause."""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of the time that steps took, in seconds."""

    steps: int
    p50_s: float
    p99_s: float

    @property
    def ratio(self) -> float:
        return self.p99_s / self.p50_s


def job_lines(folder: Path) -> str:
    """What makes a job file have its steps timed."""
    here = str(Path(__file__).parent)
    return f"import sys\nsys.path.insert(0, {here!r})\nimport _latency\n_latency.watch({str(folder)!r})\n"


def set_pause(folder: Path, seconds: float) -> None:
    """Have each client pause before each step, for so long in the mean: random, from nothing to twice that."""
    aside = folder / f"{PAUSE_FILE}.tmp"
    aside.write_text(repr(seconds))
    aside.rename(folder / PAUSE_FILE)


def watch(folder: str) -> None:
    """Time the steps of this process and of those forked from it; a second call changes nothing."""
    from zsfl.client.driver import StepDriver

    if getattr(StepDriver.make, "is_watched", False):
        return
    make, notes = StepDriver.make, _Notes(Path(folder))

    async def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if pause_s := notes.pause_s():
            await asyncio.sleep(pause_s)
        begun_s = time.monotonic()
        step = await make(self, *args, **kwargs)
        notes.write(begun_s, time.monotonic())
        return step

    timed.is_watched = True  # type: ignore[attr-defined]
    StepDriver.make = timed


class _Notes:
    """What one process writes down, unbuffered: a node ends without flushing anything."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pid = self._file = -1
        self._pause_s = self._looked_s = 0.0
        self._random = random.Random()

    def write(self, begun_s: float, ended_s: float) -> None:
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._file = os.open(self._folder / f"{self._pid}.times", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(self._file, _RECORD.pack(begun_s, ended_s))

    def pause_s(self) -> float:
        now_s = time.monotonic()
        if now_s - self._looked_s > LOOK_S:
            self._looked_s = now_s
            try:
                self._pause_s = float((self._folder / PAUSE_FILE).read_text())
            except FileNotFoundError:
                self._pause_s = 0.0
        return self._random.uniform(0.0, 2 * self._pause_s)


def between(folder: Path, begun_s: float, ended_s: float) -> Percentiles:
    """Of the steps that ended in that time, whenever they began; nan where there are none."""
    taken: list[float] = []
    for path in folder.glob("*.times"):
        data = path.read_bytes()
        whole = len(data) - len(data) % _RECORD.size
        taken += [end - begin for begin, end in _RECORD.iter_unpack(data[:whole]) if begun_s <= end <= ended_s]
    taken.sort()
    return Percentiles(len(taken), quantile(taken, 0.5), quantile(taken, 0.99))


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of all is no larger than."""
    if not ordered:
        return float("nan")
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]
