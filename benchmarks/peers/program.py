"""What the contestants share: the interface of an asker, and server programs that do not outlive who started them."""

from __future__ import annotations

import asyncio
import importlib
import math
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress
from pathlib import Path
from typing import Protocol, cast

HOST = "127.0.0.1"
START_S = 30.0
"""How long a server program may take until it listens."""
END_S = 5.0
"""How long a server program may take to end before it is killed."""
ASK_S = 60.0
"""How long any one answer is waited for."""
FOLDER = Path(__file__).resolve().parent.parent

Buffer = bytes | bytearray | memoryview
Listening = Callable[[int], None]
"""Called with the port, once, when questions may come."""


class Asker(Protocol):
    """One client of one server; any number of questions may be open at once."""

    async def ask(self, payload: bytes) -> Buffer:
        """What the server sends back: the payload. An error when there is no answer."""
        ...

    async def close(self) -> None:
        """Let go of all sockets."""
        ...


def serve_until_eof(serve: Callable[[Listening], Awaitable[None]]) -> None:
    """Run a server program: print the port when it listens, end when standard input does."""
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve_until_eof(serve))


async def _serve_until_eof(serve: Callable[[Listening], Awaitable[None]]) -> None:
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), over.set)
    serving = asyncio.ensure_future(serve(lambda port: print(port, flush=True)))
    waiting = asyncio.create_task(over.wait())
    await asyncio.wait([serving, waiting], return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    serving.cancel()
    await asyncio.wait([serving], timeout=END_S)


def cpu_s(pid: int) -> float:
    """Seconds of a core that all threads of a process have used so far; NaN where only Linux would tell."""
    try:
        threads = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    except OSError:
        return math.nan
    return sum(int(text.split()[0]) for text in threads) / 1e9 if threads else math.nan


@asynccontextmanager
async def started(
    name: str, way_to: Callable[[int], AbstractContextManager[int]] = nullcontext
) -> AsyncIterator[tuple[Asker, int]]:
    """An asker joined to a server program of this contestant in a process of its own, and that process's id.

    `way_to` gives the port by which the server's own is reached.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        f"peers.{name}",
        cwd=FOLDER,
        env={**os.environ, "PYTHONPATH": _absolute(os.environ.get("PYTHONPATH", ""))},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), START_S)
        if not line:
            raise RuntimeError(f"the server program peers.{name} ended before it listened; what it said is above")
        connect = cast("Callable[[int], Awaitable[Asker]]", importlib.import_module(f"peers.{name}").connect)
        with way_to(int(line)) as port:
            asker = await connect(port)
            try:
                yield asker, process.pid
            finally:
                await asker.close()
    finally:
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), END_S)
        except TimeoutError:
            process.kill()
            await process.wait()


def _absolute(path: str) -> str:
    """A search path that means the same in another folder."""
    return os.pathsep.join(str(Path(part).absolute()) for part in path.split(os.pathsep) if part)
