"""Nodes as tasks of this event loop: same nodes, same messages, one process."""

from __future__ import annotations

import asyncio
import os

import zmq.asyncio

from zsfl.cluster.spawner import NodeCommand
from zsfl.errors import ConfigError, ZsflError
from zsfl.learning.job import Job
from zsfl.node import failed
from zsfl.reports import AnyReport, Exited
from zsfl.roles import run_role
from zsfl.settings import load_settings


class InProcessSpawner:
    """Runs every node in the present event loop."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._nodes: dict[str, tuple[asyncio.Task[None], asyncio.Event]] = {}
        self._context: zmq.asyncio.Context
        self.reports: asyncio.Queue[AnyReport] = asyncio.Queue()

    async def open(self) -> None:
        """One ZeroMQ context serves all."""
        self._context = zmq.asyncio.Context()

    async def start(self, command: NodeCommand) -> None:
        """Start a node as a task."""
        if command.name in self._nodes:
            raise ConfigError(f"there is a node {command.name} already; choose another name")
        stop = asyncio.Event()
        task = asyncio.create_task(self._run(command, stop), name=command.name)
        self._nodes[command.name] = task, stop

    async def stop(self, name: str) -> None:
        """Ask it to drain."""
        if name in self._nodes:
            self._nodes[name][1].set()

    async def kill(self, name: str) -> None:
        """Cancel its task."""
        if name in self._nodes:
            self._nodes[name][0].cancel()

    async def close(self) -> None:
        """Ask all to leave, wait, and close the context."""
        tasks = [task for task, _ in self._nodes.values()]
        for _, stop in self._nodes.values():
            stop.set()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=4.0)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        self._context.destroy(linger=0)

    async def _run(self, command: NodeCommand, stop: asyncio.Event) -> None:
        code = 1
        try:
            settings = load_settings(command.settings(), os.environ)
            await run_role(command.role, self._job, settings, self.reports.put_nowait, context=self._context, stop=stop)
            code = 0
        except ZsflError as error:
            self.reports.put_nowait(failed(command.name, error))
        finally:
            self._nodes.pop(command.name, None)
            self.reports.put_nowait(Exited(node=command.name, code=code))
