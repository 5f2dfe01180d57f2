"""The parser of all commands: what it does not know, it says in a line, and what may have been meant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from zsfl.errors import ConfigError
from zsfl.words import meant


def check_job_file(path: Path) -> None:
    """ConfigError where there is no such file."""
    if path.is_dir():
        raise ConfigError(f"{path.absolute()} is a folder: name the job file in it, such as {path / 'job.py'}")
    if not path.is_file():
        raise ConfigError(f"there is no job file {path.absolute()}; `zsfl new DIR` writes one to begin with")


class Parser(argparse.ArgumentParser):
    """Takes flags only in full, since a part of one may be another in a later version."""

    def __init__(self, **options: Any) -> None:
        kept = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**{**kept, **options})

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """As the base does, but nothing may be left over, which is told before anything that is missing."""
        if args is not None and self._subparsers is None:
            self._check_options(args)
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self._check_options(rest)
            self.error(f"there is no {rest[0]}" if rest[0].startswith("-") else f"{rest[0]!r} is an argument too many")
        return found, rest

    def _check_options(self, args: Sequence[str]) -> None:
        known = [option for action in self._actions for option in action.option_strings]
        for word in args:
            name = word.partition("=")[0]
            if word == "--":
                return
            if name.startswith("--") and " " not in name and name not in known:
                self.error(f"there is no {name}{meant(name, known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        near, choose = meant(str(value), known), f": choose from {', '.join(known)}"
        if action.option_strings:
            self.error(f"{action.option_strings[0]} is {value!r}{choose}")
        self.error(f"there is no {str(action.metavar).lower()} {value!r}{near or choose}")

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and where the help is: all flags would be more than anybody reads."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")
