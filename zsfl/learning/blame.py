"""What went wrong in the functions of a job, for whoever wrote them."""

from __future__ import annotations

import traceback
from pathlib import Path

from zsfl.errors import ConfigError


def said_of(error: BaseException) -> str:
    """An error as the person reads it: its own words when it is ours, else with its class."""
    if isinstance(error, ConfigError):
        return str(error)
    return f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"


def line_of(error: BaseException, folder: Path | None) -> str:
    """` (job.py, line 3)`: where it went wrong, the last place in `folder` (None: anywhere)."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    places = [frame for frame in frames if folder is None or Path(frame.filename).parent == folder]
    return f" ({places[-1].filename}, line {places[-1].lineno})" if places else ""
