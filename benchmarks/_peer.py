"""The baselines: the one over HTTP (peers/http_json.py) is started once, waits between its bounded loads and costs
nothing meanwhile; the step alone (peers/plain_zmq.py) is a program that ends each time.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

PEERS = Path(__file__).parent / "peers"
NEEDS = ("fastapi", "uvicorn", "httpx")
START_S, LOAD_S, STOP_S = 60.0, 120.0, 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLoad:
    """One bounded load of a baseline."""

    steps: int
    seconds: float
    bytes: int
    """Bodies of requests and answers."""
    client_cpu_s: float
    server_cpu_s: float

    @property
    def steps_per_s(self) -> float:
        return self.steps / self.seconds


class HttpPeer:
    """A running server, and clients that wait for orders."""

    def __init__(self, server: asyncio.subprocess.Process, clients: asyncio.subprocess.Process) -> None:
        self._server = server
        self._clients = clients

    async def load(self, *, windows: int, steps: int) -> PeerLoad:
        """Have every client make so many steps in each of so many windows."""
        before = _cpu_s(self._clients.pid), _cpu_s(self._server.pid)
        assert self._clients.stdin is not None
        self._clients.stdin.write(json.dumps({"windows": windows, "steps": steps}).encode() + b"\n")
        await self._clients.stdin.drain()
        done = await _line(self._clients, LOAD_S)
        after = _cpu_s(self._clients.pid), _cpu_s(self._server.pid)
        return PeerLoad(
            steps=done["steps"],
            seconds=done["seconds"],
            bytes=done["bytes"],
            client_cpu_s=after[0] - before[0],
            server_cpu_s=after[1] - before[1],
        )


def missing() -> list[str]:
    """The packages that the baseline needs and that are not installed."""
    return [name for name in NEEDS if importlib.util.find_spec(name) is None]


@asynccontextmanager
async def http_peer(*, clients: int, processes: int) -> AsyncIterator[HttpPeer]:
    """The baseline with so many clients, which share so many processes; ended with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = ("--clients", str(clients), "--port", str(port))
    program = "http_json.py"
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(_program(program, "server", *common))
        driver = await stack.enter_async_context(_program(program, "clients", "--processes", str(processes), *common))
        await _line(driver, START_S)
        async with asyncio.timeout(START_S):
            while not await _answers(port):
                if server.returncode is not None:
                    raise RuntimeError(f"the HTTP baseline's server ended with code {server.returncode}")
                await asyncio.sleep(0.05)
        yield HttpPeer(server, driver)


async def step_alone(*, clients: int, processes: int, split_servers: int, seconds: float) -> PeerLoad:
    """What the step alone does for so long, with so many clients, which share so many processes."""
    numbers = {"clients": clients, "processes": processes, "split-servers": split_servers, "seconds": seconds}
    flags = [word for name, number in numbers.items() for word in (f"--{name}", str(number))]
    async with _program("plain_zmq.py", *flags) as process:
        return PeerLoad(**await _line(process, LOAD_S))


@asynccontextmanager
async def _program(name: str, *args: str) -> AsyncIterator[asyncio.subprocess.Process]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, str(PEERS / name), *args, stdin=pipe, stdout=pipe)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _line(process: asyncio.subprocess.Process, seconds: float) -> dict[str, Any]:
    assert process.stdout is not None
    async with asyncio.timeout(seconds):
        line = await process.stdout.readline()
    if not line:
        raise RuntimeError(f"a baseline ended with code {await process.wait()}")
    return json.loads(line)


async def _answers(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return True


def _cpu_s(pid: int) -> float:
    """Of a process and its children."""
    process = psutil.Process(pid)
    return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children(recursive=True)))
