"""Every benchmark of the lot, one after the other, and one table of what they found: what `make bench` runs.

    ZSFL_DATA=... python benchmarks/run.py
    python benchmarks/run.py startup transport

A file belongs to the lot when it states BUDGET_S, the seconds after which it is stopped. IN_THE_LOT, where a file
states it, are its arguments here: a shorter form of what it does by itself. All budgets together are under ten minutes.
"""

from __future__ import annotations

import argparse
import ast
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from _figures import Handed, shown, spread, taken
from _record import ROOT, circumstances, table, write

FOLDER = Path(__file__).resolve().parent
LOT_S = 600
"""What all budgets together must stay within."""
GOODBYE_S = 10.0
"""How long a benchmark that was told to stop may take to do so."""
NO_BENCHMARKS = ("run", "compare")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One benchmark and what its file says about the lot."""

    path: Path
    budget_s: float | None
    """None: it is not of the lot."""
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one benchmark."""

    entry: Entry
    seconds: float
    handed: Handed | None
    failure: str | None


def entries(folder: Path) -> list[Entry]:
    """All benchmarks of a folder, by name. Their files are read, not run."""
    paths = [path for path in sorted(folder.glob("[a-z]*.py")) if path.stem not in NO_BENCHMARKS]
    return [_entry(path) for path in paths]


def _entry(path: Path) -> Entry:
    stated: dict[str, Any] = {}
    for line in ast.parse(path.read_text(encoding="utf-8"), str(path)).body:
        match line:
            case ast.Assign(targets=[ast.Name(id="BUDGET_S" | "IN_THE_LOT" as name)], value=value):
                stated[name] = ast.literal_eval(value)
            case _:
                pass
    return Entry(path=path, budget_s=stated.get("BUDGET_S"), arguments=stated.get("IN_THE_LOT", ()))


def run(entry: Entry, limit_s: float) -> Outcome:
    """Run one benchmark; after `limit_s` it and all that it started are stopped."""
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="zsfl-bench-") as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, str(entry.path), *entry.arguments, "--json", str(file)]
        print(f"+ {shlex.join(command[:-2])}", flush=True)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=env, start_new_session=True)
        try:
            code = process.wait(limit_s)
            failure = f"ended with exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            failure = f"stopped after {limit_s:g} s, its budget"
        finally:
            _end(process)
        handed = None
        if failure is None:
            try:
                handed = taken(file)
            except (OSError, ValueError) as error:
                failure = f"handed over no figures: {error}"
    return Outcome(entry=entry, seconds=time.monotonic() - begun_s, handed=handed, failure=failure)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that is still there, and whatever is left of its group."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(GOODBYE_S)
            except subprocess.TimeoutExpired:
                continue
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def page(outcomes: Sequence[Outcome]) -> str:
    """The one table."""
    rows: list[list[str]] = []
    for outcome in outcomes:
        name = outcome.entry.path.stem
        if outcome.handed is None:
            rows.append([name, outcome.failure or "", "", "", "", "", ""])
            continue
        for one in outcome.handed.figures:
            if one.headline:
                aim = "" if one.target is None else f"{'>=' if one.better == 'higher' else '<='} {shown(one.target)}"
                met = {True: "yes", False: "NO", None: ""}[one.met]
                rows.append([name, one.name, shown(one.median), one.unit, spread(one.values), aim, met])
    return table(["benchmark", "figure", "median", "unit", "lowest to highest", "target", "met"], rows)


def main(argv: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """Run the lot, print the table, keep it; 1 when a benchmark did not come to its end."""
    args = _parse(argv)
    known = entries(folder)
    if unknown := set(args.names) - {entry.path.stem for entry in known}:
        print(f"no benchmark {min(unknown)!r}: use {', '.join(entry.path.stem for entry in known)}", file=sys.stderr)
        return 2
    asked = [one for one in known if (one.path.stem in args.names if args.names else one.budget_s is not None)]
    about, begun_s = circumstances(), time.monotonic()
    outcomes = [run(entry, entry.budget_s or LOT_S) for entry in asked]
    found = page(outcomes)
    left_out = [one.path.name for one in known if one not in asked and one.budget_s is None]
    if left_out:
        found += f"\n\nNot of the lot, as they take longer: {', '.join(left_out)}; run them by themselves."
    failed = [outcome for outcome in outcomes if outcome.failure]
    kept = {"benchmarks": [msgspec.to_builtins(outcome.handed) for outcome in outcomes if outcome.handed]}
    where = write("all", about, kept, found)
    print(f"\n{found}\n\n{time.monotonic() - begun_s:.0f} s in all; kept in {where}")
    for outcome in failed:
        print(f"benchmarks/{outcome.entry.path.name} {outcome.failure}", file=sys.stderr)
    return 1 if failed else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: the lot)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
