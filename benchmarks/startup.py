"""How long it takes until 20 clients, 2 split servers and 1 aggregator are ready, as processes and in one process.

    python benchmarks/startup.py

Ready means that every node's sockets are open and that all have found one another: by mDNS where they are processes.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

from _figures import Figure, add_json_flag, hand_over
from _record import circumstances, table, write

import zsfl
import zsfl.demo

BUDGET_S = 30
IN_THE_LOT = ("--repeat", "2")

CLIENTS, SPLIT_SERVERS = 20, 2
JOB = Path(zsfl.demo.__file__)


async def ready_s(*, in_process: bool) -> float:
    """Seconds until one cluster is ready; it is ended again before this returns."""
    with tempfile.TemporaryDirectory(prefix="zsfl-bench-") as runs:
        begun_s = time.perf_counter()
        async with zsfl.LocalCluster(
            JOB, clients=CLIENTS, split_servers=SPLIT_SERVERS, in_process=in_process, runs=runs
        ):
            return time.perf_counter() - begun_s


def main() -> int:
    """Measure both forms in turn, print the table, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="measurements of each (default: 5)")
    add_json_flag(parser)
    args = parser.parse_args()
    about = circumstances()
    asyncio.run(ready_s(in_process=True))  # a warm-up: torch and the job are imported here, not in a measurement
    found: dict[str, list[float]] = {"processes": [], "in process": []}
    for _ in range(args.repeat):
        for form, times in found.items():
            times.append(asyncio.run(ready_s(in_process=form == "in process")))
    rows = [
        [form, *(f"{value:.2f}" for value in (statistics.median(times), min(times), max(times))), str(len(times))]
        for form, times in found.items()
    ]
    page = f"Seconds until {CLIENTS} clients, {SPLIT_SERVERS} split servers and 1 aggregator are ready.\n\n"
    page += table(["", "median", "fastest", "slowest", "times"], rows)
    print(page)
    print(f"\nkept in {write('startup', about, {'ready_s': found}, page)}")
    figures = [
        Figure(name=f"ready, {form}", unit="s", values=tuple(times), better="lower") for form, times in found.items()
    ]
    hand_over(args.json, "startup", about, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
