"""The commands that look at runs. Loads what a command needs only when it runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zsfl.settings import LOOKING, add_flags, load_settings

LOOPBACK = "127.0.0.1"
LS_EXAMPLES = """\
examples:
  zsfl ls                                 the newest run of this folder
  zsfl ls runs/mnist                      this run
  zsfl ls mnist --host 192.168.1.30       nodes of the job called mnist, on this machine's network
  zsfl ls --peer 192.168.1.10:7700        whoever that node knows
  zsfl ls --json                          for programs
It ends with 0 when somebody is there, with 1 when not.
"""
TOP_EXAMPLES = """\
examples:
  zsfl top                                the newest run of this folder, until Ctrl-C
  zsfl top --peer 192.168.1.10:7700       whoever that node knows
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
DASH_EXAMPLES = """\
examples:
  zsfl dash                               a page that shows the newest run of this folder, as it goes on or as it ended
  zsfl dash runs/mnist --port 8000        this run, at the same address each time
  zsfl dash --peer 192.168.1.10:7700      whoever that node knows; without the run's folder there are no curves
  zsfl dash mnist --host 192.168.1.30     look from there, and serve there too: its address has a token then
  ZSFL_HOST=192.168.1.30 zsfl dash mnist  look from there, and serve for this machine alone

It prints the address of the page, which needs nothing from elsewhere. Ctrl-C ends the page, and leaves the run alone.
"""
Parser = Callable[..., argparse.ArgumentParser]


def add_commands(commands: Any, make: Parser) -> None:
    """Give the command line `ls`, `top`, `status`, `runs`, `report` and `dash`."""
    ls = make(commands.add_parser, "ls", help="who is there", epilog=LS_EXAMPLES)
    ls.add_argument("target", nargs="?", metavar="RUN", help="a run, or the name of a job; default: the newest run")
    ls.add_argument("--json", action="store_true", help="all that is known, as JSON")
    ls.add_argument("--wait-s", type=float, default=5.0, metavar="S", help="seconds to look around at most; default: 5")
    add_flags(ls, LOOKING)
    ls.set_defaults(run_command=_ls)

    top = make(commands.add_parser, "top", help="the same, live", epilog=TOP_EXAMPLES)
    top.add_argument("target", nargs="?", metavar="RUN", help="a run, or the name of a job; default: the newest run")
    add_flags(top, LOOKING)
    top.set_defaults(run_command=_top)

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

    dash = make(commands.add_parser, "dash", help="a page to watch a run on", epilog=DASH_EXAMPLES)
    dash.add_argument("target", nargs="?", metavar="RUN", help="a run, or the name of a job; default: the newest run")
    _add_port(dash, "--port")
    add_flags(dash, LOOKING)
    dash.set_defaults(run_command=_dash)


def add_dash_flags(command: argparse.ArgumentParser) -> None:
    """Give a command that starts a run a page to watch it on."""
    command.add_argument("--dash", action="store_true", help="serve a page to watch the run on, for this machine alone")
    _add_port(command, "--dash-port")


def _add_port(command: argparse.ArgumentParser, flag: str) -> None:
    said = "port of the page; default: any free one"
    command.add_argument(flag, dest="dash_port", type=int, default=0, metavar="N", help=said)


def _ls(args: argparse.Namespace) -> int:
    from zsfl.dashboard.pages import print_nodes

    return print_nodes(args.target, load_settings(vars(args), os.environ), args.wait_s, as_json=args.json)


def _top(args: argparse.Namespace) -> int:
    from zsfl.dashboard.top import watch_nodes

    return watch_nodes(args.target, load_settings(vars(args), os.environ))


def _status(args: argparse.Namespace) -> int:
    from zsfl.dashboard.showing import print_status

    return print_status(args.target, load_settings(vars(args), os.environ).runs, as_json=args.json)


def _runs(args: argparse.Namespace) -> int:
    from zsfl.dashboard.showing import print_runs

    return print_runs(args.targets, load_settings(vars(args), os.environ).runs, args.plot, as_json=args.json)


def _report(args: argparse.Namespace) -> int:
    from zsfl.dashboard.showing import write_report

    return write_report(args.target, load_settings(vars(args), os.environ).runs, args.to)


def _dash(args: argparse.Namespace) -> int:
    from zsfl.dashboard.dashing import serve_dash

    return serve_dash(args.target, load_settings(vars(args), os.environ), args.host or LOOPBACK, args.dash_port)
