"""Nodes as processes of this machine, forked from one that has imported torch."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import suppress
from pathlib import Path

import msgspec

from zsfl.cluster.forkserver import GRACE_S
from zsfl.cluster.spawner import NodeCommand
from zsfl.cluster.talk import MAX_LINE_BYTES, Describe, Described, Introduced, Kill, Order, Printed, Spawn, read_told
from zsfl.errors import ConfigError, RunFailed
from zsfl.reports import AnyReport, Failed


class ProcessSpawner:
    """Drives a fork server (`zsfl.cluster.forkserver`)."""

    def __init__(self, job: Path, logs: Path) -> None:
        self._job = job
        self._logs = logs
        self._closing = False
        self._server: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._description: asyncio.Future[Described] | None = None
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
            *self._command(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._errors,
            limit=MAX_LINE_BYTES,
            start_new_session=True,
        )
        self._reader = asyncio.create_task(self._read(self._server))

    _errors: int | None = None
    """Where the fork server's own standard error goes."""

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "zsfl.cluster.forkserver", str(self._job)]

    def _log(self, name: str) -> str:
        """The file that takes what a node prints."""
        return str(self._logs / f"{name}.log")

    async def shards(self) -> int:
        """How many the job has, which is loaded there anyway; ConfigError when it cannot be."""
        self._description = asyncio.get_running_loop().create_future()
        await self._order(Describe())
        told = await self._description
        if told.error:
            raise ConfigError(told.error)
        return told.shards

    async def start(self, command: NodeCommand) -> None:
        """Have a node forked."""
        spawn = Spawn(name=command.name, role=command.role, flags=command.settings(), log=self._log(command.name))
        await self._order(spawn)

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

    async def _order(self, order: Order) -> None:
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
                # An empty line, or what the job prints while it is imported.
                with suppress(msgspec.MsgspecError, UnicodeDecodeError):
                    self._heard(line)
        except ValueError:  # a line that is longer than any can be
            server.kill()
        finally:
            if not self._closing:
                await self._died(server)

    def _heard(self, line: bytes) -> None:
        match told := read_told(line):
            case Described():
                if self._description is not None and not self._description.done():
                    self._description.set_result(told)
            case Introduced() | Printed():
                pass  # nobody asked
            case _:
                self.reports.put_nowait(told)

    async def _died(self, server: asyncio.subprocess.Process) -> None:
        message = f"the process that starts nodes ended; see {self._logs}"
        if self._description is not None and not self._description.done():
            self._description.set_exception(RunFailed(message))
        self.reports.put_nowait(Failed(node="cluster", kind="ZsflError", message=message))
