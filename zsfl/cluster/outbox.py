"""What a fork server tells whoever started it, who may be stopped and read nothing: no node waits for that."""

from __future__ import annotations

import os
from collections import deque

import msgspec

from zsfl.cluster.talk import Printed
from zsfl.reports import Before, Following, Met, Note, Report, RoundReport, Tested, Waiting, WindowReport

MOST_WAITING_BYTES = 16 << 20
"""Beyond that lines are dropped until half of it is left."""
_SHOWN = (Printed, WindowReport, Following, Tested, Waiting, Note, Met, Before)
"""They are for people alone: what is newer says more."""


class Outbox:
    """A pipe that is written to as far as it takes something; the rest waits, and too much of it is dropped.

    What becomes of nodes is never dropped, rounds only after everything else; how much was dropped is told.
    """

    def __init__(self, pipe: int) -> None:
        os.set_blocking(pipe, False)
        self.pipe = pipe
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        """Of those lines."""
        self._rest = b""
        """Of the line that is under way."""
        self._dropped = 0

    @property
    def waits(self) -> bool:
        """Whether something could not be written yet."""
        return bool(self._rest or self._lines)

    def report(self, report: Report) -> None:
        """One line more."""
        self.write(msgspec.json.encode(report) + b"\n")

    def write(self, lines: bytes) -> None:
        """Whole lines more; those that come first leave first."""
        for line in lines.split(b"\n")[:-1]:
            self._lines.append(line + b"\n")
            self._bytes += len(line) + 1
        self.flush()
        if self._bytes > MOST_WAITING_BYTES:
            self._drop(_SHOWN)
            if self._bytes > MOST_WAITING_BYTES:
                self._drop((RoundReport,))

    def flush(self) -> None:
        """Write what the pipe takes now; all is forgotten where nobody can read it any more."""
        try:
            while self.waits:
                self._rest = self._rest or self._next()
                self._rest = self._rest[os.write(self.pipe, self._rest) :]
        except BlockingIOError:
            pass
        except OSError:  # the nodes must be ended all the same
            self._lines.clear()
            self._bytes, self._rest = 0, b""

    def _next(self) -> bytes:
        if self._dropped:
            said = f"nobody read what is told here for a while: {self._dropped} lines of it were dropped"
            self._dropped = 0
            return msgspec.json.encode(Note(message=said, level="warning")) + b"\n"
        line = self._lines.popleft()
        self._bytes -= len(line)
        return line

    def _drop(self, kinds: tuple[type[Report], ...]) -> None:
        """The oldest of these kinds, until half is free."""
        beginnings = tuple(f'{{"event":"{kind.__struct_config__.tag}"'.encode() for kind in kinds)
        kept: deque[bytes] = deque()
        for line in self._lines:
            if self._bytes > MOST_WAITING_BYTES // 2 and line.startswith(beginnings):
                self._bytes -= len(line)
                self._dropped += 1
            else:
                kept.append(line)
        self._lines = kept
