"""The commands for those who begin: `zsfl new` and `zsfl completion`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHORT = """\
zsfl trains one neural network over machines that may not share their data.

  zsfl demo              see it work on this machine; nothing is downloaded
  zsfl new my-project    a job of your own, to begin with
  zsfl up job.py         train it, with a whole cluster on this machine

`zsfl --help` has all commands, and `zsfl COMMAND --help` all about one.
"""
"""What `zsfl` says to who gives it nothing to do."""
NEW_EXAMPLES = """\
examples:
  zsfl new digits                    a folder with a job that runs as it is, and says where your own model and data go
  zsfl new .                         the same in this folder; nothing is overwritten
"""
COMPLETION_EXAMPLES = """\
examples, each for good:
  zsfl completion bash > ~/.local/share/bash-completion/completions/zsfl
  zsfl completion zsh > ~/.zfunc/_zsfl       where .zshrc has: fpath+=~/.zfunc; autoload -Uz compinit; compinit
  zsfl completion fish > ~/.config/fish/completions/zsfl.fish

For this shell alone, in bash: source <(zsfl completion bash)
"""
SHELLS = ("bash", "zsh", "fish")
Parser = Callable[..., argparse.ArgumentParser]


def add_commands(commands: Any, make: Parser, top: argparse.ArgumentParser) -> None:
    """Give the command line `top` its `new` and `completion`."""
    new = make(commands.add_parser, "new", help="begin a project of your own", epilog=NEW_EXAMPLES)
    new.add_argument("folder", type=Path, metavar="DIR", help="where to; it is made where it is not there")
    new.set_defaults(run_command=_new)

    completion = make(
        commands.add_parser, "completion", help="have the shell complete what you type", epilog=COMPLETION_EXAMPLES
    )
    completion.add_argument("shell", choices=SHELLS, metavar="SHELL", help=" or ".join(SHELLS))
    completion.set_defaults(run_command=lambda args: _completion(top, args.shell))


def _new(args: argparse.Namespace) -> int:
    from zsfl.start.project import begin, print_begun

    print_begun(args.folder, begin(args.folder))
    return 0


def _completion(top: argparse.ArgumentParser, shell: str) -> int:
    from zsfl.start.completion import script

    print(script(top, shell))
    return 0
