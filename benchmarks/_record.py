"""What every benchmark writes down beside its figures, and where."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
USUAL = ROOT / "benchmarks" / "results"
RESULTS = Path(os.environ.get("ZSFL_RESULTS") or USUAL)
"""Where results are kept."""


def circumstances() -> dict[str, Any]:
    """Command, commit, versions and machine: what it takes to run the same thing again."""
    packages = ("zsfl", "torch", "numpy", "pyzmq", "safetensors", "lz4")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *_arguments()]),
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "load before": round(os.getloadavg()[0], 2),
        },
    }


def _arguments() -> list[str]:
    """What was asked, as it can be asked again from the root of the tree; --json only says where figures went."""
    program = Path(sys.argv[0]).absolute()
    words = [str(program.relative_to(ROOT)) if program.is_relative_to(ROOT) else program.name, *sys.argv[1:]]
    if "--json" in words:
        del words[words.index("--json") : words.index("--json") + 2]
    return words


def path_of(name: str, about: Mapping[str, Any], kind: str) -> Path:
    """results/DATE-name.kind, in a folder that is there."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    return RESULTS / f"{about['date'][:10]}-{name}.{kind}"


def write(name: str, about: Mapping[str, Any], figures: Mapping[str, Any], page: str) -> Path:
    """Keep the figures as results/DATE-name.json, and the page for people beside it as .md."""
    path = path_of(name, about, "json")
    path.write_text(json.dumps({**about, **figures}, indent=2) + "\n", encoding="utf-8")
    machine = about["machine"]
    footer = (
        f"`{about['command']}` at commit {about['commit']}, {machine['processor']}, {machine['cores']} cores, "
        f"load {machine['load before']} before it began, "
        f"{', '.join(f'{package} {number}' for package, number in about['versions'].items())}"
    )
    path.with_suffix(".md").write_text(f"# {name}, {about['date'][:10]}\n\n{page}\n\n{footer}\n", encoding="utf-8")
    if RESULTS == USUAL:
        print("\nThese results are in the source tree: ZSFL_RESULTS=FOLDER keeps those of a casual run elsewhere.")
    return path


def in_short(values: Sequence[float], form: str = "{:,.0f}") -> str:
    """Median, lowest and highest: `12 (10 to 13)`."""
    middle, low, high = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns, readable as it stands."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [head, ["-" * (width - 1) + ":" for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _commit() -> str:
    """The commit of the working tree, with + when it has been changed since."""
    if (code := find_spec("zsfl")) is None or not Path(code.origin or "").is_relative_to(ROOT):
        return f"unknown: zsfl is imported from {code and code.origin}, not from the tree of this benchmark"
    try:
        said = [
            subprocess.run(["git", *order], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for order in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said[0] + ("+" if said[1] else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
