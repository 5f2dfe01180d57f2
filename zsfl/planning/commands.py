"""The command `zsfl plan`. Loads what it needs only when it runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zsfl.errors import ConfigError
from zsfl.flags import check_job_file
from zsfl.settings import add_flags, load_settings

EXAMPLES = """\
examples:
  zsfl plan mnist.py --clients 20 --split-servers 2        measured here: what would so many machines do?
  zsfl plan mnist.py --clients 20 --link 100 --latency-ms 5    over links of 100 Mbit/s
  zsfl plan mnist.py --bench 192.168.1.20:7710             over the link to where zsfl bench --serve runs
  zsfl plan mnist.py --server-ms 4                         with split servers that need 4 ms for a step
  zsfl plan --clients 10000 --split-servers 1000 --client-ms 5 --server-ms 20 --activations-kib 16 --link 50
  zsfl plan mnist.py --json                                all of it, for programs

A run is simulated in virtual time; who is asked, what is admitted and when a version is made, the classes decide that
nodes decide by. What is not given is measured on this machine, by a few steps of the job; links that are not given
carry everything at once. Every node has a machine of its own, unless --cores says how many processors all share.
"""
_NUMBERS = (
    ("--client-ms", "MS", "a client's processor has to do with a step, all in all"),
    ("--server-ms", "MS", "a split server has to do with a step, all in all"),
    ("--aggregator-ms", "MS", "the aggregator has to do with a step"),
    ("--activations-kib", "KIB", "a client sends to a split server for a step, and is sent back; each time"),
    ("--body-kib", "KIB", "of weights in the body: sent to split servers, and spilled with every step"),
    ("--ends-kib", "KIB", "of weights in head and tail: sent to clients, and spilled with every step"),
    ("--link", "MBIT", "Mbit/s of a client's link, each way"),
    ("--server-link", "MBIT", "Mbit/s of a split server's and the aggregator's link; default: as --link"),
    ("--latency-ms", "MS", "one way between two machines"),
    ("--cores", "N", "processors that all nodes share, as with zsfl up; default: each has a machine"),
)


def add_commands(commands: Any, make: Callable[..., argparse.ArgumentParser]) -> None:
    """Give the command line `plan`."""
    plan = make(commands.add_parser, "plan", help="what so many machines would make of a job", epilog=EXAMPLES)
    plan.add_argument(
        "job", nargs="?", type=Path, metavar="JOB", help="job file; without one the figures have to be given"
    )
    plan.add_argument("--split-servers", type=int, default=2, metavar="N", help="how many split servers; default: 2")
    plan.add_argument(
        "--client-processes", type=int, metavar="N", help="processes the clients share; default: one each"
    )
    plan.add_argument(
        "--samples", type=int, metavar="N", help="training samples of a client; default: as the first has"
    )
    for name, metavar, text in _NUMBERS:
        plan.add_argument(name, type=float, metavar=metavar, help=text)
    plan.add_argument("--bench", metavar="HOST:PORT", help="measure the link to where zsfl bench --serve runs")
    plan.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of measuring (default: 1)")
    plan.add_argument("--seed", type=int, default=0, metavar="N", help="of what is random; default: 0")
    plan.add_argument("--json", action="store_true", help="the same as data")
    add_flags(plan, ("clients", "mode", "slots", "device", "threads", "keys", "insecure"))
    plan.set_defaults(run_command=_plan)


def _plan(args: argparse.Namespace) -> int:
    settings = load_settings(vars(args), os.environ)
    if not 0 < args.seconds <= 3600:
        raise ConfigError(f"--seconds is {args.seconds:g}: expected a number above 0 and at most 3600")
    if args.bench is not None and args.link is not None:
        raise ConfigError("--link says what --bench would measure: leave out either")
    for name, *_ in _NUMBERS:
        value = getattr(args, name.removeprefix("--").replace("-", "_"))
        least = "above 0" if name in ("--link", "--server-link", "--cores") else "from 0 up"
        if value is not None and not (0 <= value < 1e12 and (value or least != "above 0")):
            raise ConfigError(f"{name} is {value:g}: expected a number {least}")
    if args.job is None:
        missing = [flag for flag in ("--clients", "--client-ms", "--server-ms") if not _given(args, flag)]
        if missing:
            raise ConfigError(f"without a job file, say {', '.join(missing)} too; or name the job, to have it measured")
    else:
        check_job_file(args.job)
    from zsfl.planning.pages import print_plan

    return print_plan(args, settings)


def _given(args: argparse.Namespace, flag: str) -> bool:
    return getattr(args, flag.removeprefix("--").replace("-", "_")) is not None
