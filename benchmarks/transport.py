"""Request and reply: zsfl's wire beside bare ZeroMQ, asyncio streams, gRPC and HTTP, from 4 KiB to 16 MiB.

    python benchmarks/transport.py
    python benchmarks/transport.py --only zsfl_wire bare_zmq --kib 16 1024 --open 1 64 --repeat 20

Every contestant's server is a process of its own and sends back what it is sent; all are asked from this process, in
turn within each repetition. Needs the extra `bench`: pip install -e '.[bench]'. About four minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from _figures import Figure, add_json_flag, hand_over, shown
from _record import circumstances, table, write
from peers.program import Asker, cpu_s, started

BUDGET_S = 70
IN_THE_LOT = ("--repeat", "3", "--seconds", "0.08")
"""When `make bench` gives up on it; it takes about 90."""

OURS, FLOOR = "zsfl_wire", "bare_zmq"
CONTESTANTS = {
    OURS: "zsfl",
    FLOOR: "bare zmq",
    "streams": "asyncio streams",
    "grpc_aio": "gRPC",
    "http_bytes": "HTTP",
}
"""By the module in peers/."""
KIB = (4, 16, 256, 1024, 4096, 16384)
OPEN = (1, 8, 64)
MOST_OPEN_MIB = 128
"""Cells in which more bytes than this would be on their way at once are left out unless they are asked for."""
TARGETS = {16: 0.80, 1024: 0.95, 4096: 0.95, 16384: 0.95}
"""Of bare zmq's rate, by KiB."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What is asked: payloads of so many KiB, so many questions open at once."""

    kib: int
    open: int

    def __str__(self) -> str:
        size = f"{self.kib} KiB" if self.kib < 1024 else f"{self.kib // 1024} MiB"
        return f"{size}, {self.open} open"


@dataclass(frozen=True, slots=True)
class Took:
    """One measurement."""

    answers: int
    seconds: float
    all_cpu_s: float

    @property
    def answers_per_s(self) -> float:
        return self.answers / self.seconds

    @property
    def cpu_s(self) -> float:
        """For an answer, of asker and server together: what other work on the machine disturbs least."""
        return self.all_cpu_s / self.answers

    def __add__(self, other: Took) -> Took:
        return Took(self.answers + other.answers, self.seconds + other.seconds, self.all_cpu_s + other.all_cpu_s)


@dataclass(slots=True)
class Measured:
    """All measurements, by cell and contestant, one for each repetition."""

    found: dict[tuple[Cell, str], list[Took]] = field(default_factory=dict[tuple[Cell, str], list[Took]])

    def rates(self, cell: Cell, name: str) -> list[float]:
        """Answers a second."""
        return [one.answers_per_s for one in self.found[cell, name]]

    def costs(self, cell: Cell, name: str) -> list[float]:
        """Seconds of a core for an answer."""
        return [one.cpu_s for one in self.found[cell, name]]

    def ratios(self, cell: Cell, name: str) -> list[float]:
        """Our rates over those of `name` in the same repetition."""
        return [ours / theirs for ours, theirs in zip(self.rates(cell, OURS), self.rates(cell, name), strict=True)]

    def cost_ratios(self, cell: Cell, name: str) -> list[float]:
        """Our costs over those of `name` in the same repetition."""
        return [ours / theirs for ours, theirs in zip(self.costs(cell, OURS), self.costs(cell, name), strict=True)]


async def ask_for(asker: Asker, server: int, payload: bytes, questions: int, seconds: float) -> Took:
    """Keep so many questions open for a while; from the first question to the last answer. `server` is a process."""
    if await asker.ask(payload) != payload:
        raise RuntimeError("the answer is not what was sent")
    done = 0
    cpu_before_s = cpu_s(server) + time.process_time()
    begun_s = time.perf_counter()

    async def keep_asking() -> None:
        nonlocal done
        while True:
            answer = await asker.ask(payload)
            done += 1
            if len(answer) != len(payload):
                raise RuntimeError(f"{len(payload)} bytes were sent and {len(answer)} came back")
            if time.perf_counter() - begun_s >= seconds:
                return

    async with asyncio.TaskGroup() as tasks:
        for _ in range(questions):
            tasks.create_task(keep_asking())
    took_s = time.perf_counter() - begun_s
    return Took(done, took_s, cpu_s(server) + time.process_time() - cpu_before_s)


async def measure(names: Sequence[str], cells: Sequence[Cell], repeat: int, seconds: float) -> Measured:
    """All contestants in each cell, one after the other and back again, so that a machine that gets slower meanwhile is
    as slow for all of them; who begins changes from one repetition to the next.
    """
    measured = Measured()
    async with AsyncExitStack() as stack:
        askers = {name: await stack.enter_async_context(started(name)) for name in names}
        for turn in range(-1, repeat):  # the first turn warms up
            for cell in cells:
                payload = os.urandom(cell.kib * 1024)
                first = turn % len(names)
                there = (*names[first:], *names[:first])
                if turn < 0:
                    for name in there:
                        await ask_for(*askers[name], payload, min(cell.open, 8), 0.0)
                    continue
                halves: dict[str, Took] = {}
                for name in (*there, *reversed(there)):
                    took = await ask_for(*askers[name], payload, cell.open, seconds / 2)
                    if name in halves:
                        measured.found.setdefault((cell, name), []).append(halves[name] + took)
                    halves[name] = took
    return measured


