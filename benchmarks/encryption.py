"""What do keys cost? zsfl's request and reply, its broadcasts, and training, encrypted beside plain.

    python benchmarks/encryption.py
    python benchmarks/encryption.py --kib 1024 --connections 4 --repeat 9

Both ends are processes of this machine, which has nothing else to do than to encrypt and decrypt; also through a
simulated link of 1 Gbit/s, as between machines of a LAN. Plain and encrypted take turns within each repetition.
Training wants MNIST's four IDX files in the folder that ZSFL_DATA names, or in `mnist` below it. About five minutes, of
which four are training (--no-training).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import zmq
from _cluster import load
from _figures import Figure, add_json_flag, hand_over, shown
from _jobs import JOBS
from _link import program
from _record import circumstances, in_short, table, write
from peers import zsfl_locked, zsfl_wire
from peers.program import HOST, Asker, started
from transport import ask_for

from zsfl.ids import BODY, Version
from zsfl.metrics import Counters
from zsfl.settings import WireLimits
from zsfl.tensors.spec import TensorSpec
from zsfl.wire.door import Door
from zsfl.wire.gatekeeper import kept
from zsfl.wire.messages import Weights
from zsfl.wire.pubsub import Publisher, Subscriber

WAYS = {"plain": ("zsfl_wire", 1), "encrypted": ("zsfl_locked", 1), "encrypted, 2 io threads": ("zsfl_locked", 2)}
"""By the module in peers/, and ZeroMQ's threads that send, receive and encrypt, on either side."""
KIB = (16, 256, 1024, 4096)
TARGETS = {1024: 0.60}
"""Of plain throughput, by KiB, for the better number of io threads."""
REQUESTS, LINKED = "request and reply", "request and reply through 1 Gbit/s (simulated)"
LINK_MBIT_S, LINKED_KIB = 1000, (1024,)
MOST_OPEN = 16
MOST_OPEN_KIB = 16 << 10
QUEUED = 128
"""Broadcasts of one measurement: fewer than ZeroMQ holds for a slow subscriber before it drops some."""
BROADCAST_KIB = 64 << 10
"""All broadcasts of one measurement together, at most."""
TRAINED = {"64 samples a step": 64, "1,024 samples a step": 1024}
"""MicroSFL's workload."""
TRAIN_S, CLIENTS, SPLIT_SERVERS = 3.0, 20, 2
JOIN_S = 60.0
"""What subscribers may take to hear the first broadcast."""


class Spread:
    """Asks over several connections in turn, as several peers would."""

    def __init__(self, first: Asker, connections: int) -> None:
        self._askers = [first, *(cast(zsfl_wire.ZsflWire, first).another() for _ in range(connections - 1))]
        self._next = 0

    async def ask(self, payload: bytes) -> bytes | bytearray | memoryview:
        """What the server sends back."""
        self._next = (self._next + 1) % len(self._askers)
        return await self._askers[self._next].ask(payload)

    async def close(self) -> None:
        """Those that were opened here."""
        for asker in self._askers[1:]:
            await asker.close()


@dataclass(slots=True)
class Measured:
    """MB/s, by what was measured, KiB and way, one for each repetition."""

    found: dict[tuple[str, int, str], list[float]] = field(default_factory=dict[tuple[str, int, str], list[float]])

    def add(self, what: str, kib: int, way: str, mb_per_s: float) -> None:
        """One more repetition."""
        self.found.setdefault((what, kib, way), []).append(mb_per_s)

    def ratios(self, what: str, kib: int, way: str) -> list[float]:
        """Of plain throughput in the same repetition."""
        ours, plain = self.found[what, kib, way], self.found[what, kib, "plain"]
        return [one / other for one, other in zip(ours, plain, strict=True)]


def turns(repeat: int) -> Iterator[tuple[bool, Sequence[str]]]:
    """Whether it counts, and in which order the ways go: who begins changes."""
    ways = list(WAYS)
    for turn in range(-1, repeat):  # the first turn warms up
        first = turn % len(ways)
        yield turn >= 0, (*ways[first:], *ways[:first])


