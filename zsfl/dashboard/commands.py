"""The commands that look at runs. Loads what a command needs only when it runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from zsfl.settings import add_flags, load_settings

LS_EXAMPLES = """\
examples:
  zsfl ls                                 the newest run of this folder
  zsfl ls runs/mnist                      this run
  zsfl ls mnist --host 192.168.1.30       nodes of the job called mnist, on this machine's network
  zsfl ls --peer 192.168.1.10:7700        whoever that node knows
  zsfl ls --json                          for programs
It ends with 0 when somebody is there, with 1 when not.
"""
Parser = Callable[..., argparse.ArgumentParser]


def add_commands(commands: Any, make: Parser) -> None:
    """Give the command line `ls`."""
    ls = make(commands.add_parser, "ls", help="who is there", epilog=LS_EXAMPLES)
    ls.add_argument("target", nargs="?", metavar="RUN", help="a run, or the name of a job; default: the newest run")
    ls.add_argument("--json", action="store_true", help="all that is known, as JSON")
    ls.add_argument("--wait-s", type=float, default=5.0, metavar="S", help="seconds to look around at most; default: 5")
    add_flags(ls, ("host", "peers", "keys", "insecure", "mdns", "runs"))
    ls.set_defaults(run_command=_ls)


def _ls(args: argparse.Namespace) -> int:
    from zsfl.dashboard.pages import print_nodes

    return print_nodes(args.target, load_settings(vars(args), os.environ), args.wait_s, as_json=args.json)
