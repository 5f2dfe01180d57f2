"""Memory for what is long and comes again and again, like weights: used anew once nobody looks at it any more.

Pages that a process gets for the first time are cleared by the system, which takes four times as long as to copy into
pages that it has. What `memory` hands out is free again when the last view of it is gone, by counting references.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

KEPT_BYTES = 256 << 20
"""Of memory that nobody looks at, no more than this is kept for later."""
RECYCLED_BYTES = 1 << 20
"""Shorter pieces are left to the system, which keeps them by itself."""
_UNUSED = 2
"""References to something that only a list has: the list's, and that of asking."""

_MALLOPT = {-3: 32 << 20, -1: KEPT_BYTES, -2: 64 << 20}
"""M_MMAP_THRESHOLD, the most it may be: what is longer goes back to the system once it is freed. M_TRIM_THRESHOLD: so
much may lie idle at the end of the main heap. M_TOP_PAD, as long as a heap of another thread, which so is kept."""

_lock = threading.Lock()
_pieces: list[np.ndarray[Any, Any]] = []


@functools.cache
def keep_freed() -> None:
    """Have the C library use again what this process frees, ZeroMQ's frames first of all.

    By itself glibc gives much of that back, to get it anew for the next message. The price: a process keeps as much as
    its threads once needed at the same time, blocks of 32 MiB and more left out. Other C libraries do what they do.
    """
    with suppress(OSError, TypeError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _MALLOPT.items():
            mallopt(option, value)


def memory(size: int, rather: int = 0) -> memoryview:
    """So many bytes, writable; what they hold is anybody's guess. `rather` as many, where they are at hand."""
    import numpy as np  # not at the top: it takes a tenth of a second, and only long messages need it

    if max(size, rather) < RECYCLED_BYTES:
        return np.empty(size, np.uint8).data
    with _lock:
        found = _idle(rather) if rather else None
        if found is None:
            found = _idle(size)
        if found is None:
            found = np.empty(size, np.uint8)
            _pieces.append(found)
        return found.data


def _idle(size: int) -> np.ndarray[Any, Any] | None:
    """A piece of this size that nobody looks at; those of other sizes go where there are too many."""
    idle_bytes, found = 0, -1
    for number in range(len(_pieces) - 1, -1, -1):
        if sys.getrefcount(_pieces[number]) != _UNUSED:
            continue
        if found < 0 and _pieces[number].nbytes == size:
            found = number
            continue
        idle_bytes += _pieces[number].nbytes
        if idle_bytes > KEPT_BYTES:
            del _pieces[number]
            found -= found > number
    return None if found < 0 else _pieces[found]
