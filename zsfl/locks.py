"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from zsfl.errors import ConfigError

LOCK = ".lock"
LOOKS, LOOK_S = 5, 0.01
"""How often, and after what pause, to see whether it was somebody's look that held the lock."""


def lock_folder(folder: Path, otherwise: str) -> int:
    """The descriptor that holds the lock of an existing folder; ConfigError `otherwise` when somebody else has it.

    The kernel lets go of it when the process ends, however it ends.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    for _ in range(LOOKS):
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        time.sleep(LOOK_S)
    os.close(descriptor)
    raise ConfigError(f"another process uses {folder} (it holds {folder / LOCK}); {otherwise}")


def is_locked(folder: Path) -> bool:
    """Whether some process uses a folder; whoever wants to lock it meanwhile is not kept from it."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
