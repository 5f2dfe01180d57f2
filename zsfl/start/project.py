"""`zsfl new`: a folder with a job that runs as it is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from zsfl.bounds import BESIDE_RUNS
from zsfl.dashboard.runs import all_runs, read_run
from zsfl.errors import ConfigError, StorageError, ZsflError

FILES = {
    "job.py": "what is trained: its model, data and loss are yours to change, and it runs as it is",
    "zsfl.toml": "settings of the nodes that are started here",
    ".gitignore": "leaves runs/ out",
}
IGNORED = ".gitignore"
"""Where a folder has one, it is left alone."""
NAMED = "my-job"
"""What the job is called before it is called after its folder."""


def job_name(folder: Path) -> str:
    """What a job in this folder is called: as the folder is, as far as a job's name allows it."""
    name = re.sub(r"[^a-z0-9]+", "-", folder.absolute().name.lower())[:40].strip("-")
    return NAMED if not name or name in BESIDE_RUNS else name


def begin(folder: Path) -> list[str]:
    """Write the files of a project, and give their names; ConfigError where one of them, or a run, is there already."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: name a folder, one that is not there yet or this one (.)")
    if what := _of_runs(folder):
        raise ConfigError(f"{folder} is the folder of {what}, and no place for a job: name another folder")
    there = [name for name in FILES if (folder / name).exists()]
    if taken := " and ".join(name for name in there if name != IGNORED):
        raise ConfigError(f"{folder} has {taken} already, and nothing is overwritten: name another folder")
    begun, written = Path(__file__).parent, [name for name in FILES if name not in there]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in written:
            text = (begun / name.lstrip(".")).read_text(encoding="utf-8")
            if name == "job.py":
                text = text.replace(f'"{NAMED}"', f'"{job_name(folder)}"')
            with (folder / name).open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise StorageError(f"cannot write {error.filename or folder}: {error.strerror}; name another folder") from error
    return written


def _of_runs(folder: Path) -> str:
    """What this is a folder of; empty where it is none of a run, or of runs."""
    with suppress(ZsflError):
        return f"the run {read_run(folder).name}"
    found = [run.name for run in all_runs(folder)]
    return f"runs ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})" if found else ""


def print_begun(folder: Path, written: Sequence[str]) -> None:
    """What there is now, and how to go on."""
    print(f"{folder}/ has")
    for name, what in FILES.items():
        print(f"  {name:11} {what if name in written else 'that it had before: add a line /runs/ to it'}")
    there = folder.absolute() == Path.cwd()
    print("\nTrain it:" + ("" if there else f"\n  cd {shlex.quote(str(folder))}") + "\n  zsfl up job.py")
