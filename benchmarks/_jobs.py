"""Job files made from others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

JOBS = Path(__file__).parent / "jobs"


def wrapped(job: Path, folder: Path, changes: Mapping[str, Any]) -> Path:
    """A job file that is `job` with some fields changed to values that their `repr` writes."""
    path = folder / f"{job.stem}_changed.py"
    path.write_text(
        "import dataclasses, pathlib\n"
        "import zsfl\n"
        f"job = dataclasses.replace(zsfl.load_job(pathlib.Path({str(job.absolute())!r})), **{dict(changes)!r})\n"
    )
    return path
