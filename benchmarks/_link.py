"""Steps of a client through a link of a given rate: real requests, real codecs, a simulated link.

Run as `python _link.py serve WIDTH` it is a split server, as `python _link.py shape MBIT_S PORT` a TCP proxy that
passes on so many bits a second each way, to PORT. Both print their port and end with their standard input.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
import zmq
from torch import nn

import zsfl
from zsfl.client.remote import RemoteBody
from zsfl.ids import NodeCard, NodeId, Role, RunId, Version, step_cid
from zsfl.learning.part import Part
from zsfl.metrics import Counters
from zsfl.settings import NodeSettings, WireLimits
from zsfl.spill.store import SpillStore
from zsfl.split_server.body import BodyWorker
from zsfl.tensors.codec import SPELLINGS, SUPPORTED, unpack
from zsfl.tensors.plan import CodecPlan
from zsfl.wire.connection import Connection
from zsfl.wire.fields import Load
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import Backward, Forward, Output, Reply, Request, Spilled
from zsfl.wire.server import Server

HOST, SERVER = os.environ.get("ZSFL_LINK_HOST", "127.0.0.1"), NodeId("0" * 12)
CHUNK_BYTES = 16 << 10
"""Passed on at once: about a dozen Ethernet frames."""
BURST_S = 4e-3
"""How much of what it was idle a link may make up for; threads wake up late by a part of it."""
LOAD = Load(slots=256, busy=0, service_s=0.001)
Answer = tuple[Reply, Sequence[Buffer]]


def _shape(mbit_s: float, port: int) -> None:
    """Pass on whatever comes, for ever."""
    listener = socket.create_server((HOST, 0))
    print(listener.getsockname()[1], flush=True)
    byte_s = 8e-6 / mbit_s
    free_s, locks = [0.0, 0.0], [threading.Lock(), threading.Lock()]

    def passed_on(come_from: socket.socket, to: socket.socket, way: int) -> None:
        with suppress(OSError):
            while data := come_from.recv(CHUNK_BYTES):
                with locks[way]:
                    free_s[way] = max(free_s[way], time.perf_counter() - BURST_S) + len(data) * byte_s
                    wait_s = free_s[way] - time.perf_counter()
                    if wait_s > 0:
                        time.sleep(wait_s)
                to.sendall(data)
        for end in (come_from, to):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    while True:
        here, _ = listener.accept()
        there = socket.create_connection((HOST, port))
        for one in (here, there):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for way, pair in enumerate(((here, there), (there, here))):
            threading.Thread(target=passed_on, args=(*pair, way), daemon=True).start()


def _body(width: int) -> nn.Module:
    """Of tensors [64, width]: MicroSFL's where they are its, else one with little to compute."""
    return nn.Sequential(nn.Linear(64, 64) if width == 64 else nn.LayerNorm(width), nn.ReLU())


def _no_data(_shard: int, _shards: int) -> Any:
    raise NotImplementedError("only the body runs here")


async def _serve(folder: Path, width: int) -> None:
    """A split server without its shell: the wire, the body and the spills are zsfl's own."""
    torch.set_num_threads(1)
    job = zsfl.Job(
        name="link",
        model=lambda: zsfl.SplitModel(head=nn.Identity(), body=_body(width), tail=nn.Identity()),
        loss=F.mse_loss,
        data=_no_data,
        optimizer=zsfl.sgd(lr=0.1),
    )
    body = job.build().body
    part = Part(body, "body", torch.device("cpu"))
    weights = part.load({f"body.{name}": tensor for name, tensor in body.state_dict().items()})
    spills = SpillStore(folder)
    worker = BodyWorker(job, part, spills, node="server", slots=LOAD.slots)

    def answer(request: Request, parts: Sequence[Buffer]) -> Answer | Awaitable[Answer]:
        if isinstance(request, Forward):
            output = worker.forward_all(weights, [(request, unpack(request.input, parts[0]))])[0]
            spec, data = SPELLINGS[request.reply_codec].pack("output", output)
            return Output(output=spec, load=LOAD), [data]
        assert isinstance(request, Backward)
        worker.backward_all(None, [(request, unpack(request.grad, parts[0]), None)])
        spills.release([request.cid])
        return Spilled(grad=None, loss_sum=None, load=LOAD), []

    server = Server(zmq.Context.instance(), HOST, 0, answer, limits=WireLimits(), counters=Counters())
    print(server.port, flush=True)
    await server.run()


