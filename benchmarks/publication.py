"""How long weights take to all who listen, beside a bare PUB socket that sends the same bytes.

    python benchmarks/publication.py

Publisher in this process, all subscribers in another one: what is measured is the way, not who computes beside it.
Then how long a version is, and what packing it costs, where the job has its weights travel compressed.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, cast

import torch
import zmq
from _figures import Figure, add_json_flag, hand_over
from _record import circumstances, table, write

from zsfl.ids import BODY, Version
from zsfl.metrics import Counters
from zsfl.settings import WireLimits
from zsfl.tensors.codec import Codec, unpack
from zsfl.weights.packing import Base, State, pack, unpacked
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import Broadcast, Weights
from zsfl.wire.pubsub import BROADCAST_QUEUE, Publisher, Subscriber
from zsfl.wire.sockets import open_socket

BUDGET_S = 40
IN_THE_LOT = ("--repeat", "3")

HOST = "127.0.0.1"
LIMITS = WireLimits()
TENSORS = 20
SETTLE_S = 0.3
"""What connecting and subscribing may take."""


def state_of(size: int) -> dict[str, torch.Tensor]:
    """Weights of so many bytes."""
    each = size // TENSORS // 4
    return {f"body.{number}.weight": torch.randn(each) for number in range(TENSORS)}


# --- the listening process -------------------------------------------------------------------------------


def listen_bare(pipe: Connection, port: int, listeners: int) -> None:
    """SUB sockets that take what comes; says when each has had `bytes` of it."""
    context: zmq.Context[Any] = zmq.Context()
    sockets: list[zmq.Socket[bytes]] = [context.socket(zmq.SUB) for _ in range(listeners)]
    poller = zmq.Poller()
    for socket in sockets:
        socket.set_hwm(BROADCAST_QUEUE)
        socket.subscribe(b"")
        socket.connect(f"tcp://{HOST}:{port}")
        poller.register(socket, zmq.POLLIN)
    pipe.send("listening")
    while (size := cast("int | None", pipe.recv())) is not None:
        left = dict.fromkeys(sockets, size)
        while any(rest > 0 for rest in left.values()):
            for socket, _ in poller.poll():
                _topic, *frames = socket.recv_multipart(copy=False)
                left[socket] -= sum(map(len, frames))
        pipe.send("done")
    context.destroy(linger=0)


def listen_zsfl(pipe: Connection, port: int, listeners: int) -> None:
    """Subscribers as nodes have them, whose weights end as tensors; says when each has had a version."""
    asyncio.run(_listen(pipe, port, listeners))


async def _listen(pipe: Connection, port: int, listeners: int) -> None:
    context: zmq.Context[Any] = zmq.Context()
    arrived: asyncio.Queue[None] = asyncio.Queue()

    def heard(broadcast: Broadcast, parts: list[Buffer]) -> None:
        if isinstance(broadcast, Weights):
            for spec, part in zip(broadcast.tensors, parts, strict=True):
                unpack(spec, part)
            arrived.put_nowait(None)

    endpoint = f"tcp://{HOST}:{port}"
    ears = [
        Subscriber(context, endpoint, [BODY.encode()], heard, limits=LIMITS, counters=Counters())
        for _ in range(listeners)
    ]
    running = [asyncio.create_task(ear.run()) for ear in ears]
    await asyncio.sleep(0)
    pipe.send("listening")
    while await asyncio.to_thread(pipe.recv) is not None:
        for _ in range(listeners):
            await arrived.get()
        pipe.send("done")
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    context.destroy(linger=0)


# --- the publishing process ------------------------------------------------------------------------------


class Audience:
    """A process of subscribers to one publisher."""

    def __init__(self, listen: Callable[[Connection, int, int], None], port: int, listeners: int) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        spawned = multiprocessing.get_context("spawn")
        self._process = spawned.Process(target=listen, args=(theirs, port, listeners), daemon=True)
        self._process.start()
        self._pipe.recv()
        time.sleep(SETTLE_S)

    def seconds(self, send: Callable[[], int]) -> float:
        """From the call of `send`, which says how many bytes it sent, until everybody has all of it."""
        begun_s = time.perf_counter()
        self._pipe.send(send())
        self._pipe.recv()
        return time.perf_counter() - begun_s

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()


def measure(size: int, listeners: int, repeat: int) -> dict[str, list[float]]:
    """Seconds of each publication, bare and zsfl's in turn; the first of each is not counted."""
    context: zmq.Context[Any] = zmq.Context()
    state = state_of(size)
    version, (weights, parts) = Version(1), pack(Version(1), BODY, state)
    socket = open_socket(context, zmq.PUB, LIMITS, BROADCAST_QUEUE)
    port = socket.bind_to_random_port(f"tcp://{HOST}")
    publisher = Publisher(context, HOST, limits=LIMITS, counters=Counters())
    audiences = {
        "bare PUB": Audience(listen_bare, port, listeners),
        "zsfl": Audience(listen_zsfl, publisher.port, listeners),
    }

    def bare() -> int:
        sent = 0
        for part in parts:
            view = memoryview(part).cast("B")
            for start in range(0, len(view), LIMITS.frame_bytes):
                chunk = view[start : start + LIMITS.frame_bytes]
                socket.send_multipart([b"weights", chunk], copy=False)
                sent += len(chunk)
        return sent

    def zsfl() -> int:
        weights, parts = pack(version, BODY, state)
        publisher.publish(BODY.encode(), weights, parts)
        return size

    del weights
    found: dict[str, list[float]] = {way: [] for way in audiences}
    for number in range(repeat + 1):
        for way, send in (("bare PUB", bare), ("zsfl", zsfl)):
            seconds = audiences[way].seconds(send)
            if number:
                found[way].append(seconds)
    for audience in audiences.values():
        audience.close()
    publisher.close()
    socket.close(linger=0)
    context.term()
    return found


