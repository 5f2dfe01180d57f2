"""Split federated learning as it is usually built: HTTP, tensors as JSON lists, a torch.save for each batch.

The workload of benchmarks/jobs/microsfl.py: one server process (FastAPI, uvicorn), clients (httpx) as processes of
their own or all in one. The server runs the body, keeps the graph of each forward until its backward, saves each
batch's gradients as a file, and once all clients are done with a window loads the files, averages by samples and
steps body and tail. What a careful author would do is done: connections are kept, the model never leaves the thread
that serves, uvloop and httptools serve where they are installed, answers skip FastAPI's slow encoder, no client waits
for another within a window.

    python benchmarks/peers/http_json.py server --clients 20 --port 8000
    python benchmarks/peers/http_json.py clients --clients 20 --processes 20 --port 8000

`clients` reads one JSON order a line from standard input, {"windows": 2, "steps": 8}, and writes one line when all
are done: {"steps": ..., "seconds": ..., "bytes": ...}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import zsfl

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 60.0
BATCH = 64
Lists = list[Any]


def the_job() -> zsfl.Job:
    """The workload; its network, data and learning rate are the same for all."""
    return zsfl.load_job(ROOT / "jobs" / "microsfl.py")


# --- server ---------------------------------------------------------------------------------------------------


class Averaging:
    """The body, the master copy of the tail, and the files in between."""

    def __init__(self, clients: int, folder: Path) -> None:
        job = the_job()
        model = job.build()
        assert model.tail is not None
        self.body, self.tail = model.body, model.tail
        self._clients = clients
        self._folder = folder
        self._graphs: dict[int, torch.Tensor] = {}
        self._waiting: list[tuple[float, Lists]] = []
        self._whole = asyncio.Condition()
        self._windows = 0
        self._files = 0
        self._optimizer = torch.optim.SGD([*self.body.parameters(), *self.tail.parameters()], **job.optimizer.options)

    def forward(self, client: int, activations: Lists) -> Lists:
        """Output of the body [B, 64]; its graph is kept for the client's backward."""
        output = self.body(torch.tensor(activations))
        self._graphs[client] = output
        return output.tolist()

    def backward(self, client: int, grad: Lists) -> None:
        """Gradients of one batch, summed over its samples, saved as one file."""
        given = torch.tensor(grad)
        grads = torch.autograd.grad(self._graphs.pop(client), list(self.body.parameters()), given)
        self._files += 1
        torch.save({"grads": grads, "samples": len(given)}, self._folder / f"{self._files}.pt")

    async def window(self, tail_grads: Lists, samples: float) -> Lists:
        """The tail's new weights, once all clients have handed in what they have summed."""
        async with self._whole:
            self._waiting.append((samples, tail_grads))
            if len(self._waiting) == self._clients:
                self._step()
                self._windows += 1
                self._whole.notify_all()
            else:
                mine = self._windows
                await self._whole.wait_for(lambda: self._windows > mine)
        return [parameter.tolist() for parameter in self.tail.parameters()]

    def _step(self) -> None:
        samples = sum(count for count, _ in self._waiting)
        for number, parameter in enumerate(self.tail.parameters()):
            parameter.grad = torch.stack([torch.tensor(grads[number]) for _, grads in self._waiting]).sum(0) / samples
        self._waiting.clear()
        paths = list(self._folder.glob("*.pt"))
        saved = [torch.load(path, weights_only=True) for path in paths]
        samples = sum(one["samples"] for one in saved)
        for number, parameter in enumerate(self.body.parameters()):
            parameter.grad = torch.stack([one["grads"][number] for one in saved]).sum(0) / samples
        self._optimizer.step()
        for path in paths:
            path.unlink()


def serve(clients: int, port: int) -> None:
    """Serve until SIGTERM."""
    import uvicorn  # pyright: ignore[reportMissingImports]
    from fastapi import FastAPI  # pyright: ignore[reportMissingImports]
    from fastapi.responses import JSONResponse  # pyright: ignore[reportMissingImports]
    from pydantic import BaseModel  # pyright: ignore[reportMissingImports]

    class Forward(BaseModel):
        client: int
        activations: list[list[float]]

    class Backward(BaseModel):
        client: int
        grad: list[list[float]]

    class Window(BaseModel):
        samples: float
        grads: list[Any]

    app = FastAPI()
    with tempfile.TemporaryDirectory(prefix="http-json-") as folder:
        state = Averaging(clients, Path(folder))

        async def forward(asked: Forward) -> JSONResponse:
            return JSONResponse(state.forward(asked.client, asked.activations))

        async def backward(asked: Backward) -> JSONResponse:
            state.backward(asked.client, asked.grad)
            return JSONResponse({})

        async def window(asked: Window) -> JSONResponse:
            return JSONResponse(await state.window(asked.grads, asked.samples))

        # Annotations are text in this module, and FastAPI cannot find classes of a function by name.
        served = (("/forward", forward, Forward), ("/backward", backward, Backward), ("/window", window, Window))
        for path, handler, model in served:
            handler.__annotations__["asked"] = model
            app.post(path, response_model=None)(handler)
        uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


