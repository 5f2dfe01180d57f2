"""Reads a file of lines while others append to it. Everything here blocks: call it in a thread."""

from __future__ import annotations

import os
from pathlib import Path

CHUNK_BYTES = 1 << 22
"""Read at once; a longer line is passed over."""


class Tail:
    """The lines of one file, each once; a file that was replaced, or cut, is begun again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        """Device and inode."""
        self._offset = 0
        self._is_in_long_line = False

    def read(self) -> tuple[list[bytes], bool, bool]:
        """Whole lines that are new, whether the file is another than before, and whether there is more to read.

        A file that is not there, or not to be read, has none.
        """
        try:
            with self._path.open("rb") as file:
                about = os.fstat(file.fileno())
                begins = (about.st_dev, about.st_ino) != self._file or about.st_size < self._offset
                if begins:
                    begins = self._file is not None
                    self._file, self._offset, self._is_in_long_line = (about.st_dev, about.st_ino), 0, False
                file.seek(self._offset)
                chunk = file.read(CHUNK_BYTES)
                return self._lines(chunk), begins, len(chunk) == CHUNK_BYTES
        except OSError:
            began, self._file, self._offset = self._file is not None, None, 0
            return [], began, False

    def _lines(self, chunk: bytes) -> list[bytes]:
        end = chunk.rfind(b"\n") + 1
        if not end:
            if len(chunk) == CHUNK_BYTES:
                self._is_in_long_line = True
                self._offset += len(chunk)
            return []
        self._offset += end
        lines = chunk[:end].split(b"\n")[:-1]
        if self._is_in_long_line:
            del lines[0]
            self._is_in_long_line = False
        return lines
