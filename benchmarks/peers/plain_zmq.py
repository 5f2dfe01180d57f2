"""The step alone: pyzmq and PyTorch, written plainly, with no guarantee of any kind.

The workload of benchmarks/jobs/microsfl.py: the same two exchanges of raw frames a step, body and graph on a split
server, a record with a checksum appended to a file by server and client. There is no aggregator, no version, no
discovery, no retry, no bound and no check of what comes, and nobody reads the records: what is left is what a step
costs on this machine, whoever makes it.

    python benchmarks/peers/plain_zmq.py --clients 20 --processes 20 --split-servers 2 --seconds 1.5

Writes one line: {"steps": ..., "seconds": ..., "bytes": ..., "client_cpu_s": ..., "server_cpu_s": ...}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Coroutine, Iterable
from ctypes import Array, c_int64
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
import zmq
import zmq.asyncio

import zsfl

ROOT = Path(__file__).resolve().parents[1]
BATCH, WIDTH = 64, 64
IN_FLIGHT = 4
"""Steps of one client."""
START_S, WARM_S, STOP_S = 60.0, 0.7, 5.0
FORWARD, BACKWARD = b"F", b"B"


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(-1, WIDTH)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().numpy().tobytes()


class _Records:
    """A file of records, each with its length and checksum."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def append(self, tensors: Iterable[torch.Tensor]) -> None:
        data = b"".join(map(_bytes, tensors))
        self._file.write(len(data).to_bytes(4, "little") + zlib.crc32(data).to_bytes(4, "little") + data)


async def serve(folder: Path, number: int) -> None:
    """Be a split server, until the process is ended."""
    body, records = zsfl.load_job(ROOT / "jobs" / "microsfl.py").build().body, _Records(folder / f"server-{number}")
    parameters = list(body.parameters())
    graphs: dict[bytes, torch.Tensor] = {}
    socket = zmq.asyncio.Context().socket(zmq.ROUTER)
    _tell(folder, number, socket.bind_to_random_port("tcp://127.0.0.1"))
    while True:
        who, kind, step, data = await socket.recv_multipart()
        if kind == FORWARD:
            graphs[who + step] = output = body(_tensor(data))
            await socket.send_multipart([who, kind, step, _bytes(output)])
        else:
            records.append(torch.autograd.grad(graphs.pop(who + step), parameters, _tensor(data)))
            await socket.send_multipart([who, kind, step, b""])


def _tell(folder: Path, number: int, port: int) -> None:
    """Tell the clients where a server is."""
    aside = folder / f".server-{number}"
    aside.write_text(f"tcp://127.0.0.1:{port}")
    aside.rename(_at(folder, number))


def _at(folder: Path, number: int) -> Path:
    return folder / f"server-{number}.address"


class Client:
    """One client: its shard, the frozen head, the tail."""

    def __init__(self, shard: int, clients: int, address: str, folder: Path, done: Array[c_int64]) -> None:
        job = zsfl.load_job(ROOT / "jobs" / "microsfl.py")
        model = job.build()
        assert model.tail is not None
        self._head, self._tail = model.head, model.tail
        self._parameters = list(model.tail.parameters())
        train: Any = job.data(shard, clients)[0]
        self._x, self._y = train.tensors
        self._shard, self._done, self._steps = shard, done, 0
        self._records = _Records(folder / f"client-{shard}")
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.connect(address)

    async def run(self) -> None:
        """Make steps until the process is ended."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read())
            for _ in range(IN_FLIGHT):
                tasks.create_task(self._make())

    async def _read(self) -> None:
        while True:
            kind, step, data = await self._socket.recv_multipart()
            self._waiting.pop(kind + step).set_result(data)

    async def _ask(self, kind: bytes, step: bytes, tensor: torch.Tensor) -> bytes:
        answer = self._waiting[kind + step] = asyncio.get_running_loop().create_future()
        await self._socket.send_multipart([kind, step, _bytes(tensor)])
        return await answer

    async def _make(self) -> None:
        while True:
            self._steps += 1
            step, first = self._steps.to_bytes(8, "little"), self._steps * BATCH % (len(self._x) - BATCH)
            with torch.no_grad():
                hidden = self._head(self._x[first : first + BATCH])
            cut = _tensor(await self._ask(FORWARD, step, hidden)).requires_grad_()
            loss = F.cross_entropy(self._tail(cut), self._y[first : first + BATCH], reduction="sum")
            grad, *grads = torch.autograd.grad(loss, [cut, *self._parameters])
            self._records.append(grads)
            await self._ask(BACKWARD, step, grad)
            self._done[self._shard] += 1


async def _be_clients(shards: range, clients: int, servers: int, folder: Path, done: Array[c_int64]) -> None:
    addresses = [_at(folder, number).read_text() for number in range(servers)]
    held = [Client(shard, clients, addresses[shard % servers], folder, done) for shard in shards]
    async with asyncio.TaskGroup() as tasks:
        for client in held:
            tasks.create_task(client.run())


def _cpu_s(processes: Iterable[BaseProcess]) -> float:
    return sum(sum(psutil.Process(one.pid).cpu_times()[:2]) for one in processes)


def measure(clients: int, processes: int, servers: int, seconds: float, folder: Path) -> dict[str, float]:
    """Start everybody, look for so long, end everybody."""
    # Forked, so that torch is imported once; nothing here has started a thread.
    fork = multiprocessing.get_context("fork")
    done: Any = fork.Array(c_int64, clients, lock=False)
    serving = [fork.Process(target=_run, args=(serve, folder, one), daemon=True) for one in range(servers)]
    asking: list[BaseProcess] = []
    try:
        for server in serving:
            server.start()
        _until(lambda: all(_at(folder, number).exists() for number in range(servers)))
        for number in range(processes):
            shards = range(number * clients // processes, (number + 1) * clients // processes)
            given = _be_clients, shards, clients, servers, folder, done
            asking.append(fork.Process(target=_run, args=given, daemon=True))
            asking[-1].start()
        _until(lambda: all(done))
        time.sleep(WARM_S)
        steps, begun_s, cpu = sum(done), time.perf_counter(), (_cpu_s(asking), _cpu_s(serving))
        time.sleep(seconds)
        steps, took_s = sum(done) - steps, time.perf_counter() - begun_s
        used = _cpu_s(asking) - cpu[0], _cpu_s(serving) - cpu[1]
    finally:
        for process in (*asking, *serving):
            process.kill()
            process.join(STOP_S)
    sent = steps * 3 * BATCH * WIDTH * 4
    return {"steps": steps, "seconds": took_s, "bytes": sent, "client_cpu_s": used[0], "server_cpu_s": used[1]}


def _run(work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
    asyncio.run(work(*args))


def _until(holds: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + START_S
    while not holds():
        if time.monotonic() > ends_s:
            raise TimeoutError(f"not everybody was there after {START_S:g} s")
        time.sleep(0.02)


def main() -> int:
    """Measure once, and say what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20, metavar="N")
    parser.add_argument("--processes", type=int, default=20, metavar="N", help="of the clients")
    parser.add_argument("--split-servers", type=int, default=2, metavar="N")
    parser.add_argument("--seconds", type=float, default=1.5, metavar="S")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="plain-zmq-") as folder:
        found = measure(args.clients, args.processes, args.split_servers, args.seconds, Path(folder))
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
