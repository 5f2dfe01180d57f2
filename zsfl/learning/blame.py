"""What went wrong in the functions of a job, for whoever wrote them."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

from zsfl.errors import ConfigError

_OTHERS = (Path(__file__).parents[1], *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")))
"""Where code lies that is not the user's."""


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


def own_line(error: BaseException) -> str:
    """The same, in the user's own code: the last place outside of Python, of zsfl and of what is installed; empty where
    there is none.
    """
    frames = traceback.extract_tb(error.__traceback__)
    places = [frame for frame in frames if not frame.filename.startswith("<") and not _is_of_others(frame.filename)]
    return f" ({places[-1].filename}, line {places[-1].lineno})" if places else ""


def _is_of_others(filename: str) -> bool:
    return any(Path(filename).is_relative_to(folder) for folder in _OTHERS)