# --- clients --------------------------------------------------------------------------------------------------


class HttpClient:
    """One client: its shard, the frozen head, the tail."""

    def __init__(self, shard: int, clients: int, url: str) -> None:
        job = the_job()
        model = job.build()
        assert model.tail is not None
        self._head, self._tail = model.head, model.tail
        self._shard = shard
        self._url = url
        self._train: Any = job.data(shard, clients)[0]
        self._order = torch.Generator().manual_seed(shard)
        self._rows: list[torch.Tensor] = []
        self.bytes = 0

    async def run(self, http: Any, windows: int, steps: int) -> int:
        """Make so many steps in each of so many windows; how many they were."""
        for _ in range(windows):
            sums, samples = [torch.zeros_like(parameter) for parameter in self._tail.parameters()], 0
            for _ in range(steps):
                rows = self._next_rows()
                x, y = (tensor[rows] for tensor in self._train.tensors)
                grads = await self._step(http, x, y)
                samples += len(y)
                for total, grad in zip(sums, grads, strict=True):
                    total += grad
            new = await self._post(http, "/window", {"samples": samples, "grads": [one.tolist() for one in sums]})
            with torch.no_grad():
                for parameter, value in zip(self._tail.parameters(), new, strict=True):
                    parameter.copy_(torch.tensor(value))
        return windows * steps

    def _next_rows(self) -> torch.Tensor:
        if not self._rows:
            order = torch.randperm(len(self._train), generator=self._order)
            self._rows = [rows for rows in order.split(BATCH) if len(rows) == BATCH]
        return self._rows.pop()

    async def _step(self, http: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            hidden = self._head(x)
        output = await self._post(http, "/forward", {"client": self._shard, "activations": hidden.tolist()})
        cut = torch.tensor(output, requires_grad=True)
        loss = F.cross_entropy(self._tail(cut), y, reduction="sum")
        grad, *grads = torch.autograd.grad(loss, [cut, *self._tail.parameters()])
        await self._post(http, "/backward", {"client": self._shard, "grad": grad.tolist()})
        return tuple(grads)

    async def _post(self, http: Any, path: str, what: dict[str, Any]) -> Any:
        sent = json.dumps(what).encode()
        answer = await http.post(self._url + path, content=sent, headers={"content-type": "application/json"})
        answer.raise_for_status()
        self.bytes += len(sent) + len(answer.content)
        return answer.json()


async def _obey(orders: Connection, held: list[HttpClient]) -> None:
    """Carry out orders from the parent until there are no more."""
    import httpx  # pyright: ignore[reportMissingImports]

    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=len(held))) as http:
        while (order := await asyncio.to_thread(_next_order, orders)) is not None:
            before = sum(client.bytes for client in held)
            done = await asyncio.gather(*(client.run(http, **order) for client in held))
            orders.send((sum(done), sum(client.bytes for client in held) - before))


def _next_order(orders: Connection) -> dict[str, int] | None:
    try:
        return orders.recv()
    except EOFError:
        return None


def _be_clients(orders: Connection, shards: range, clients: int, port: int) -> None:
    torch.set_num_threads(1)
    held = [HttpClient(shard, clients, f"http://127.0.0.1:{port}") for shard in shards]
    orders.send(len(held))
    asyncio.run(_obey(orders, held))


def drive(clients: int, processes: int, port: int) -> None:
    """Fork the clients, and pass orders from standard input on to them."""
    # Forked, so that torch is imported once; nothing here has started a thread.
    fork = multiprocessing.get_context("fork")
    pipes: list[Connection] = []
    for number in range(processes):
        ours, theirs = fork.Pipe()
        shards = range(number * clients // processes, (number + 1) * clients // processes)
        child = fork.Process(target=_child, args=(theirs, [*pipes, ours], shards, clients, port), daemon=True)
        child.start()
        theirs.close()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    _say({"pid": os.getpid()})
    for line in sys.stdin:
        order, begun_s = json.loads(line), time.perf_counter()
        for pipe in pipes:
            pipe.send(order)
        done = [pipe.recv() for pipe in pipes]
        seconds = time.perf_counter() - begun_s
        _say({"steps": sum(steps for steps, _ in done), "seconds": seconds, "bytes": sum(sent for _, sent in done)})


def _child(orders: Connection, inherited: list[Connection], shards: range, clients: int, port: int) -> None:
    for pipe in inherited:  # or it would never learn that the parent is gone
        pipe.close()
    _be_clients(orders, shards, clients, port)


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


def main() -> int:
    """Be the server or the clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=["server", "clients"])
    parser.add_argument("--clients", type=int, default=20, metavar="N")
    parser.add_argument("--processes", type=int, default=20, metavar="N", help="of the clients")
    parser.add_argument("--port", type=int, required=True, metavar="PORT")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.role == "server":
        serve(args.clients, args.port)
    else:
        drive(args.clients, args.processes, args.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
