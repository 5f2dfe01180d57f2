"""A whole cluster on the machines of a LAN."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from zsfl.cluster.cluster import Cluster
from zsfl.cluster.lan import KEYS, Machine, read_lan
from zsfl.cluster.plan import Plan, client_flags
from zsfl.cluster.spawner import Spawner
from zsfl.cluster.ssh import LanSpawner
from zsfl.errors import ConfigError
from zsfl.ids import Role
from zsfl.reports import AnyReport, Assembled, Finished, RoundReport
from zsfl.settings import load_settings

Flags = dict[str, Any]


class LanCluster(Cluster):
    """The nodes that a file such as `lan.toml` names (`zsfl.cluster.lan`), on its machines, over the system's ssh."""

    def __init__(self, path: Path, *, on_report: Callable[[AnyReport], None] | None = None, **settings: Any) -> None:
        """`settings` are fields of `zsfl.settings.NodeSettings` for all nodes, and go before those of the file; but
        `keys`, as the variable ZSFL_KEYS, are those of this machine alone.
        """
        lan = read_lan(path)
        given = {**lan.settings, **{name: value for name, value in settings.items() if value is not None}}
        base = load_settings(given, os.environ)
        if base.insecure:  # a variable says so as well as a flag
            given["insecure"] = True
        machines = {name: _with_keys(machine, base.keys) for name, machine in lan.machines.items()}
        for_all = {**given, "keys": lan.settings.get("keys", "")}
        self._lan = lan = msgspec.structs.replace(lan, settings=for_all, machines=machines)
        self._job = path.parent / lan.job
        if not self._job.is_file():
            raise ConfigError(f"{path} names the job {self._job}, and there is no such file")
        self._nodes: dict[Role, dict[str, Flags]] = {}
        self._places: dict[str, str] = {}
        for name, machine in lan.machines.items():
            for role, node, flags in _nodes_of(name, machine, lan.keys_of(name)):
                self._nodes.setdefault(role, {})[node] = flags
                self._places[node] = name
        # The nodes are told of one another: where all addresses are known no multicast is needed.
        super().__init__(given, mdns=bool(given.get("mdns", False)), clients=lan.shards, on_report=on_report)

    def _make_spawner(self) -> Spawner:
        self._lan_spawner = LanSpawner(self._lan, self._job, self._logs, self._places, self._base.keys)
        return self._lan_spawner

    def _plan(self) -> Plan:
        return Plan(
            shards=self._lan.shards,
            aggregator=self._nodes[Role.AGGREGATOR]["aggregator"],
            split_servers=self._nodes[Role.SPLIT_SERVER],
            clients=self._nodes[Role.CLIENT],
            standbys=self._nodes.get(Role.STANDBY, {}),
        )

    def _folder_of(self, report: Finished | Assembled) -> str:
        machine = self._lan.machines[self._places[report.node]]
        if not machine.ssh or not report.folder:
            return report.folder
        return f"{machine.ssh}:{PurePosixPath(machine.folder, report.folder)}"

    def _late(self) -> list[str]:
        return [f"machine {name}" for name in self._lan_spawner.unknown] + super()._late()

    def _rounds_in(self, folder: Path) -> Iterable[RoundReport]:
        return ()  # the folder is on another machine


def _with_keys(machine: Machine, here: str) -> Machine:
    """The machine as it is, or this one with the keys of whoever runs this."""
    if machine.ssh or not here or KEYS in machine.env:
        return machine
    return msgspec.structs.replace(machine, settings={"keys": here, **machine.settings})


def _nodes_of(name: str, machine: Machine, keys: str) -> Iterable[tuple[Role, str, Flags]]:
    """Role, name and flags of the nodes of one machine, whose keys are in this folder."""
    common: Flags = {**machine.settings, "host": machine.address or "127.0.0.1"}
    common["keys"] = keys or None  # not those of whoever runs this
    if machine.aggregator:
        yield Role.AGGREGATOR, "aggregator", common
    for number in range(machine.split_servers):
        yield Role.SPLIT_SERVER, f"split-server-{name}" + (f"-{number}" if number else ""), common
    if held := machine.held:
        processes = min(len(held), machine.client_processes or len(held))
        for node, flags in client_flags(held, processes).items():
            yield Role.CLIENT, node, {**common, **flags}
    if machine.standby:
        yield Role.STANDBY, f"standby-{name}", common
