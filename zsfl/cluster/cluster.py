"""A whole cluster, as an async context manager."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from zsfl.cluster.chaos import Chaos, wreck
from zsfl.cluster.keeper import Keeper
from zsfl.cluster.metered import Metered
from zsfl.cluster.nodes import Leader, NodeInfo, death, given_up, how_to_start, is_done_without, port_again
from zsfl.cluster.orders import deadline, order
from zsfl.cluster.plan import Plan
from zsfl.cluster.spawner import NodeCommand, Spawner
from zsfl.errors import ConfigError, RemoteProtocolError, RunFailed, Unavailable
from zsfl.ids import Address, Role
from zsfl.reports import AnyReport, Assembled, Exited, Failed, Finished, Ready, RoundReport, Starting, reports_in
from zsfl.settings import load_settings
from zsfl.wire.messages import Train

START_S = 120.0
"""What a cluster may take until all nodes have found one another."""
MOST_ROUNDS = 1 << 30
MOST_PEERS = 16
"""Addresses that a node is told to find the others by."""
STOP_S = 60.0
"""What one node may take to leave."""
NOT_RUNNING = "this cluster is not running: use it inside its `async with` block"


class Cluster:
    """Starts the nodes of a run, watches them, and ends them all when its `async with` block is left, for whatever
    reason. Which nodes those are, and where, is for the classes below it to say.

    A node that fails, other than one of several split servers, is a RunFailed, or a ConfigError when its job or
    settings are wrong. Clients that leave or are killed are done without, as the job's mode says.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        *,
        mdns: bool,
        clients: int,
        keep_alive: bool = False,
        chaos: Chaos | None = None,
        on_report: Callable[[AnyReport], None] | None = None,
    ) -> None:
        """`settings` are those of all nodes; `clients` the shards in all, 0 as the job says."""
        self._base = load_settings({**settings, "mdns": mdns, "clients": clients}, os.environ)
        self._shards = clients
        self._mdns = mdns
        self._on_report = on_report
        self._chaos = chaos
        self._keeper = Keeper() if keep_alive or chaos else None
        # A name of its own, or two clusters of one job on one machine would find each other by mDNS.
        name = self._base.cluster or (secrets.token_hex(4) if self._mdns else "")
        self._settings = {**settings, "cluster": name, "runs": self._base.runs, "mdns": self._mdns, "metrics": ""}
        self._start_s = START_S
        """What a node that is started later may take until it is ready."""
        self._join_s = min(self._base.join_s, START_S)
        self._runs = self._base.runs
        self._metrics = Metered(self._base)
        self._leader = Leader()
        self._spawner: Spawner
        self._events: asyncio.Queue[AnyReport | None] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._assembled = self._closing = self._training = False
        self._rounds_done, self._reported, self._ordered_s = 0, 0, 0.0
        self._ordered: int | None = None
        """Rounds that are to be done in all; None: what the job says."""
        self._errands: set[asyncio.Task[None]] = set()
        self._failure: Exception | None = RunFailed(NOT_RUNNING)
        self._pump: asyncio.Task[None]
        self.nodes: dict[str, NodeInfo] = {}
        self.killed: list[str] = []
        """Whom `chaos` has killed so far."""
        self.result: Finished | None = None
        """What the last `train` ended with."""

    def _make_spawner(self) -> Spawner:
        """What starts the nodes."""
        raise NotImplementedError

    def _plan(self) -> Plan:
        """Which nodes there are."""
        raise NotImplementedError

    def _late(self) -> list[str]:
        """What is not ready yet."""
        return [name for name, node in self.nodes.items() if node.address is None]

    def _folder_of(self, report: Finished | Assembled) -> str:
        """Where what the run leaves is to be found, for people."""
        return report.folder

    def _rounds_in(self, folder: Path) -> Iterable[RoundReport]:
        """What an aggregator has left in its folder of its rounds."""
        return [one for one in reports_in(folder) if isinstance(one, RoundReport)]

    # --- life -------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._failure = None
        self._spawner = self._make_spawner()
        self._pump = asyncio.create_task(self._read_reports())
        try:
            async with asyncio.timeout(self._join_s):
                await self._spawner.open()
                await self._metrics.open(self._spawner.reports.put_nowait)
                await self._start_all()
        except TimeoutError:
            await self._close()
            late = self._late()
            raise Unavailable(
                f"the cluster was not ready after {self._join_s:g} s; not started yet: {', '.join(late) or 'none'}. "
                f"See {self._logs}" + ", and try mdns=False (--no-mdns) where multicast is blocked" * self._mdns
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
        self._fail(RunFailed(NOT_RUNNING))
        self._closing = True
        for errand in self._errands:
            errand.cancel()
        # Shielded: a second Ctrl-C must not leave processes behind.
        await asyncio.shield(self._spawner.close())
        self._pump.cancel()
        await asyncio.gather(self._pump, *self._errands, return_exceptions=True)
        await self._metrics.close()

    # --- what one does with a cluster -------------------------------------------------------------------

    async def train(self, rounds: int | None = None) -> AsyncGenerator[RoundReport, None]:
        """Train so many more rounds (None: what the job has left), yielding each one's report.

        Rounds that an earlier `train` left undone are done first. RunFailed when the run cannot go on.
        """
        if rounds is not None and not 1 <= rounds <= MOST_ROUNDS:
            raise ConfigError(f"{rounds} rounds cannot be trained: use a number from 1 to {MOST_ROUNDS}, or None")
        await self.until(lambda: not self._training)
        events = self._events = asyncio.Queue[AnyReport | None]()
        self._ordered = None if rounds is None else self._rounds_done + rounds
        self._training, self._ordered_s = True, time.monotonic()
        try:
            await self._give_order()
        except BaseException:
            self._training = False
            raise
        if self._chaos is not None:
            self._run_errand(wreck(self, self._chaos, self.killed))
            self._chaos = None
        while True:
            event = await events.get()
            match event:
                case RoundReport():
                    yield event
                case Finished():
                    self.result = event
                    return
                case _:
                    self._raise_failure()

    async def _start_and_wait(self, name: str, role: Role, flags: Mapping[str, Any]) -> str:
        node = await self._start(name, role, flags)
        async with deadline(self._start_s, f"{name} is not ready"):
            await self.until(lambda: node.address is not None or node.exit_code is not None)
        if node.exit_code is not None:
            raise death(name, node, self._logs)
        return name

    async def restart(self, name: str) -> str:
        """Start a client or split server again that has ended; its name, once it is ready."""
        if (node := self.nodes.get(name)) is None or node.exit_code is None:
            raise ConfigError(f"there is no node {name} that has ended; start another one with another name")
        return await self._start_and_wait(name, node.role, node.flags)

    @property
    def is_training(self) -> bool:
        """Whether an order to train is being carried out."""
        return self._training and not self._closing and self._failure is None

    async def stop(self, name: str) -> None:
        """Ask one node to drain and leave, and wait until it has."""
        await self._until_gone(name, self._spawner.stop)

    async def kill(self, name: str) -> None:
        """End one node at once, as a crash would, and wait until it is gone."""
        if name in self.nodes:
            self.nodes[name].was_killed = True
        await self._until_gone(name, self._spawner.kill)

    # --- starting ---------------------------------------------------------------------------------------

    @property
    def _logs(self) -> Path:
        return self._runs / "logs"

    async def _start_all(self) -> None:
        plan = self._plan()
        self._shards = plan.shards
        nodes = 1 + len(plan.split_servers) + len(plan.clients) + len(plan.standbys)
        self._spawner.reports.put_nowait(Starting(nodes=nodes))
        await self._start("aggregator", Role.AGGREGATOR, {"hold": True, **plan.aggregator})
        if not self._mdns:
            await self.until(lambda: self.nodes["aggregator"].address is not None)
        for name, flags in plan.split_servers.items():
            await self._start(name, Role.SPLIT_SERVER, flags)
        for name, flags in plan.clients.items():
            await self._start(name, Role.CLIENT, flags)
        await self.until(lambda: self._assembled and all(node.address for node in self.nodes.values()))
        for name, flags in plan.standbys.items():
            await self._start(name, Role.STANDBY, {"hold": True, **flags})
        await self.until(lambda: all(node.address for node in self.nodes.values()))

    async def _start(self, name: str, role: Role, flags: Mapping[str, Any]) -> NodeInfo:
        if name in self.nodes and self.nodes[name].exit_code is None:
            raise ConfigError(f"there is a node {name} already; choose another name")
        self.nodes[name] = NodeInfo(role, flags)
        await self._spawner.start(NodeCommand(name=name, role=role, flags=self._all_flags(role, flags)))
        return self.nodes[name]

    def _all_flags(self, role: Role, flags: Mapping[str, Any]) -> dict[str, Any]:
        """With those that all nodes have, for one that is started now."""
        common: dict[str, Any] = {**self._settings, "clients": self._shards, "port": 0}
        there = [other.address for other in self.nodes.values() if other.is_there]
        # The aggregator first, also while it is away: it comes back to its port, and all are to find one another there.
        if role is not Role.AGGREGATOR and self._leader.address and self._leader.address not in there[:1]:
            there.insert(0, self._leader.address)
        if not self._mdns and there:
            common["peers"] = tuple(there[:MOST_PEERS])
        again: dict[str, Any] = {"run": self._leader.run} if role is Role.STANDBY else {}
        if role is Role.AGGREGATOR and self._leader.run:
            again = {"resume": True, "run": self._leader.run, "port": port_again(self._leader.first)}
        return {**common, **flags, **again}

    # --- listening --------------------------------------------------------------------------------------

    async def _read_reports(self) -> None:
        while True:
            report = await self._spawner.reports.get()
            try:
                self._hear(report)
            except Exception as error:  # raised where the caller of this cluster waits
                self._fail(error)
            self._changed.set()

    def _hear(self, report: AnyReport) -> None:
        if isinstance(report, Finished):  # it may be that several aggregators made these rounds, one after another
            folder, seconds = self._folder_of(report), time.monotonic() - self._ordered_s
            report = msgspec.structs.replace(report, folder=folder, seconds=seconds)
        elif isinstance(report, Assembled):
            report = msgspec.structs.replace(report, folder=self._folder_of(report))
        self._take(report)
        self._metrics.tell(report)
        if self._on_report is not None and not self._closing:
            self._on_report(report)

    def _take(self, report: AnyReport) -> None:
        node = self.nodes.get(report.node)
        match report:
            case Ready() if node is not None:
                node.pid, node.address, node.ready_s = report.pid, Address(report.address), time.monotonic()
                if report.role == Role.AGGREGATOR:
                    self._leader.is_now(report.node, node.address)
                else:
                    self._leader.is_not(report.node)
            case Assembled():
                for round_ in self._rounds_in(Path(report.folder)) if self._assembled else ():
                    self._take(round_)
                self._assembled = True
                self._leader.run = self._leader.run or Path(report.folder).name
                self._rounds_done = max(self._rounds_done, report.rounds)
                if self._training:  # it was killed meanwhile, and its order with it
                    self._run_errand(self._give_order())
            case Failed():
                if node is None:
                    self._fail(RunFailed(report.message))
                else:
                    node.failed = report
            case Exited() if node is not None:
                node.exit_code = report.code
                self._leader.is_not(report.node)
                self._mind_the_death_of(report.node, node)
            case RoundReport() if report.round > self._reported:  # after a kill some may be told twice
                self._reported = report.round
                self._rounds_done = max(self._rounds_done, report.round)
                self._events.put_nowait(report)
            case Finished() if self._training and (report.early or report.rounds >= (self._ordered or 0)):
                self._training = False
                self._events.put_nowait(report)
            case _:
                pass

    def _mind_the_death_of(self, name: str, node: NodeInfo) -> None:
        """The run goes on without a client or split server that left, or was killed, as long as there is another.

        One that fails is another matter: something is wrong with the job, and with the next one it would be again.
        """
        if self._closing:
            return
        if self._assembled and self._keeper is not None:
            match self._keeper.decide(name, node, time.monotonic()):
                case "start again":
                    return self._run_errand(self._revive(name))
                case "give up":
                    return self._fail(given_up(name, node, self._logs, self._keeper.early[name]))
                case "let go":
                    pass
        if self._assembled and is_done_without(node, self.nodes.values()):
            if advice := how_to_start(name, node, self._logs, self._command_for(name, node)):
                self._spawner.reports.put_nowait(advice)
            return
        # What the others know of a failed run they have from the aggregator, whose own words are on the way.
        if node.role is Role.AGGREGATOR or node.failed is None or node.failed.kind != "RunFailed":
            self._fail(death(name, node, self._logs))

    def _command_for(self, name: str, node: NodeInfo) -> str:
        """What starts it by hand; empty where nothing does."""
        return ""

    def _fail(self, error: Exception) -> None:
        """The first failure is the one to tell of."""
        self._failure = self._failure or error
        self._events.put_nowait(None)
        self._changed.set()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def until(self, true: Callable[[], object]) -> None:
        """Returns once `true` is, which is looked at whenever a node has said something; raises what the cluster fails
        with.
        """
        self._raise_failure()
        while not true():
            self._changed.clear()
            await self._changed.wait()
            self._raise_failure()

    async def _until_gone(self, name: str, end: Callable[[str], Awaitable[None]]) -> None:
        node = self.nodes.get(name)
        if node is None:
            raise ConfigError(f"there is no node {name}; there are {', '.join(self.nodes)}")
        await end(name)
        async with deadline(STOP_S, f"{name} has not left"):
            while node.exit_code is None:
                self._changed.clear()
                await self._changed.wait()

    def _run_errand(self, work: Coroutine[Any, Any, object]) -> None:
        """Do `work` beside everything else; what goes wrong is told where the caller of this cluster waits."""

        async def run() -> None:
            try:
                await work
            except Exception as error:
                self._fail(error)

        task = asyncio.create_task(run())
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    async def _revive(self, name: str) -> None:
        """Start a killed node again, unless it is killed once more meanwhile: then that is seen to in its turn."""
        with suppress(RunFailed):
            await self.restart(name)

    async def _give_order(self) -> None:
        """Have the aggregator train; whoever aggregates next, should it be killed, is told once all are assembled."""
        if not self._leader.leads:
            return
        try:
            await order(self.nodes[self._leader.name].address, Train(rounds=self._ordered), self._base)
        except (Unavailable, RemoteProtocolError):  # the latter where it stands by since a moment ago
            if self._keeper is None and not any(node.role is Role.STANDBY for node in self.nodes.values()):
                raise
