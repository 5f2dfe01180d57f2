"""One benchmark at two commits, in turn in the same environment: what has become faster or slower, and how surely.

    python benchmarks/compare.py transport main~5 main
    python benchmarks/compare.py transport main~5 main --times 3 -- --only bare_zmq --kib 16 1024 --repeat 3

What follows `--` is passed on to the benchmark. Both commits are measured by the benchmarks of the working tree, so
that only zsfl differs; with --own-code each by its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from _figures import Figure, shown, taken
from _record import ROOT, table

TIMES = 5
LIMIT_S = 600
"""For one run of a benchmark."""


class Failed(Exception):
    """The comparison cannot be made; the message says why."""


@contextmanager
def checked_out(commit: str, root: Path, *, own_code: bool) -> Iterator[Path]:
    """A temporary worktree at `commit`, with the present benchmarks unless it is to use its own."""
    with tempfile.TemporaryDirectory(prefix="zsfl-compare-") as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(root), "worktree"]
        added = subprocess.run([*git, "add", "--detach", str(tree), commit], capture_output=True, text=True)
        if added.returncode:
            raise Failed(f"cannot check out {commit}: {added.stderr.strip()}")
        try:
            if not own_code:
                shutil.rmtree(tree / "benchmarks", ignore_errors=True)
                unwanted = shutil.ignore_patterns("results", "__pycache__")
                shutil.copytree(root / "benchmarks", tree / "benchmarks", ignore=unwanted)
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], capture_output=True, check=False)


def run_in(tree: Path, benchmark: str, options: Sequence[str]) -> dict[str, Figure]:
    """One run of the benchmark with the code of a tree; its figures by name."""
    file = tree.parent / "figures.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(tree / "benchmarks" / f"{benchmark}.py"), *options, "--json", str(file)]
    env = {**os.environ, "PYTHONPATH": str(tree)}
    try:
        done = subprocess.run(
            command, cwd=tree, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{benchmark} took longer than {LIMIT_S} s; pass options on that make it shorter") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise Failed(f"{benchmark} failed with exit code {done.returncode}:\n{said[-2000:]}")
    try:
        return {figure.name: figure for figure in taken(file).figures}
    except (OSError, ValueError) as error:
        raise Failed(f"{benchmark} handed over no figures ({error}); does it know --json?") from error


def page(names: Sequence[str], runs: Sequence[tuple[dict[str, Figure], dict[str, Figure]]]) -> str:
    """The ratios, figure by figure; each pair of runs stands side by side in time."""
    common = [name for name in runs[0][0] if all(name in run for pair in runs for run in pair)]
    rows: list[list[str]] = []
    for name in common:
        pairs = [(one[name].median, other[name].median) for one, other in runs]
        ratios = [theirs / ours for ours, theirs in pairs if ours]
        if len(ratios) < len(pairs):
            continue  # a figure that may be zero has no ratio
        figure = runs[0][0][name]
        middles = [shown(statistics.median(side)) for side in zip(*pairs, strict=True)]
        between = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        rows.append([name, figure.unit, *middles, between, verdict(ratios, figure)])
    return table(["", "unit", *names, f"{names[1]} over {names[0]}", ""], rows)


def verdict(ratios: Sequence[float], figure: Figure) -> str:
    """Better or worse where all pairs agree, else nothing: it may be noise."""
    if len(ratios) < 3 or min(ratios) <= 1 <= max(ratios):
        return ""
    return "better" if (ratios[0] > 1) == (figure.better == "higher") else "worse"


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the benchmark by turns at both commits and print the table."""
    args = _parse(argv)
    pairs: list[tuple[dict[str, Figure], dict[str, Figure]]] = []
    if os.environ.get("ZSFL_DATA"):
        os.environ["ZSFL_DATA"] = str(Path(os.environ["ZSFL_DATA"]).absolute())
    try:
        with ExitStack() as stack:
            commits = (args.old, args.new)
            trees = [stack.enter_context(checked_out(name, root, own_code=args.own_code)) for name in commits]
            for turn in range(args.times):
                order = (0, 1) if turn % 2 == 0 else (1, 0)  # whoever comes second may find the machine warmer
                found = {side: run_in(trees[side], args.benchmark, args.options) for side in order}
                pairs.append((found[0], found[1]))
                print(f"{args.benchmark}: {turn + 1} of {args.times} done", file=sys.stderr, flush=True)
    except Failed as error:
        print(f"benchmarks/compare.py: {error}", file=sys.stderr)
        return 1
    print(f"{args.benchmark} {' '.join(args.options)}: medians of {args.times} runs each; ratios as median (lowest to")
    print("highest) of pairs of runs; better or worse where all of three or more pairs agree\n")
    print(page(commits, pairs))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", metavar="NAME", help="a file in benchmarks/, without .py")
    parser.add_argument("old", metavar="OLD", help="a commit")
    parser.add_argument("new", metavar="NEW", help="another one")
    parser.add_argument("--times", type=int, default=TIMES, metavar="N", help=f"runs of each (default: {TIMES})")
    parser.add_argument("--own-code", action="store_true", help="each commit is measured by its own benchmarks")
    parser.add_argument("options", nargs="*", metavar="OPTION", help="after --: options of the benchmark")
    given = list(sys.argv[1:] if argv is None else argv)
    passed_on = given[given.index("--") + 1 :] if "--" in given else []
    args = parser.parse_args(given[: given.index("--")] if "--" in given else given)
    args.options = [*args.options, *passed_on]
    if args.times < 1:
        parser.error("--times is at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
