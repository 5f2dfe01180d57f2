"""A whole cluster on this machine, as an async context manager."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import zmq.asyncio

from zsfl.cluster.processes import ProcessSpawner
from zsfl.cluster.spawner import NodeCommand, Spawner
from zsfl.errors import ConfigError, RunFailed, Unavailable
from zsfl.ids import Address, Role
from zsfl.metrics import Counters
from zsfl.reports import AnyReport, Assembled, Exited, Failed, Finished, Ready, RoundReport
from zsfl.settings import WireLimits
from zsfl.wire.connection import Connection
from zsfl.wire.messages import Train

if TYPE_CHECKING:
    from zsfl.learning.job import Job

START_S = 60.0
"""What a cluster may take until all nodes have found one another."""
ORDER_S = 10.0
STOP_S = 5.0
"""What one node may take to leave."""


@dataclass(slots=True)
class NodeInfo:
    """A node of the cluster, as far as it has told."""

    role: Role
    pid: int | None = None
    address: Address | None = None
    exit_code: int | None = None


class LocalCluster:
    """Clients, split servers and an aggregator on this machine.

        async with zsfl.LocalCluster(job="mnist.py", clients=20, split_servers=2) as cluster:
            async for report in cluster.train(rounds=10):
                print(report.round, report.loss, report.accuracy)

    Every node is a process of its own, or with `in_process=True` a task of this event loop. Leaving the block, for
    whatever reason, ends them all. A node that fails, other than one of several split servers, is a RunFailed.
    """

    def __init__(
        self,
        job: str | Path | Job,
        *,
        clients: int | None = None,
        split_servers: int = 2,
        client_processes: int | None = None,
        in_process: bool = False,
        mdns: bool | None = None,
        on_report: Callable[[AnyReport], None] | None = None,
        **settings: Any,
    ) -> None:
        """`job` is a job file, or with `in_process` also a `Job`. `clients` overrides its number of shards.

        Clients share `client_processes` processes, by default one each. `settings` are fields of
        `zsfl.settings.NodeSettings` for all nodes.
        """
        if split_servers < 1:
            raise ConfigError("a cluster needs at least one split server")
        self._job = job
        self._clients = clients
        self._split_servers = split_servers
        self._client_processes = client_processes
        self._in_process = in_process
        self._mdns = not in_process if mdns is None else mdns
        self._on_report = on_report
        self._settings = settings
        self._runs = Path(settings.get("runs", "runs"))
        self._spawner: Spawner
        self._events: asyncio.Queue[AnyReport | None] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._assembled = False
        self._closing = False
        self._failure: RunFailed | None = None
        self._leaving: set[str] = set()
        self._pump: asyncio.Task[None]
        self.nodes: dict[str, NodeInfo] = {}
        self.result: Finished | None = None
        """What the last `train` ended with."""

    # --- life -------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._spawner = self._make_spawner()
        await self._spawner.open()
        self._pump = asyncio.create_task(self._read_reports())
        try:
            async with asyncio.timeout(START_S):
                await self._start_all()
                await self._until(lambda: self._assembled and all(node.address for node in self.nodes.values()))
        except TimeoutError:
            await self._close()
            late = [name for name, node in self.nodes.items() if node.address is None]
            raise Unavailable(
                f"the cluster was not ready after {START_S:g} s; not started yet: {', '.join(late) or 'none'}. "
                f"See {self._logs}"
            ) from None
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        self._closing = True
        # Shielded: a second Ctrl-C must not leave processes behind.
        await asyncio.shield(self._spawner.close())
        self._pump.cancel()
        with suppress(asyncio.CancelledError):
            await self._pump

    # --- what one does with a cluster -------------------------------------------------------------------

    async def train(self, rounds: int | None = None) -> AsyncIterator[RoundReport]:
        """Train so many more rounds (None: what the job has left), yielding each one's report.

        RunFailed when the run cannot go on.
        """
        self._events = asyncio.Queue()
        await self._order(Train(rounds=rounds))
        while True:
            event = await self._events.get()
            self._raise_failure()
            match event:
                case RoundReport():
                    yield event
                case Finished():
                    self.result = event
                    return
                case _:
                    pass

    async def start_split_server(self, name: str | None = None) -> str:
        """Start one more split server; its name, once it is ready."""
        number = sum(node.role is Role.SPLIT_SERVER for node in self.nodes.values())
        name = name or f"split-server-{number}"
        await self._start(name, Role.SPLIT_SERVER, {})
        async with asyncio.timeout(START_S):
            await self._until(lambda: self.nodes[name].address is not None)
        return name

    async def stop(self, name: str) -> None:
        """Ask one node to drain and leave, and wait until it has."""
        self._leaving.add(name)
        await self._spawner.stop(name)
        await self._until_gone(name)

    async def kill(self, name: str) -> None:
        """End one node at once, as a crash would, and wait until it is gone."""
        self._leaving.add(name)
        await self._spawner.kill(name)
        await self._until_gone(name)

    # --- starting ---------------------------------------------------------------------------------------

    @property
    def _logs(self) -> Path:
        return self._runs / "logs"

    def _make_spawner(self) -> Spawner:
        if not self._in_process:
            if not isinstance(self._job, str | Path):
                raise ConfigError(
                    "a job of real processes is a file, which each of them imports; give its path, or in_process=True"
                )
            return ProcessSpawner(Path(self._job), self._logs)
        from zsfl.cluster.in_process import InProcessSpawner
        from zsfl.learning.job import load_job

        return InProcessSpawner(load_job(Path(self._job)) if isinstance(self._job, str | Path) else self._job)

    def _shards(self) -> int:
        if self._clients is not None:
            return self._clients
        from zsfl.learning.job import load_job

        return (load_job(Path(self._job)) if isinstance(self._job, str | Path) else self._job).shards

    async def _start_all(self) -> None:
        shards = self._shards()
        if shards < 1:
            raise ConfigError("a cluster needs at least one client")
        await self._start("aggregator", Role.AGGREGATOR, {"hold": True})
        if not self._mdns:
            await self._until(lambda: self.nodes["aggregator"].address is not None)
        for number in range(self._split_servers):
            await self._start(f"split-server-{number}", Role.SPLIT_SERVER, {})
        processes = min(shards, self._client_processes or shards)
        for number in range(processes):
            first, last = number * shards // processes, (number + 1) * shards // processes - 1
            held = str(first) if first == last else f"{first}-{last}"
            await self._start(f"client-{held}", Role.CLIENT, {"shards": held})

    async def _start(self, name: str, role: Role, flags: Mapping[str, Any]) -> None:
        common: dict[str, Any] = {**self._settings, "mdns": self._mdns, "clients": self._clients}
        if not self._mdns and (aggregator := self.nodes.get("aggregator")) and aggregator.address:
            common["peers"] = (aggregator.address,)
        self.nodes[name] = NodeInfo(role)
        await self._spawner.start(NodeCommand(name=name, role=role, flags={**common, **flags}))

    # --- listening --------------------------------------------------------------------------------------

    async def _read_reports(self) -> None:
        while True:
            report = await self._spawner.reports.get()
            self._take(report)
            if self._on_report is not None:
                self._on_report(report)
            self._events.put_nowait(report)
            self._changed.set()

    def _take(self, report: AnyReport) -> None:
        node = self.nodes.get(report.node)
        match report:
            case Ready() if node is not None:
                node.pid, node.address = report.pid, Address(report.address)
            case Assembled():
                self._assembled = True
            case Failed():
                self._fail(report.node, f"{report.node}: {report.message}", report.kind)
            case Exited() if node is not None:
                node.exit_code = report.code
                how = f"was killed by signal {-report.code}" if report.code < 0 else f"ended with code {report.code}"
                self._fail(report.node, f"{report.node} {how}; see {self._logs / report.node}.log", "")
            case _:
                pass

    def _fail(self, name: str, message: str, kind: str) -> None:
        """A node ended that should not have: the end of the run, unless other split servers go on."""
        if self._closing:
            return
        node = self.nodes.get(name)
        servers = [
            other for other in self.nodes.values() if other.role is Role.SPLIT_SERVER and other.exit_code is None
        ]
        spare = node is not None and node.role is Role.SPLIT_SERVER and servers
        if name in self._leaving and node is not None and (node.role is Role.SPLIT_SERVER and servers):
            return
        if (not spare or kind == "ConfigError") and (self._failure is None or name == "aggregator"):
            self._failure = RunFailed(message)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _until(self, true: Callable[[], bool]) -> None:
        while not true():
            self._raise_failure()
            self._changed.clear()
            await self._changed.wait()
        self._raise_failure()

    async def _until_gone(self, name: str) -> None:
        async with asyncio.timeout(STOP_S):
            while self.nodes[name].exit_code is None:
                self._changed.clear()
                await self._changed.wait()

    async def _order(self, order: Train) -> None:
        address = self.nodes["aggregator"].address
        context = zmq.asyncio.Context()
        connection = Connection(
            context,
            f"tcp://{address}",
            peer="aggregator",
            own_id="cluster",
            limits=WireLimits(),
            counters=Counters(),
        )
        try:
            await connection.request(order, deadline_s=ORDER_S)
        finally:
            connection.close()
            context.destroy(linger=0)
