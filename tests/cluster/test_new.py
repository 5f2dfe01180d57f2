"""What `zsfl new` writes trains as it is, and is in order."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from helpers.processes import finished

from zsfl.dashboard.runs import read_run


async def test_a_new_project_trains_as_it_is(tmp_path: Path) -> None:
    code, new = await finished("new", "first", cwd=tmp_path)
    assert code == 0, new.text
    folder = tmp_path / "first"
    linter = Path(sys.executable).with_name("ruff")
    order = [linter, "check", "--isolated", "--no-cache", "."]
    checked = await asyncio.to_thread(subprocess.run, order, cwd=folder, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    code, up = await finished("up", "job.py", "--rounds", "2", "--no-mdns", cwd=folder)
    assert code == 0, up.text
    run = read_run(folder / "runs" / "first")
    assert (run.state, len(run.rounds)) == ("finished", 2)
    assert run.accuracy is not None
    assert run.accuracy > 0.7