def figures(measured: Measured, names: Sequence[str], cells: Sequence[Cell]) -> Iterator[Figure]:
    """What is compared and aimed at, and our own rates and costs."""
    for cell in cells if FLOOR in names else ():
        yield Figure(
            name=f"zsfl over bare zmq, {cell}",
            unit="ratio",
            values=tuple(measured.ratios(cell, FLOOR)),
            target=TARGETS.get(cell.kib),
            headline=cell.kib in (16, 1024, 16384),
        )
        cost = tuple(measured.cost_ratios(cell, FLOOR))
        if not any(map(math.isnan, cost)):
            yield Figure(name=f"CPU of that, {cell}", unit="ratio", values=cost, better="lower", headline=False)
    for name in ("grpc_aio", "http_bytes"):
        if name in names:
            least = min((measured.ratios(cell, name) for cell in cells), key=statistics.median)
            what = f"zsfl over {CONTESTANTS[name]}, where it is least"
            yield Figure(name=what, unit="ratio", values=tuple(least), target=1.0)
    for cell in cells:
        rates, costs = measured.rates(cell, OURS), [1e6 * cost for cost in measured.costs(cell, OURS)]
        yield Figure(name=f"zsfl, {cell}", unit="answers/s", values=tuple(rates), headline=cell == Cell(16, 64))
        if not any(map(math.isnan, costs)):
            what = f"CPU of zsfl, {cell}"
            yield Figure(name=what, unit="us/answer", values=tuple(costs), better="lower", headline=False)


def page(measured: Measured, names: Sequence[str], cells: Sequence[Cell], repeat: int) -> str:
    """The tables for people."""
    others = [name for name in names if name != OURS]
    rates = [
        [
            str(cell),
            *(shown(statistics.median(measured.rates(cell, name))) for name in names),
            _mb_per_s(measured, cell),
        ]
        for cell in cells
    ]
    compared = [[str(cell), *(_ratio(measured.ratios(cell, name)) for name in others), _aim(cell)] for cell in cells]
    costs = [
        [str(cell), *(shown(1e6 * statistics.median(measured.costs(cell, name))) for name in names)] for cell in cells
    ]
    titles = [CONTESTANTS[name] for name in names]
    return (
        f"Answers a second, the median of {repeat} repetitions; MB/s are zsfl's, each way.\n\n"
        f"{table(['', *titles, 'MB/s'], rates)}\n\n"
        "zsfl's rate over the others', the median of the repetitions (lowest to highest).\n\n"
        f"{table(['', *(CONTESTANTS[name] for name in others), 'aim: of bare zmq'], compared)}\n\n"
        "Microseconds of a core for an answer, asker and server together, the median.\n\n"
        f"{table(['', *titles], costs)}"
    )


def _mb_per_s(measured: Measured, cell: Cell) -> str:
    return shown(statistics.median(measured.rates(cell, OURS)) * cell.kib * 1024 / 1e6)


def _ratio(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _aim(cell: Cell) -> str:
    return f"{TARGETS[cell.kib]:.2f}" if cell.kib in TARGETS else ""


def main() -> int:
    """Measure, print the tables, keep the figures."""
    args = _parse()
    names = list(dict.fromkeys((OURS, *args.only)))
    cells = [
        Cell(kib, questions)
        for kib in args.kib
        for questions in args.open
        if kib * questions <= args.most_open_mib * 1024 or questions == 1
    ]
    about = circumstances()
    begun_s = time.perf_counter()
    measured = asyncio.run(measure(names, cells, args.repeat, args.seconds))
    shown_page = page(measured, names, cells, args.repeat)
    print(f"{shown_page}\n\n{time.perf_counter() - begun_s:.0f} s in all")
    kept: dict[str, Any] = {"answers_per_s": {}, "cpu_s_per_answer": {}}
    for cell, name in measured.found:
        kept["answers_per_s"].setdefault(str(cell), {})[CONTESTANTS[name]] = measured.rates(cell, name)
        kept["cpu_s_per_answer"].setdefault(str(cell), {})[CONTESTANTS[name]] = measured.costs(cell, name)
    print(f"kept in {write('transport', about, kept, shown_page)}")
    hand_over(args.json, "transport", about, list(figures(measured, names, cells)))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="whom to compare")
    parser.add_argument("--kib", nargs="+", type=int, default=KIB, metavar="N", help="sizes of payloads, in KiB")
    parser.add_argument("--open", nargs="+", type=int, default=OPEN, metavar="N", help="questions open at once")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="repetitions (default: 5)")
    parser.add_argument("--seconds", type=float, default=0.4, metavar="S", help="of each measurement (default: 0.4)")
    parser.add_argument(
        "--most-open-mib",
        type=int,
        default=MOST_OPEN_MIB,
        metavar="N",
        help=f"leave out what would have more than so many MiB open at once (default: {MOST_OPEN_MIB})",
    )
    add_json_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
