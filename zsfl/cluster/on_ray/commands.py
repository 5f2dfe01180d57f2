"""The flags of `zsfl up --on ray`. Loads nothing that takes time."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsfl.errors import ConfigError

if TYPE_CHECKING:
    from zsfl.cluster.cluster import Cluster

_OWN = {"address": "address", "min": "least", "max": "most"}


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Give `zsfl up` those flags; its parser."""
    parser.add_argument("--on", choices=("ray",), metavar="ENGINE", help="ray: have Ray place and restart the nodes")
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="of a Ray cluster, or auto; default: one is started on this machine"
    )
    parser.add_argument("--min", type=int, metavar="N", help="with --on ray: split servers at least")
    parser.add_argument(
        "--max", type=int, metavar="N", help="the same, at most; more and fewer by what they have to do"
    )
    return parser


def is_wanted(flags: Mapping[str, Any]) -> bool:
    """Whether the nodes are to run on Ray; ConfigError where the flags do not go together."""
    given = [name for name in _OWN if flags.get(name) is not None]
    if flags.get("on") is None:
        if given:
            raise ConfigError(f"--{given[0]} is for --on ray")
        return False
    if flags["job"].suffix == ".toml":
        raise ConfigError(f"--on ray is for a job file: {flags['job']} says which machines there are")
    if flags["in_process"]:
        raise ConfigError("--in-process and --on ray are two ways to run nodes: leave out either")
    return True


def make(job: Path, flags: Mapping[str, Any], given: Mapping[str, Any]) -> Cluster | None:
    """The cluster that the flags describe; None where it is not to be on Ray."""
    if not is_wanted(flags):
        return None
    from zsfl.cluster.on_ray.cluster import RayCluster

    own = {name: flags[flag] for flag, name in _OWN.items() if flags[flag] is not None}
    return RayCluster(job, **own, **given)
