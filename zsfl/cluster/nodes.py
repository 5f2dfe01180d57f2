"""What is known of the nodes of a cluster."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zsfl.errors import ConfigError, RunFailed, ZsflError
from zsfl.ids import AGGREGATING, Address, Role
from zsfl.reports import ADVICE, LOGGED, Failed, Note
from zsfl.settings import NODE_FLAGS, NodeSettings
from zsfl.wire.sockets import is_free


@dataclass(slots=True)
class NodeInfo:
    """A node of the cluster, as far as it has told."""

    role: Role
    flags: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What it was started with, beside the settings of all."""
    pid: int | None = None
    address: Address | None = None
    ready_s: float = math.inf
    """When it was, by the monotonic clock."""
    was_killed: bool = False
    """By whoever runs the cluster: that says nothing about the node."""
    exit_code: int | None = None
    failed: Failed | None = None
    """Its last words, if it had any."""

    @property
    def was_ready(self) -> bool:
        """Whether its sockets were open."""
        return self.address is not None

    @property
    def is_there(self) -> bool:
        """Whether they are open still."""
        return self.was_ready and self.exit_code is None


def is_done_without(node: NodeInfo, nodes: Iterable[NodeInfo]) -> bool:
    """Whether a run goes on without a node that ended: others do the same, and what it failed of is its own affair."""
    group = AGGREGATING if node.role in AGGREGATING else {node.role}
    has_failed = node.failed is not None and node.role is not Role.SPLIT_SERVER
    has_bad_disk = node.failed is not None and node.failed.kind == "StorageError" and node.role in AGGREGATING
    others = any(other.role in group and other.exit_code is None for other in nodes)
    return others and (has_bad_disk or not has_failed)


@dataclass(slots=True)
class Leader:
    """Who aggregates, as far as it has told."""

    name: str = "aggregator"
    address: Address | None = None
    first: Address | None = None
    """Where the run's first aggregator was found."""
    leads: bool = False
    """Whether it does now: it may have ended, or stand by until it is known who leads."""
    run: str = ""
    """Name of the first one's run folder, once there is one."""

    def is_now(self, name: str, address: Address) -> None:
        """Somebody says so."""
        self.name, self.address, self.leads = name, address, True
        self.first = self.first or address

    def is_not(self, name: str) -> None:
        """This one does not aggregate, or does no more."""
        self.leads = self.leads and name != self.name


def check_counts(clients: int | None, split_servers: int, standbys: int, processes: int | None) -> None:
    """ConfigError when there are too few of something."""
    for what, count, flag in (
        ("split server", split_servers, "--split-servers"),
        ("client", clients, "--clients"),
        ("process", processes, "--client-processes"),
    ):
        if count is not None and count < 1:
            raise ConfigError(f"a cluster needs at least one {what}, not {count} ({flag})")
    if standbys < 0:
        raise ConfigError(f"a cluster cannot have {standbys} standbys; use 0 or more")


def command_line(role: Role, job: str | Path, flags: Mapping[str, Any]) -> str:
    """`zsfl node ROLE JOB` with these settings, as far as they are flags and not what they are by default."""
    words, usual = ["zsfl", "node", str(role), str(job)], NodeSettings()
    for name in NODE_FLAGS[role]:
        value, flag = flags.get(name), {"peers": "--peer"}.get(name, f"--{name.replace('_', '-')}")
        if value is None or value == getattr(usual, name):
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            for one in value if isinstance(value, tuple) else (value,):
                words += [flag, str(one)]
    return shlex.join(words)


def how_to_start(name: str, node: NodeInfo, logs: Path, command: str) -> Note | None:
    """How somebody starts a node again that was killed, and not by whoever runs the cluster; None: nothing is to do."""
    by_itself = node.exit_code == 0 or node.was_killed or node.role not in (Role.CLIENT, Role.SPLIT_SERVER)
    if by_itself or not command:
        return None
    said = f"what {name} said is in {logs / name}.log; start it again, from this folder, with:\n  {command}"
    return Note(message=said, level=ADVICE)


def death(name: str, node: NodeInfo, logs: Path) -> ZsflError:
    """How a node ended, for people."""
    if node.failed is not None:
        kind = ConfigError if node.failed.kind == "ConfigError" else RunFailed
        where = f": {logs / name}.log" if node.failed.message.endswith(LOGGED) else ""
        return kind(f"{name}: {node.failed.message}{where}")
    code = node.exit_code or 0
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    last = f", and there is no other {node.role.replace('-', ' ')}" if node.role is not Role.AGGREGATOR else ""
    return RunFailed(f"{name} {how}{last}; see {logs / name}.log")


def given_up(name: str, node: NodeInfo, logs: Path, deaths: int) -> RunFailed:
    """That a node dies whenever it is started."""
    how = f"by signal {-(node.exit_code or 0)}" if (node.exit_code or 0) < 0 else f"with exit code {node.exit_code}"
    return RunFailed(
        f"{name} died {deaths} times, one soon after another, at last {how}: it is not started again. "
        f"See {logs / name}.log, then go on with --resume"
    )


def port_again(address: Address | None) -> int:
    """The port of a node that has ended, or 0 (any free one) where somebody else has it by now."""
    host, _, port = (address or "").rpartition(":")
    return int(port) if port.isdecimal() and is_free(host, int(port)) else 0
