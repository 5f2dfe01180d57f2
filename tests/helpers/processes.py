"""Commands under test as real processes, and what is left of them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil
from helpers.waiting import HANG_S, eventually

from zsfl.ids import Address
from zsfl.reports import AnyReport, Failed, Ready, from_line

MARK = "ZSFL_TEST_MARK"
"""Environment variable by which a test knows the processes that it started, however they are related."""


def marked(mark: str) -> list[int]:
    """Processes whose environment began with `mark`; zombies have none."""
    found: list[int] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark:
                found.append(process.pid)
    return found


class Command:
    """One running command: what it has said so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.out: list[str] = []
        self.err: list[str] = []

    @property
    def text(self) -> str:
        """Standard output and error, for messages."""
        return "".join([*self.out, *self.err])

    def reports(self) -> list[AnyReport]:
        """What it has reported."""
        return [from_line(line) for line in self.out if line.startswith("{") and line.endswith("\n")]

    def failed(self) -> Failed | None:
        """Its last words as a node, if it had any."""
        return next((report for report in self.reports() if isinstance(report, Failed)), None)

    def signal(self, number: int) -> None:
        """Signal its process group, as the terminal does."""
        os.killpg(self.process.pid, number)

    async def address(self) -> Address:
        """Where the node listens, once it is ready."""
        await eventually(lambda: self.process.returncode is not None or self._ready())
        ready = self._ready()
        assert ready, self.text
        return Address(ready.address)

    def _ready(self) -> Ready | None:
        return next((report for report in self.reports() if isinstance(report, Ready)), None)

    async def ended(self, deadline_s: float = HANG_S) -> int:
        """Its exit code, once it and its output have ended."""
        async with asyncio.timeout(deadline_s):
            code = await self.process.wait()
            await asyncio.gather(*self.reading)
        return code

    reading: tuple[asyncio.Task[None], ...] = ()


@asynccontextmanager
async def command(
    *args: str | Path, cwd: Path, prefix: tuple[str, ...] = (), run: tuple[str, ...] = ("-m", "zsfl")
) -> AsyncIterator[Command]:
    """`python -m zsfl ARGS` in a session of its own; killed, with all of its group, on the way out."""
    process = await asyncio.create_subprocess_exec(
        *prefix,
        sys.executable,
        *run,
        *map(str, args),
        cwd=cwd,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    running = Command(process)
    assert process.stdout is not None
    assert process.stderr is not None
    running.reading = (
        asyncio.create_task(_collect(process.stdout, running.out)),
        asyncio.create_task(_collect(process.stderr, running.err)),
    )
    try:
        yield running
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await running.ended()


async def _collect(stream: asyncio.StreamReader, lines: list[str]) -> None:
    async for line in stream:
        lines.append(line.decode())


async def finished(*args: str | Path, cwd: Path) -> tuple[int, Command]:
    """Run a command to its end."""
    async with command(*args, cwd=cwd) as running:
        return await running.ended(), running