async def measure_requests(
    measured: Measured, what: str, kibs: Sequence[int], connections: int, repeat: int, seconds: float
) -> None:
    """Tensors there and back, several at once over several connections."""

    def way_to(port: int) -> AbstractContextManager[int]:
        return program("shape", str(LINK_MBIT_S), str(port)) if what == LINKED else nullcontext(port)

    async with AsyncExitStack() as stack:
        askers: dict[str, tuple[Spread, int]] = {}
        for way, (module, threads) in WAYS.items():
            os.environ["ZSFL_IO_THREADS"] = str(threads)
            asker, pid = await stack.enter_async_context(started(module, way_to))
            askers[way] = Spread(asker, connections), pid
            stack.push_async_callback(askers[way][0].close)
        for counts, ways in turns(repeat):
            for kib in kibs:
                payload, questions = os.urandom(kib << 10), max(1, min(MOST_OPEN, MOST_OPEN_KIB // kib))
                for way in ways:
                    took = await ask_for(*askers[way], payload, questions, seconds if counts else 0.0)
                    if counts:
                        measured.add(what, kib, way, took.answers_per_s * kib * 1024 / 1e6)


# --- broadcasts -------------------------------------------------------------------------------------------


@asynccontextmanager
async def audience(way: str, listeners: int) -> AsyncIterator[Callable[[int, int], Awaitable[float]]]:
    """A publisher here and a process with its subscribers; gives what times so many broadcasts of so many KiB."""
    module, threads = WAYS[way]
    door = zsfl_locked.own_door() if module == "zsfl_locked" else None
    os.environ["ZSFL_IO_THREADS"] = str(threads)
    context = zsfl_wire.new_context()
    with kept(context, door or Door("bench")):
        publisher = Publisher(context, HOST, limits=WireLimits(), counters=Counters(), door=door)
        process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--listen", way, str(publisher.port), str(listeners),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        answers = process.stdout

        async def seconds(kib: int, count: int) -> float:
            payload = os.urandom(kib << 10)
            spec = TensorSpec("w", "uint8", (len(payload),), "raw", len(payload))
            begun_s = time.perf_counter()
            for _ in range(count):
                publisher.publish(b"t", Weights(portion=BODY, version=Version(1), tensors=(spec,)), [payload])
            await answers.readexactly(listeners * count)
            return time.perf_counter() - begun_s

        async def joined() -> None:
            waiting = asyncio.ensure_future(answers.readexactly(listeners))
            while not waiting.done():
                publisher.publish(b"hello", Weights(portion=BODY, version=Version(0), tensors=()))
                await asyncio.sleep(0.01)
            await waiting

        try:
            await asyncio.wait_for(joined(), JOIN_S)
            yield seconds
        finally:
            process.stdin.close()
            await process.wait()
            publisher.close()
    context.destroy(linger=0)


async def listen(way: str, port: int, listeners: int) -> None:
    """In a process of its own: a byte for each broadcast that a subscriber has whole, and one when it hears at all."""
    door = zsfl_locked.own_door() if WAYS[way][0] == "zsfl_locked" else None
    context, over = zsfl_wire.new_context(), asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), over.set)

    def ear() -> Subscriber:
        greeted: list[bool] = []

        def heard(broadcast: object, _parts: object) -> None:
            assert isinstance(broadcast, Weights)
            if broadcast.version or not greeted:
                greeted.append(True)
                os.write(1, b".")

        wired: dict[str, Any] = {"limits": WireLimits(), "counters": Counters(), "door": door}
        key = door.key if door else ""
        return Subscriber(context, f"tcp://{HOST}:{port}", [b"t", b"hello"], heard, **wired, key=key)

    hearing = [asyncio.ensure_future(ear().run()) for _ in range(listeners)]
    await over.wait()
    for one in hearing:
        one.cancel()
    await asyncio.gather(*hearing, return_exceptions=True)
    context.destroy(linger=0)


