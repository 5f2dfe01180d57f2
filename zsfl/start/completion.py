"""`zsfl completion`: a script by which the shell completes commands, flags, choices and files, made by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import shtab

_RUNS: dict[str, Any] = {
    "bash": "_zsfl_runs",
    "zsh": "_files -/ -W runs",
    "fish": "(_zsfl_runs)",
    "preamble": {
        "bash": """
_zsfl_runs() {
  local run
  for run in runs/*/settings.json; do
    run=${run%/settings.json}
    [[ -d $run ]] && compgen -W "${run#runs/}" -- "$1"
  done
}
""",
        "fish": """
function _zsfl_runs
  for run in runs/*/settings.json
    string replace -r '^runs/(.*)/settings.json$' '$1' -- $run
  end
end
""",
    },
}
"""Names of the runs in the folder `runs`."""
_BY_METAVAR = {
    "JOB": shtab.glob("*.py", "*.toml"),
    "TARGET": shtab.glob("*.py"),
    "RUN": _RUNS,
    "RUNS": shtab.DIRECTORY,
    "KEYS": shtab.DIRECTORY,
    "FILE": shtab.FILE,
    "DIR": shtab.DIRECTORY,
}


def script(top: argparse.ArgumentParser, shell: str) -> str:
    """What the shell is to read."""
    for action in _actions(top):
        what = action.metavar if isinstance(action.metavar, str) else ""
        if what in _BY_METAVAR:
            vars(action)["complete"] = _BY_METAVAR[what]  # where shtab looks for it
    return shtab.complete(top, shell)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)
