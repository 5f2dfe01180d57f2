"""Nodes as processes of this machine, forked from one that has imported torch."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import suppress
from pathlib import Path

import msgspec

from zsfl.cluster.forkserver import GRACE_S, Kill, Spawn
from zsfl.cluster.spawner import NodeCommand
from zsfl.errors import ConfigError
from zsfl.reports import AnyReport, Exited, Failed, from_line

MAX_LINE_BYTES = 1 << 20


class ProcessSpawner:
    """Drives a fork server (`zsfl.cluster.forkserver`)."""

    def __init__(self, job: Path, logs: Path) -> None:
        self._job = job
        self._logs = logs
        self._names: set[str] = set()
        self._closing = False
        self._server: asyncio.subprocess.Process
        self._reader: asyncio.Task[None]
        self.reports: asyncio.Queue[AnyReport] = asyncio.Queue()

    async def open(self) -> None:
        """Start the fork server."""
        self._logs.mkdir(parents=True, exist_ok=True)
        # A session of its own, so that Ctrl-C reaches only us, and nodes leave in an orderly way.
        self._server = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "zsfl.cluster.forkserver",
            str(self._job),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=MAX_LINE_BYTES,
            start_new_session=True,
        )
        self._reader = asyncio.create_task(self._read())

    async def start(self, command: NodeCommand) -> None:
        """Have a node forked."""
        if command.name in self._names:
            raise ConfigError(f"there is a node {command.name} already; choose another name")
        self._names.add(command.name)
        log = self._logs / f"{command.name}.log"
        await self._order(Spawn(name=command.name, role=command.role, flags=command.settings(), log=str(log)))

    async def stop(self, name: str) -> None:
        """SIGTERM."""
        await self._order(Kill(name=name, signal=signal.SIGTERM))

    async def kill(self, name: str) -> None:
        """SIGKILL."""
        await self._order(Kill(name=name, signal=signal.SIGKILL))

    async def close(self) -> None:
        """End the fork server, which ends all nodes first."""
        self._closing = True
        if self._server.stdin is not None:
            self._server.stdin.close()
        try:
            async with asyncio.timeout(2 * GRACE_S + 1):
                await self._server.wait()
        except TimeoutError:
            self._server.kill()
            await self._server.wait()
        self._reader.cancel()
        with suppress(asyncio.CancelledError):
            await self._reader

    async def _order(self, order: Spawn | Kill) -> None:
        if self._server.stdin is None:
            raise ConfigError("the fork server was started without an input")
        with suppress(ConnectionError):
            self._server.stdin.write(msgspec.json.encode(order) + b"\n")
            await self._server.stdin.drain()

    async def _read(self) -> None:
        if self._server.stdout is None:
            return
        async for line in self._server.stdout:
            try:
                report = from_line(line)
            except msgspec.MsgspecError:
                continue  # a job file that prints
            if isinstance(report, Exited):
                self._names.discard(report.node)
            self.reports.put_nowait(report)
        if not self._closing:
            self.reports.put_nowait(self._died())

    def _died(self) -> Failed:
        message = f"the process that starts nodes ended; see {self._logs}"
        return Failed(node="cluster", kind="ZsflError", message=message)