async def measure_broadcasts(measured: Measured, kibs: Sequence[int], listeners: int, repeat: int) -> None:
    """Weights to several subscribers: MB/s that all of them together have heard."""
    async with AsyncExitStack() as stack:
        lots = {way: await stack.enter_async_context(audience(way, listeners)) for way in WAYS}
        for counts, ways in turns(repeat):
            for kib in kibs:
                count = max(1, min(QUEUED, BROADCAST_KIB // kib // listeners))
                for way in ways:
                    took_s = await lots[way](kib, count)
                    if counts:
                        measured.add("broadcast", kib, way, count * listeners * kib * 1024 / 1e6 / took_s)


# --- training ---------------------------------------------------------------------------------------------


async def measure_training(repeat: int, keys: str) -> dict[str, dict[str, list[float]]]:
    """Steps a second of client processes, by workload and way; `keys` is the folder of this machine's keys."""
    found = {what: {"plain": list[float](), "encrypted": list[float]()} for what in TRAINED}
    for turn in range(repeat):
        for what, samples in TRAINED.items():
            for way in ("plain", "encrypted")[:: 1 if turn % 2 else -1]:
                taken = await load(
                    JOBS / "microsfl_untested.py",
                    {"batch_size": samples},
                    seconds=TRAIN_S,
                    clients=CLIENTS,
                    split_servers=SPLIT_SERVERS,
                    keys=keys if way == "encrypted" else "",
                )
                found[what][way].append(taken.steps_per_s)
    return found


def _training_page(found: dict[str, dict[str, list[float]]]) -> str:
    rows = [
        [what, *map(in_short, by_way.values()), in_short(_ratios(by_way), "{:.2f}")] for what, by_way in found.items()
    ]
    return (
        f"Training, steps/s: MicroSFL's network, {CLIENTS} client processes, {SPLIT_SERVERS} split servers, one step "
        f"of each client a version.\n\n{table(['', 'plain', 'encrypted', 'encrypted / plain'], rows)}"
    )


def _ratios(by_way: dict[str, list[float]]) -> list[float]:
    return [one / other for one, other in zip(by_way["encrypted"], by_way["plain"], strict=True)]


# --- what was found ---------------------------------------------------------------------------------------


def figures(measured: Measured, trained: dict[str, dict[str, list[float]]]) -> Iterator[Figure]:
    """Encrypted over plain, in turn."""
    for what, by_way in trained.items():
        yield Figure(name=f"encrypted over plain, training, {what}", unit="ratio", values=tuple(_ratios(by_way)))
    ways = [way for way in WAYS if way != "plain"]
    for what, kib in dict.fromkeys((what, kib) for what, kib, _ in measured.found):
        best = max(ways, key=lambda way, what=what, kib=kib: statistics.median(measured.ratios(what, kib, way)))
        for way in ways:
            aimed = kib in TARGETS and way == best
            yield Figure(
                name=f"{way} over plain, {what}, {kib} KiB",
                unit="ratio",
                values=tuple(measured.ratios(what, kib, way)),
                target=TARGETS[kib] if aimed else None,
                headline=aimed,
            )


def page(measured: Measured, connections: int, repeat: int) -> str:
    """The table for people."""
    rows: list[list[str]] = []
    for what, kib in dict.fromkeys((what, kib) for what, kib, _ in measured.found):
        rates = [shown(statistics.median(measured.found[what, kib, way])) for way in WAYS]
        ratios = [measured.ratios(what, kib, way) for way in WAYS if way != "plain"]
        told = [f"{statistics.median(one):.2f} ({min(one):.2f} to {max(one):.2f})" for one in ratios]
        rows.append([what, f"{kib} KiB", *rates, *told])
    others = [f"{way} / plain" for way in WAYS if way != "plain"]
    return (
        f"MB/s, over {connections} connections, the median of {repeat} repetitions; of requests each way, of "
        "broadcasts what all subscribers heard together. Then the ratio to plain within each repetition, its median "
        f"(lowest to highest).\n\n{table(['', 'size', *WAYS, *others], rows)}"
    )


def main() -> int:
    """Measure, print the table, keep the figures."""
    args = _parse()
    if args.listen:
        way, port, listeners = args.listen
        asyncio.run(listen(way, int(port), int(listeners)))
        return 0
    if not zmq.has("curve"):
        print("the ZeroMQ of this pyzmq has no CURVE: nothing to measure", file=sys.stderr)
        return 1
    about, measured = circumstances(), Measured()
    begun_s, trained = time.perf_counter(), dict[str, dict[str, list[float]]]()
    with tempfile.TemporaryDirectory() as folder:
        if args.training:
            trained = asyncio.run(measure_training(args.repeat, folder))
        os.environ["ZSFL_KEYS"] = folder
        for what, kibs in ((REQUESTS, args.kib), (LINKED, LINKED_KIB)):
            asyncio.run(measure_requests(measured, what, kibs, args.connections, args.repeat, args.seconds))
        asyncio.run(measure_broadcasts(measured, args.kib, args.connections, args.repeat))
    shown_page = page(measured, args.connections, args.repeat)
    if trained:
        shown_page += f"\n\n{_training_page(trained)}"
    print(f"{shown_page}\n\n{time.perf_counter() - begun_s:.0f} s in all")
    rates = {f"{what}, {kib} KiB, {way}": values for (what, kib, way), values in measured.found.items()}
    print(f"kept in {write('encryption', about, {'mb_per_s': rates, 'steps_per_s': trained}, shown_page)}")
    hand_over(args.json, "encryption", about, list(figures(measured, trained)))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kib", nargs="+", type=int, default=KIB, metavar="N", help="sizes of frames, in KiB")
    parser.add_argument("--connections", type=int, default=4, metavar="N", help="peers of a server (default: 4)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="repetitions (default: 5)")
    parser.add_argument("--seconds", type=float, default=0.3, metavar="S", help="of each measurement (default: 0.3)")
    parser.add_argument("--training", action=argparse.BooleanOptionalAction, default=True, help="train, too")
    parser.add_argument("--listen", nargs=3, metavar=("WAY", "PORT", "N"), help=argparse.SUPPRESS)
    add_json_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
