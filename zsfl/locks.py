"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from zsfl.errors import ConfigError

LOCK = ".lock"


def lock_folder(folder: Path, otherwise: str) -> int:
    """The descriptor that holds the lock of an existing folder; ConfigError `otherwise` when somebody else has it.

    The kernel lets go of it when the process ends, however it ends.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(f"another process uses {folder} (it holds {folder / LOCK}); {otherwise}") from None
    return descriptor
