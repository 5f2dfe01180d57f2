"""Nodes as tasks of this event loop: same nodes, same messages, one process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import zmq.asyncio

from zsfl.cluster.spawner import NodeCommand
from zsfl.errors import RunFailed
from zsfl.front import failed
from zsfl.ids import AGGREGATING, Role
from zsfl.lane import compute
from zsfl.learning.job import Job
from zsfl.reports import AnyReport, Exited
from zsfl.roles import run_role
from zsfl.settings import load_settings
from zsfl.wire.sockets import open_context

GRACE_S = 4.0
"""What nodes may take to leave once they are asked to, before they are cancelled."""


@dataclass(frozen=True, slots=True)
class _Running:
    role: Role
    task: asyncio.Task[None]
    stop: asyncio.Event


async def _end(nodes: Sequence[_Running]) -> None:
    for node in nodes:
        node.stop.set()
    if nodes:
        _, late = await asyncio.wait([node.task for node in nodes], timeout=GRACE_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)


class InProcessSpawner:
    """Runs every node in the present event loop."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._nodes: dict[str, _Running] = {}
        self._context: zmq.asyncio.Context | None = None
        self.reports: asyncio.Queue[AnyReport] = asyncio.Queue()

    async def open(self) -> None:
        """One ZeroMQ context serves all."""
        self._context = open_context()

    async def start(self, command: NodeCommand) -> None:
        """Start a node as a task."""
        stop = asyncio.Event()
        if self._context is None:
            raise RunFailed("nodes can be started only while the cluster runs")
        task = asyncio.create_task(self._run(command, self._context, stop), name=command.name)
        self._nodes[command.name] = _Running(command.role, task, stop)

    async def stop(self, name: str) -> None:
        """Ask it to drain."""
        if name in self._nodes:
            self._nodes[name].stop.set()

    async def kill(self, name: str) -> None:
        """Cancel its task: sudden, though unlike a killed process it still closes its sockets and says goodbye."""
        if name in self._nodes:
            self._nodes[name].task.cancel()

    async def close(self) -> None:
        """Ask all to leave, wait, and close the context."""
        aggregating = [node for node in self._nodes.values() if node.role in AGGREGATING]
        await _end(aggregating)
        await _end([*self._nodes.values()])
        if self._context is not None:
            self._context.destroy(linger=0)

    async def _run(self, command: NodeCommand, context: zmq.asyncio.Context, stop: asyncio.Event) -> None:
        code = 1
        try:
            settings = load_settings(command.settings(), os.environ)
            # As a node of its own process does: the last bits of a sum depend on how many threads make it.
            await compute(torch.set_num_threads, settings.threads)
            await run_role(command.role, self._job, settings, self.reports.put_nowait, context=context, stop=stop)
            code = 0
        except Exception as error:
            self.reports.put_nowait(failed(command.name, error))
        finally:
            self._nodes.pop(command.name, None)
            self.reports.put_nowait(Exited(node=command.name, code=code))
