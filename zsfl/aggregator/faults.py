"""Errors that nobody foresaw while a contribution was read or judged: it is refused for them, and the run goes on."""

from __future__ import annotations

import traceback
from typing import cast

from zsfl.errors import SpillCorrupt, StorageError, ZsflError

MOST_KNOWN = 64
"""Places whose tracebacks are told of, one each: a peer may know many ways to one."""


class Faults:
    """Tells the first error of each place with its traceback."""

    def __init__(self) -> None:
        self._known: set[tuple[str, int]] = set()

    def said(self, error: Exception) -> str:
        """What to refuse a contribution for, or the error again: that of a disk, or of a memory that is full."""
        if isinstance(error, MemoryError) or (isinstance(error, StorageError) and not isinstance(error, SpillCorrupt)):
            raise error
        if isinstance(error, ZsflError):
            return str(error)
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = last.filename, cast(int, last.lineno)
        if place not in self._known and len(self._known) < MOST_KNOWN:
            self._known.add(place)
            traceback.print_exception(error)
        return f"it leads to an error, {type(error).__name__}: {error}"
