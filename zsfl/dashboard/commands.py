"""The commands that look at runs. Loads what a command needs only when it runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
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
RUNS_EXAMPLES = """\
examples:
  zsfl runs                               all runs of this folder, the newest last
  zsfl runs first second --plot both.png  compare two, with their curves
  zsfl runs --runs /data/runs --json      for programs
"""
STATUS_EXAMPLES = """\
examples:
  zsfl status                             how the newest run stands
  zsfl status mnist                       that one; runs/mnist, too
  zsfl status mnist --json                for programs
It ends with 1 when the run failed.
"""
REPORT_EXAMPLES = """\
examples:
  zsfl report                             of the newest run, into its folder
  zsfl report mnist --to mnist.html       one file, to keep or to send
"""
Parser = Callable[..., argparse.ArgumentParser]


def add_commands(commands: Any, make: Parser) -> None:
    """Give the command line `ls`, `status`, `runs` and `report`."""
    ls = make(commands.add_parser, "ls", help="who is there", epilog=LS_EXAMPLES)
    ls.add_argument("target", nargs="?", metavar="RUN", help="a run, or the name of a job; default: the newest run")
    ls.add_argument("--json", action="store_true", help="all that is known, as JSON")
    ls.add_argument("--wait-s", type=float, default=5.0, metavar="S", help="seconds to look around at most; default: 5")
    add_flags(ls, ("host", "peers", "keys", "insecure", "mdns", "runs"))
    ls.set_defaults(run_command=_ls)

    status = make(commands.add_parser, "status", help="how a run stands", epilog=STATUS_EXAMPLES)
    status.add_argument("target", nargs="?", metavar="RUN", help="a run, or its folder; default: the newest")
    status.add_argument("--json", action="store_true", help="as JSON")
    add_flags(status, ("runs",))
    status.set_defaults(run_command=_status)

    runs = make(commands.add_parser, "runs", help="list and compare runs", epilog=RUNS_EXAMPLES)
    runs.add_argument("targets", nargs="*", metavar="RUN", help="runs, or their folders; default: all")
    runs.add_argument("--json", action="store_true", help="as JSON")
    runs.add_argument("--plot", type=Path, metavar="FILE", help="draw their curves, as .png, .svg or .pdf")
    add_flags(runs, ("runs",))
    runs.set_defaults(run_command=_runs)

    report = make(commands.add_parser, "report", help="one page about a run", epilog=REPORT_EXAMPLES)
    report.add_argument("target", nargs="?", metavar="RUN", help="a run, or its folder; default: the newest")
    report.add_argument("--to", type=Path, metavar="FILE", help="where to write it; default: report.html in its folder")
    add_flags(report, ("runs",))
    report.set_defaults(run_command=_report)


def _ls(args: argparse.Namespace) -> int:
    from zsfl.dashboard.pages import print_nodes

    return print_nodes(args.target, load_settings(vars(args), os.environ), args.wait_s, as_json=args.json)


def _status(args: argparse.Namespace) -> int:
    from zsfl.dashboard.showing import print_status

    return print_status(args.target, load_settings(vars(args), os.environ).runs, as_json=args.json)


def _runs(args: argparse.Namespace) -> int:
    from zsfl.dashboard.showing import print_runs

    return print_runs(args.targets, load_settings(vars(args), os.environ).runs, args.plot, as_json=args.json)


def _report(args: argparse.Namespace) -> int:
    from zsfl.dashboard.showing import write_report

    return write_report(args.target, load_settings(vars(args), os.environ).runs, args.to)
