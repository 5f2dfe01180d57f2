"""Keeps the code small: files under 400 lines, functions under 60; prints what is over and the totals."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("zsfl", "nodes", "benchmarks", "tools")
FILE_LINES = 400
FUNCTION_LINES = 60


def functions(source: str, path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of one file, nested ones too."""
    for node in ast.walk(ast.parse(source, str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def over_budget(path: Path) -> Iterator[str]:
    """One line for each bound that the file breaks, in the form editors jump to."""
    source = path.read_text(encoding="utf-8")
    lines = len(source.splitlines())
    if lines >= FILE_LINES:
        yield f"{path}: {lines} lines; a file has fewer than {FILE_LINES}"
    for function in functions(source, path):
        lines = (function.end_lineno or function.lineno) - function.lineno + 1
        if lines >= FUNCTION_LINES:
            where = f"{path}:{function.lineno}: {function.name}"
            yield f"{where}: {lines} lines; a function has fewer than {FUNCTION_LINES}"


def main() -> int:
    """0 when everything is within its budget, else 1."""
    root = Path(__file__).resolve().parent.parent
    problems: list[str] = []
    for folder in FOLDERS:
        files = sorted((root / folder).rglob("*.py"))
        total = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
        print(f"{folder}: {len(files)} files, {total} lines")
        problems += [problem for path in files for problem in over_budget(path)]
    print("\n".join(problems) or "within budget")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
