"""What `zsfl new` writes trains as it is, and is in order."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from helpers.processes import command, finished

from zsfl.dashboard.runs import read_run

LOADS = "import sys; from zsfl.__main__ import main; code = main(); print('torch' in sys.modules); sys.exit(code)"
"""The command, which says at its end whether it has loaded torch."""


async def test_a_new_project_trains_as_it_is(tmp_path: Path) -> None:
    code, new = await finished("new", "first", cwd=tmp_path)
    assert code == 0, new.text
    folder = tmp_path / "first"
    linter = Path(sys.executable).with_name("ruff")
    order = [linter, "check", "--isolated", "--no-cache", "."]
    checked = await asyncio.to_thread(subprocess.run, order, cwd=folder, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    async with command("up", "job.py", "--rounds", "2", "--no-mdns", cwd=folder, run=("-c", LOADS)) as up:
        assert await up.ended() == 0, up.text
    assert up.out[-1] == "False\n", "whoever shows the run loads no torch; the processes that train do"
    run = read_run(folder / "runs" / "first")
    assert (run.state, len(run.rounds)) == ("finished", 2)
    assert run.accuracy is not None
    assert run.accuracy > 0.7
