"""Files that are written aside until they are whole: nobody sees half of one, and of who is killed nothing stays.

Whoever writes one holds a lock on it, which ends with its process: what nobody holds is left over, and may go.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

_MARK_BYTES = 4


@contextmanager
def written_aside(path: Path, content: str | bytes, mode: int = 0o600) -> Generator[Path, None, None]:
    """A new file beside `path`, whole and on the disk, to be linked or renamed to it; afterwards it is gone.

    Until it has its `mode` it is nobody else's to read.
    """
    remove_leftovers(path)
    aside, descriptor = _new(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
            yield aside
    finally:
        aside.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove what was written aside for `path` by processes that are gone; those that still write are left alone."""
    name = re.compile(rf"\.{re.escape(path.name)}-[0-9a-f]{{{2 * _MARK_BYTES}}}")
    with suppress(OSError):  # of the folder: whoever goes on to use it says so
        for one in path.parent.iterdir():
            if name.fullmatch(one.name):
                _remove_if_left(one)


def _remove_if_left(aside: Path) -> None:
    with suppress(OSError):  # it is in use (BlockingIOError), or has gone
        descriptor = os.open(aside, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            aside.unlink()
        finally:
            os.close(descriptor)


def _new(path: Path) -> tuple[Path, int]:
    """An empty file that is locked, and its descriptor."""
    while True:
        aside = path.with_name(f".{path.name}-{secrets.token_hex(_MARK_BYTES)}")
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with suppress(BlockingIOError):  # somebody looks at this very moment whether it is left over, and removes it
            _lock(descriptor)
            if os.fstat(descriptor).st_nlink:
                return aside, descriptor
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """BlockingIOError when somebody else holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a disk without locks, where nobody takes anything for left over
        pass
