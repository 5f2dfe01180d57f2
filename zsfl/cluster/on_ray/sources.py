"""The files of a job, which its nodes on other machines need."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def imported_by(job: Path) -> list[str]:
    """The files in the job's folder, or below it, that it imports by name, and those that they import."""
    found: dict[Path, None] = {}
    looking = [job]
    while looking:
        path = looking.pop()
        for module in _modules(path, job.parent):
            for length in range(1, len(module) + 1):
                place = job.parent.joinpath(*module[:length])
                for file in (place.with_suffix(".py"), place / "__init__.py"):
                    if file.is_file() and file not in found and file != job:
                        found[file] = None
                        looking.append(file)
    return [str(path.relative_to(job.parent)) for path in found]


def _modules(path: Path, folder: Path) -> Iterator[tuple[str, ...]]:
    """What a file imports, but for zsfl itself; nothing where it is no Python: the node that imports it will say so."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    package = path.relative_to(folder).parent.parts
    for node in ast.walk(tree):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = (*above, *(node.module.split(".") if node.module else ()))
            names = [(*base, alias.name) for alias in node.names]
        yield from (name for name in names if name[0] != "zsfl")