# --- weights that travel compressed -----------------------------------------------------------------------

PACKED = Codec.parse("raw+shuffle+lz4")
MOVES = (1e-2, 1e-3, 1e-4)
"""By how much of their size weights move from one version to the next."""


def packing(size: int, repeat: int) -> str:
    """A table: bytes of a version, and seconds to pack it and to make weights of it again, medians."""
    before = state_of(size)
    ways: list[tuple[str, State, Codec, Base | None]] = [
        ("raw", before, Codec(), None),
        (str(PACKED), before, PACKED, None),
    ]
    for move in MOVES:
        after = {name: one + move * torch.randn_like(one) for name, one in before.items()}
        ways.append((f"{PACKED}+delta, moved by {move:g}", after, PACKED, (Version(0), before)))
    lines = [_packing(*way, size, repeat) for way in ways]
    return table(["weights=", "of the bytes", "pack s", "unpack s"], lines)


def _packing(name: str, state: State, codec: Codec, base: Base | None, size: int, repeat: int) -> list[str]:
    packs: list[float] = []
    unpacks: list[float] = []
    length = 0
    for _ in range(repeat):
        begun_s = time.perf_counter()
        weights, parts = pack(Version(1), BODY, state, codec, base)
        packed_s = time.perf_counter()
        unpacked(weights, parts, base)
        unpacks.append(time.perf_counter() - packed_s)
        packs.append(packed_s - begun_s)
        length = sum(map(len, parts))
    return [name, f"{length / size:.2f}", f"{statistics.median(packs):.3f}", f"{statistics.median(unpacks):.3f}"]


def row(megabytes: int, listeners: int, found: dict[str, list[float]]) -> list[str]:
    """Medians and spread, and how many times as long zsfl takes as the bare socket in the same turn."""

    def spread(values: Sequence[float], form: str) -> str:
        return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"

    bare, zsfl = found["bare PUB"], found["zsfl"]
    times = [one / other for one, other in zip(zsfl, bare, strict=True)]
    return [f"{megabytes} MB", str(listeners), spread(bare, ".3f"), spread(zsfl, ".3f"), spread(times, ".2f")]


def main() -> int:
    """Measure, print the table, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=7, metavar="N", help="measurements of each (default: 7)")
    parser.add_argument("--mb", type=int, default=45, metavar="N", help="MB of weights (default: 45)")
    parser.add_argument("--listeners", type=int, nargs="+", default=[8, 32], metavar="N", help="default: 8 and 32")
    add_json_flag(parser)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    about = circumstances()
    found = {count: measure(asked.mb * 1_000_000, count, asked.repeat) for count in asked.listeners}
    head = ["weights", "subscribers", "bare PUB s", "zsfl s", "zsfl / bare"]
    page = "Seconds until every subscriber has all of it: median (fastest-slowest).\n\n"
    page += table(head, [row(asked.mb, count, times) for count, times in found.items()])
    page += "\n\nOne version, packed and unpacked in one thread; medians.\n\n"
    page += packing(asked.mb * 1_000_000, asked.repeat)
    print(page)
    figures = {"seconds": {str(count): times for count, times in found.items()}}
    print(f"\nkept in {write('publication', about, figures, page)}")
    handed = [
        Figure(
            name=f"{asked.mb} MB to {count} subscribers, over a bare PUB",
            unit="times",
            values=tuple(mine / bare for mine, bare in zip(times["zsfl"], times["bare PUB"], strict=True)),
            better="lower",
            target=1.3,
        )
        for count, times in found.items()
    ]
    hand_over(asked.json, "publication", about, handed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