class LinkNode:
    """What a client's `RemoteBody` needs of its node."""

    def __init__(self, context: zmq.Context[Any], codec: str, connections: int) -> None:
        self._context = context
        self.settings = NodeSettings(connections=connections)
        self.peer_codecs: dict[NodeId, tuple[str, ...]] = {SERVER: SUPPORTED}
        self.counters = Counters()
        self.body = RemoteBody(cast(Any, self), CodecPlan.parse(codec), random.Random(0))
        self._connections: list[Connection] = []

    def connect(self, card: NodeCard, port: int) -> Connection:
        """A connection through the shaped link."""
        connection = Connection(
            self._context,
            card.endpoint(port),
            peer=card.name,
            own_id=os.urandom(6).hex(),
            limits=WireLimits(),
            counters=self.counters,
        )
        self._connections.append(connection)
        return connection

    @property
    def connections(self) -> int:
        """How many were opened."""
        return len(self._connections)

    def waiting(self, _what: str) -> nullcontext[None]:
        """Nobody listens."""
        return nullcontext()

    def close(self) -> None:
        """Let go of all sockets."""
        for connection in self._connections:
            connection.close()


@dataclass(slots=True)
class Stepper:
    """A client of so many shards, which makes one step after another through one link."""

    node: LinkNode
    shards: int
    width: int
    count: int = 0

    async def run(self, seconds: float) -> float:
        """Steps a second, all shards together."""
        until_s, before, begun_s = time.perf_counter() + seconds, self.count, time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for shard in range(self.shards):
                tasks.create_task(self._shard(shard, until_s))
        return (self.count - before) / (time.perf_counter() - begun_s)

    def settled(self) -> dict[str, str]:
        """The codec last used for each role."""
        return {role: str(codec) for role, codec in self.node.body.codecs_in_use(SERVER).items()}

    async def _shard(self, shard: int, until_s: float) -> None:
        """Forward and backward of tensors as they are in the middle of training; head and tail are not computed."""
        draw = torch.Generator().manual_seed(shard)
        hidden, gradient = (torch.randn(64, self.width, generator=draw) * scale for scale in (1.0, 1e-3))
        while time.perf_counter() < until_s:
            self.count += 1
            cid = step_cid(RunId("000000"), shard, Version(0), self.count % 10**6)
            holder, _ = await self.node.body.forward(cid=cid, version=Version(0), seed=1, x=hidden, want_grad=False)
            request = partial(
                Backward, cid=cid, version=Version(0), seed=1, n=64.0, samples=64, want_grad=False, provenance="client"
            )
            await self.node.body.backward(holder, request, hidden, gradient)


def stepper(context: zmq.Context[Any], codec: str, port: int, shards: int, width: int, connections: int = 1) -> Stepper:
    """A client joined to the server behind that port."""
    node = LinkNode(context, codec, connections)
    node.body.joined(
        NodeCard(id=SERVER, name="server", role=Role.SPLIT_SERVER, host=HOST, control_port=1, data_port=port)
    )
    node.body.heard(SERVER, LOAD)
    return Stepper(node, shards, width)


@contextmanager
def program(*arguments: str, inside: Sequence[str] = (), host: str = HOST) -> Iterator[int]:
    """This file as a program, see above, begun by what is `inside` and at `host`; the port on which it listens."""
    process = subprocess.Popen(
        [*inside, sys.executable, __file__, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "ZSFL_LINK_HOST": host},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until_eof() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=_until_eof, daemon=True).start()
    if sys.argv[1] == "serve":
        with tempfile.TemporaryDirectory(prefix="zsfl-bench-") as name:
            asyncio.run(_serve(Path(name), int(sys.argv[2])))
    else:
        _shape(float(sys.argv[2]), int(sys.argv[3]))
