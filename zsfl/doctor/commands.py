"""The command `zsfl doctor`. Loads what it needs only when it runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zsfl.errors import ConfigError
from zsfl.settings import LOOKING, add_flags, load_settings

EXAMPLES = """\
examples:
  zsfl doctor                                   this machine, and whoever is found on it
  zsfl doctor mnist.py --host 192.168.1.30      the nodes of this job, as a node at that address sees them
  zsfl doctor mnist --host 192.168.1.30         the same by the job's name
  zsfl doctor --peer 192.168.1.10:7700          that node, and whom it knows: where multicast is blocked
  zsfl doctor --spill s3://bucket/zsfl          whether this machine may use that store, too
  zsfl doctor --json                            all that was seen and found, for programs

Give it the flags that a node here has. It changes nothing, and takes a few seconds. Each line is good, or something to
mind (warn), or wrong (BAD), with what to do about it. Each sees but its own side of the network: where two machines do
not find each other, run it on both. It ends with 0 when all is well, with 1 when something is wrong.
"""
FLAGS = (*LOOKING, "cluster", "device", "spill", "spill_mib")


def add_commands(commands: Any, make: Callable[..., argparse.ArgumentParser]) -> None:
    """Give the command line `doctor`."""
    doctor = make(
        commands.add_parser, "doctor", help="why nodes do not find one another, or do not run", epilog=EXAMPLES
    )
    doctor.add_argument("job", nargs="?", metavar="JOB", help="job file, or name of a job; default: whatever there is")
    doctor.add_argument("--json", action="store_true", help="the same as data")
    add_flags(doctor, FLAGS)
    doctor.set_defaults(run_command=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    settings = load_settings(vars(args), os.environ)
    if settings.insecure and settings.keys:
        raise ConfigError(
            f"keys are to be used, those in {settings.keys}, and --insecure says not to: leave out either"
        )
    path = Path(args.job) if args.job and (args.job.endswith(".py") or Path(args.job).exists()) else None
    if path is not None and not path.is_file():
        raise ConfigError(f"there is no job file {path.absolute()}: name the file of the job, or the job by its name")
    from zsfl.doctor.pages import print_findings

    return print_findings(settings, path, args.job or "", as_json=args.json)
