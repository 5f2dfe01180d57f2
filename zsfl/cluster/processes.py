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
from zsfl.errors import ConfigError, RunFailed
from zsfl.reports import AnyReport, Failed, from_line

MAX_LINE_BYTES = 1 << 24


class ProcessSpawner:
    """Drives a fork server (`zsfl.cluster.forkserver`)."""

    def __init__(self, job: Path, logs: Path) -> None:
        self._job = job
        self._logs = logs
        self._closing = False
        self._server: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self.reports: asyncio.Queue[AnyReport] = asyncio.Queue()

    async def open(self) -> None:
        """Start the fork server."""
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot write to {self._logs}: {error.strerror}; choose another folder with --runs"
            ) from error
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
        self._reader = asyncio.create_task(self._read(self._server))

    async def start(self, command: NodeCommand) -> None:
        """Have a node forked."""
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
        server = self._server
        if server is None:
            return
        # Not by closing its input, which it reads only once everything is imported.
        with suppress(ProcessLookupError):
            server.terminate()
        try:
            async with asyncio.timeout(3 * GRACE_S + 1):
                await server.wait()
        except TimeoutError:
            server.kill()
            await server.wait()
        # The output ends with the last node, even where nodes have to notice by themselves that the server is gone.
        if self._reader is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._reader, 2 * GRACE_S)

    async def _order(self, order: Spawn | Kill) -> None:
        if self._server is None or self._server.stdin is None:
            raise RunFailed("nodes can be started and ended only while the cluster runs")
        with suppress(ConnectionError):
            self._server.stdin.write(msgspec.json.encode(order) + b"\n")
            await self._server.stdin.drain()

    async def _read(self, server: asyncio.subprocess.Process) -> None:
        if server.stdout is None:
            return
        try:
            async for line in server.stdout:
                with suppress(msgspec.MsgspecError):  # an empty line, or what the job prints while it is imported
                    self.reports.put_nowait(from_line(line))
        finally:
            if not self._closing:
                self.reports.put_nowait(self._died())

    def _died(self) -> Failed:
        message = f"the process that starts nodes ended; see {self._logs}"
        return Failed(node="cluster", kind="ZsflError", message=message)
