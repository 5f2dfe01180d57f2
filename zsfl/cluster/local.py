"""A whole cluster on this machine."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsfl.cluster.chaos import Chaos
from zsfl.cluster.cluster import Cluster
from zsfl.cluster.nodes import NodeInfo, check_counts, command_line
from zsfl.cluster.plan import Plan, client_flags
from zsfl.cluster.processes import ProcessSpawner
from zsfl.cluster.spawner import Spawner
from zsfl.cluster.spawners import loaded, spawner_for
from zsfl.errors import ConfigError
from zsfl.ids import Role
from zsfl.reports import AnyReport
from zsfl.settings import load_settings

if TYPE_CHECKING:
    from zsfl.learning.job import Job


class LocalCluster(Cluster):
    """Clients, split servers and an aggregator on this machine.

        async with zsfl.LocalCluster(job="mnist.py", clients=20, split_servers=2) as cluster:
            async for report in cluster.train(rounds=10):
                print(report.round, report.loss, report.accuracy)

    Every node is a process of its own, or with `in_process=True` a task of this event loop. Leaving the block, for
    whatever reason, ends them all. A node that fails, other than one of several split servers, is a RunFailed, or a
    ConfigError when its job or settings are wrong. Clients that leave or are killed are done without, as the job's mode
    says.
    """

    def __init__(
        self,
        job: str | Path | Job,
        *,
        clients: int | None = None,
        split_servers: int = 2,
        standbys: int = 0,
        client_processes: int | None = None,
        in_process: bool = False,
        mdns: bool | None = None,
        keep_alive: bool = False,
        chaos: Chaos | None = None,
        on_report: Callable[[AnyReport], None] | None = None,
        **settings: Any,
    ) -> None:
        """`job` is a job file, or with `in_process` also a `Job`. `clients` overrides its number of shards. Each of the
        `standbys` keeps a copy of the run, and takes over when the aggregator is gone.

        Clients share `client_processes` processes, by default one each. With `keep_alive` nodes that are killed, but do
        not die each time, are started again, the aggregator from its last commit. `chaos` kills some on purpose while
        the cluster trains. `settings` are fields of `zsfl.settings.NodeSettings` for all nodes.
        """
        check_counts(clients, split_servers, standbys, client_processes)
        if settings.get("durability") == "replica" and not standbys:
            raise ConfigError("durability is replica, and nobody stands by: use one standby at least")
        # Said here once for all nodes, so that a flag, a file or a variable means the same to each of them.
        base = load_settings({**settings, "clients": clients}, os.environ)
        super().__init__(
            settings,
            mdns=(base.mdns and not in_process) if mdns is None else mdns,
            clients=base.clients,
            keep_alive=keep_alive,
            chaos=chaos,
            on_report=on_report,
        )
        self._job = job
        self._split_servers = split_servers
        self._standbys = standbys
        self._client_processes = client_processes
        self._in_process = in_process

    def _make_spawner(self) -> Spawner:
        return spawner_for(self._job, self._logs, in_process=self._in_process)

    async def _start_all(self) -> None:
        if not self._shards and isinstance(self._spawner, ProcessSpawner):
            self._shards = await self._spawner.shards()
        await super()._start_all()

    def _plan(self) -> Plan:
        shards = self._shards or loaded(self._job).shards
        return Plan(
            shards=shards,
            aggregator={"port": self._base.port},
            split_servers={f"split-server-{number}": {} for number in range(self._split_servers)},
            clients=client_flags(range(shards), min(shards, self._client_processes or shards)),
            standbys={f"standby-{number}": {} for number in range(self._standbys)},
        )

    def _command_for(self, name: str, node: NodeInfo) -> str:
        if self._in_process or not isinstance(self._job, str | Path):
            return ""
        flags = self._all_flags(node.role, node.flags)
        one = tuple(flags.get("peers", ()))[:1]  # is enough to find the others by
        return command_line(node.role, self._job, {**flags, "peers": one, "name": name})

    async def start_split_server(self, name: str | None = None) -> str:
        """Start one more split server; its name, once it is ready."""
        free = (f"split-server-{number}" for number in itertools.count())
        name = name or next(free_name for free_name in free if free_name not in self.nodes)
        return await self._start_and_wait(name, Role.SPLIT_SERVER, {})

    async def start_client(self, shards: str, name: str | None = None) -> str:
        """Start a client for shards that nobody holds (any more), such as "3" or "0-4"; its name, once it is ready."""
        return await self._start_and_wait(name or f"client-{shards}", Role.CLIENT, {"shards": shards})
