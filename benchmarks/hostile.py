"""What a good peer gets out of a node while somebody else attacks it, as a share of what it gets in peace.

    python benchmarks/hostile.py
    python benchmarks/hostile.py --only "half-open connections" --seconds 5

The node is a process of its own that sends back what it is sent (as `zsfl bench --serve` does); a good peer asks it for
16 KiB, eight questions open at once, and the attacker is a third process. About a minute and a half on an idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.synchronize import Event

import psutil
from _attacks import ATTACKS
from _figures import Figure, add_json_flag, hand_over
from _record import circumstances, table, write
from peers.program import Asker, started

from zsfl.errors import ZsflError

HOST = "127.0.0.1"
PAYLOAD = bytes(16 << 10)
OPEN = 8
START_S = 60.0
DEADLINE_S = 10.0
"""A question that is not answered by then was in vain."""


async def answers_per_s(peer: Asker, seconds: float) -> float:
    """What a good peer gets."""
    ends_s, count = time.monotonic() + seconds, 0

    async def ask() -> None:
        nonlocal count
        while time.monotonic() < ends_s:
            with suppress(ZsflError, TimeoutError):
                async with asyncio.timeout(DEADLINE_S):
                    await peer.ask(PAYLOAD)
                count += 1

    begun_s = time.monotonic()
    await asyncio.gather(*(ask() for _ in range(OPEN)))
    return count / (time.monotonic() - begun_s)


def _strike(name: str, port: int, seconds: float, begun: Event) -> None:
    begun.set()
    ATTACKS[name](HOST, (port,), seconds)


@contextmanager
def attacking(name: str, port: int, seconds: float) -> Iterator[None]:
    """Somebody attacks for so long, from a process of its own, and has begun to; it is gone with the block."""
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    attacker = context.Process(target=_strike, args=(name, port, seconds, begun))
    attacker.start()
    try:
        if not begun.wait(START_S):
            raise RuntimeError(f"the attacker did not start within {START_S:g} s")
        yield
    finally:
        attacker.kill()
        attacker.join()


async def measured(name: str, seconds: float) -> tuple[float, float]:
    """Answers under attack as a share of those just before and after; by how many MiB the node grew."""
    async with started("zsfl_wire") as (peer, pid):
        node = psutil.Process(pid)
        (port,) = (one.laddr.port for one in node.net_connections("tcp") if one.status == psutil.CONN_LISTEN)
        await answers_per_s(peer, seconds / 4)  # a warm-up
        before = await answers_per_s(peer, seconds)
        resident = node.memory_info().rss
        with attacking(name, port, 60 * seconds):  # ended sooner, with the block
            await asyncio.sleep(1.0)  # until it is under way
            under = await answers_per_s(peer, seconds)
            grown = node.memory_info().rss - resident
        after = await answers_per_s(peer, seconds)
    return under / ((before + after) / 2), grown / (1 << 20)


def main() -> int:
    """Measure each attack, print the table, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(ATTACKS), choices=list(ATTACKS), metavar="ATTACK")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement (default: 3)")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="measurements of each (default: 1)")
    add_json_flag(parser)
    args = parser.parse_args()
    about = circumstances()
    found = {name: [asyncio.run(measured(name, args.seconds)) for _ in range(args.repeat)] for name in args.only}
    rows = [
        [name, f"{sorted(share for share, _ in runs)[len(runs) // 2]:.0%}", f"{max(grown for _, grown in runs):.0f}"]
        for name, runs in found.items()
    ]
    page = f"A good peer's answers/s under attack, of those in peace ({len(PAYLOAD) >> 10} KiB, {OPEN} open).\n\n"
    page += table(["attack", "share", "node grew by, MiB"], rows)
    print(page)
    print(f"\nkept in {write('hostile', about, {'attacks': found}, page)}")
    figures = [
        Figure(name=f"under {name}", unit="of peace", values=tuple(share for share, _ in runs))
        for name, runs in found.items()
    ]
    hand_over(args.json, "hostile", about, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
