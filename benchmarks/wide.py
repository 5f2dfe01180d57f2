"""Does one connection fill a long link? Steps of a client through a simulated one, over one connection and several.

    python benchmarks/wide.py
    python benchmarks/wide.py --round-trips 100 --loss 0.0001 --repeat 5

Needs root on Linux, for network namespaces. The link is simulated (`_wide.py`); TCP at both ends is the kernel's own.
About ten minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import zmq.asyncio
from _figures import Figure, add_json_flag, hand_over, shown
from _link import program, stepper
from _record import circumstances, table, write
from _wide import HOSTS, Wire, joined

WIDTH = 4096
"""Of activations [64, width] in float32: 1 MiB."""
STEP_MIB = 3
"""Activations there and back, and the gradient at the cut."""
CONNECTIONS = {"1": 1, "2": 2, "4": 4, "8": 8, "automatic": 0}
ROUND_TRIPS_MS = (1.0, 50.0, 100.0)
"""The first is a LAN's: there nothing is to be gained."""
TARGETS = {50.0: 1.3, 100.0: 1.5}
"""Of one connection, for what opens by itself."""
WARM_S = 3.0
"""Until windows are open."""
HANG_S = 300.0
"""No client takes longer."""


def asked(inside: tuple[str, ...], *words: object) -> tuple[float, int]:
    """Steps a second of a client at the near end, and how many connections it had."""
    command = [*inside, sys.executable, __file__, "--ask", *map(str, words)]
    env = {**os.environ, "ZSFL_LINK_HOST": HOSTS[1]}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env, timeout=HANG_S)
    steps_per_s, connections = done.stdout.split()
    return float(steps_per_s), int(connections)


async def ask(port: int, connections: int, window: int, seconds: float) -> tuple[float, int]:
    """In a process of its own at the near end."""
    context = zmq.asyncio.Context()
    one = stepper(context, "raw", port, window, WIDTH, connections)
    try:
        await one.run(WARM_S)
        return await one.run(seconds), one.node.connections
    finally:
        one.node.close()
        context.destroy(linger=0)


Found = dict[tuple[float, str], list[tuple[float, int]]]


def measure(args: argparse.Namespace) -> Found:
    """All ways by turns, on each link."""
    found: Found = {}
    for round_trip_ms in args.round_trips:
        wire = Wire(mbit_s=args.mbit_s, round_trip_ms=round_trip_ms, loss=args.loss)
        with joined(wire) as (here, there), program("serve", str(WIDTH), inside=there, host=HOSTS[1]) as port:
            for turn in range(args.repeat):
                ways = list(CONNECTIONS)
                for way in (*ways[turn % len(ways) :], *ways[: turn % len(ways)]):
                    took = asked(here, port, CONNECTIONS[way], args.window, args.seconds)
                    found.setdefault((round_trip_ms, way), []).append(took)
                    print(f"{round_trip_ms:g} ms, {way}: {took[0]:.1f} steps/s over {took[1]}", file=sys.stderr)
    return found


def ratios(found: Found, round_trip_ms: float, way: str) -> list[float]:
    """Of one connection's steps in the same repetition."""
    pairs = zip(found[round_trip_ms, way], found[round_trip_ms, "1"], strict=True)
    return [ours[0] / single[0] for ours, single in pairs]


def page(found: Found, args: argparse.Namespace) -> str:
    """The table for people."""
    rows: list[list[str]] = []
    for (round_trip_ms, way), took in found.items():
        rate = statistics.median(one for one, _ in took)
        more = ratios(found, round_trip_ms, way)
        opened = sorted({number for _, number in took})
        rows.append(
            [
                f"{round_trip_ms:g} ms", way, " or ".join(map(str, opened)), shown(rate),
                shown(rate * STEP_MIB * 2**20 * 8e-6),
                f"{statistics.median(more):.2f} ({min(more):.2f} to {max(more):.2f})",
            ]
        )  # fmt: skip
    return (
        f"A simulated link of {args.mbit_s:g} Mbit/s each way, {args.loss:g} of its packets lost; steps with "
        f"activations of 1 MiB (2 MiB there, 1 MiB back), {args.window} at once; TCP by {_congestion()}, and the "
        f"kernel's usual buffers. The median of {args.repeat} repetitions, and the ratio to one connection within each "
        f"(lowest to highest).\n\n{table(['round trip', 'connections', 'opened', 'steps/s', 'Mbit/s', 'of one'], rows)}"
    )


def _congestion() -> str:
    return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text(encoding="utf-8").strip()


def figures(found: Found) -> Iterator[Figure]:
    """What opens by itself, beside one."""
    for round_trip_ms, way in found:
        if way == "automatic":
            yield Figure(
                name=f"automatic over one connection, {round_trip_ms:g} ms",
                unit="ratio",
                values=tuple(ratios(found, round_trip_ms, way)),
                target=TARGETS.get(round_trip_ms),
                headline=round_trip_ms in TARGETS,
            )


def main() -> int:
    """Measure, print the table, keep the figures."""
    args = _parse()
    if args.ask:
        port, connections, window, seconds = args.ask
        print(*asyncio.run(ask(int(port), int(connections), int(window), float(seconds))))
        return 0
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        print("network namespaces and TUN devices take root on Linux: nothing to measure", file=sys.stderr)
        return 1
    about, begun_s = circumstances(), time.perf_counter()
    found = measure(args)
    shown_page = page(found, args)
    print(f"{shown_page}\n\n{time.perf_counter() - begun_s:.0f} s in all")
    rates = {f"{round_trip:g} ms, {way}": [one for one, _ in took] for (round_trip, way), took in found.items()}
    print(f"kept in {write('wide', about, {'steps_per_s': rates}, shown_page)}")
    hand_over(args.json, "wide", about, list(figures(found)))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--round-trips", nargs="+", type=float, default=ROUND_TRIPS_MS, metavar="MS")
    parser.add_argument("--mbit-s", type=float, default=1000, metavar="N", help="of the link (default: 1000)")
    parser.add_argument("--loss", type=float, default=0.0, metavar="P", help="of packets, such as 0.0001 (default: 0)")
    parser.add_argument("--window", type=int, default=16, metavar="N", help="steps at once (default: 16)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="repetitions (default: 3)")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of each measurement (default: 5)")
    parser.add_argument("--ask", nargs=4, metavar=("PORT", "N", "WINDOW", "S"), help=argparse.SUPPRESS)
    add_json_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
