"""Nodes without a cluster around them: each can be started and lost by itself."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import zmq.asyncio
from helpers.network import Network, in_node
from helpers.waiting import until

import zsfl
from zsfl.ids import Role
from zsfl.reports import AnyReport, Met, Note, Ready, Waiting
from zsfl.roles import run_role
from zsfl.settings import NodeSettings


class Nodes:
    """Nodes of one job in this event loop, each started and cancelled by itself."""

    def __init__(self, job: zsfl.Job, runs: Path, network: Network | None = None) -> None:
        """With a `network` all their connections go through it."""
        self._network = network
        self._job = job
        self._runs = runs
        self._context = zmq.asyncio.Context()
        self.ready: asyncio.Queue[Ready] = asyncio.Queue()
        self.machines: dict[str, str] = {}
        """Of each node that is ready, by its own words."""
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.notes: list[str] = []
        self.awaited: list[str] = []
        self.met: list[Met] = []
        self.rounds: list[zsfl.RoundReport] = []
        self.lost_after_round: int | None = None
        """The aggregator is cancelled in the moment it reports this round."""

    async def start(self, name: str, role: Role, **flags: Any) -> str:
        """The address of a new node."""
        settings = NodeSettings(runs=self._runs, run="nodes", mdns=False, name=name, **flags)
        with in_node(name) if self._network else nullcontext():
            self.tasks[name] = asyncio.create_task(
                run_role(role, self._job, settings, self._report, context=self._context), name=name
            )
        ready, task = asyncio.ensure_future(self.ready.get()), self.tasks[name]
        await until(asyncio.wait((ready, task), return_when=asyncio.FIRST_COMPLETED))
        if not ready.done():
            ready.cancel()
            await task
            raise AssertionError(f"{name} has left before it was ready")
        address = ready.result().address
        if self._network:
            self._network.knows(name, address)
        return address

    def _report(self, report: AnyReport) -> None:
        match report:
            case Ready():
                self.machines[report.node] = report.machine
                self.ready.put_nowait(report)
            case Met():
                self.met.append(report)
            case Note():
                self.notes.append(report.message)
            case Waiting():
                self.awaited.append(report.what)
            case zsfl.RoundReport():
                self.rounds.append(report)
                if report.round == self.lost_after_round:
                    self.tasks[report.node].cancel()
            case _:
                pass

    async def close(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        self._context.destroy(linger=0)
