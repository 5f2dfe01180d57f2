"""What people who watch a run cost it: its steps a second with 50 viewers of the dash, and with none, by turns.

    python benchmarks/viewers.py
    python benchmarks/viewers.py --viewers 200 --turns 8

`zsfl up JOB --dash` runs all the while. The viewers are one process that takes in all that a browser would, at the
lowest priority: what they do themselves would be done on their own machines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from _figures import Figure, add_json_flag, hand_over
from _record import circumstances, in_short, table, write

import zsfl.demo

READY_S = 120.0
SETTLING_S = 3.0
"""After viewers came or went, before anything is counted."""


async def watch(url: str, viewers: int) -> None:
    """Take in what the page sends to so many viewers, until killed."""
    at = urlsplit(url)

    async def view() -> None:
        reader, writer = await asyncio.open_connection(at.hostname, at.port)
        writer.write(f"GET /events HTTP/1.1\r\nHost: {at.netloc}\r\n\r\n".encode())
        if b" 200 " not in await reader.readline():
            raise SystemExit("the page refused a viewer")
        while await reader.read(1 << 16):
            pass
        raise SystemExit("the page let go of a viewer")

    await asyncio.gather(*(view() for _ in range(viewers)))


@contextmanager
def watched(url: str, viewers: int) -> Iterator[None]:
    """With so many viewers; they have to be there still at the end."""
    process = subprocess.Popen([sys.executable, __file__, "--view", url, "--viewers", str(viewers)], preexec_fn=_humble)
    try:
        yield
        if process.poll() is not None:
            raise SystemExit("the viewers have left")
    finally:
        process.kill()
        process.wait()


def _humble() -> None:
    os.nice(19)


def rounds_in(metrics: Path) -> list[tuple[int, float]]:
    """Steps and seconds of each round so far."""
    found = [json.loads(line) for line in metrics.read_bytes().split(b"\n")[:-1]]
    return [(one["steps"], one["seconds"]) for one in found if one["event"] == "round"]


def rate_in(metrics: Path, seconds: float) -> float:
    """Steps a second of the rounds that begin and end within so many seconds from now on."""
    time.sleep(SETTLING_S)
    before = len(rounds_in(metrics)) + 1  # the one in progress does not count
    time.sleep(seconds)
    rounds = rounds_in(metrics)[before:]
    return sum(steps for steps, _ in rounds) / sum(took_s for _, took_s in rounds)


def measured(viewers: int, turns: int, seconds: float) -> dict[str, list[float]]:
    """Steps a second with none and with viewers, as often as said."""
    found: dict[str, list[float]] = {"nobody": [], f"{viewers} viewers": []}
    with tempfile.TemporaryDirectory(prefix="zsfl-bench-") as folder:
        command = [sys.executable, "-m", "zsfl", "up", str(Path(zsfl.demo.__file__)), "--dash", "--rounds", "1000000"]
        up = subprocess.Popen([*command, "--no-mdns"], cwd=folder, stdout=subprocess.PIPE, text=True)
        try:
            url = next(said[0] for line in up.stdout or () if (said := re.search(r"http://\S+", line)))
            metrics = Path(folder, "runs", "digits", "metrics.jsonl")
            threading.Thread(target=lambda: list(up.stdout or ()), daemon=True).start()  # unread, it would stop
            ends_s = time.monotonic() + READY_S
            while not (metrics.exists() and len(rounds_in(metrics)) > 3) and time.monotonic() < ends_s:
                time.sleep(0.2)
            for turn in range(turns):
                for name in sorted(found, reverse=bool(turn % 2)):
                    if name == "nobody":
                        found[name].append(rate_in(metrics, seconds))
                    else:
                        with watched(url, viewers):
                            found[name].append(rate_in(metrics, seconds))
                print({name: [round(rate) for rate in rates] for name, rates in found.items()}, flush=True)
        finally:
            up.send_signal(signal.SIGINT)
            up.wait(60)
    return found


def main() -> int:
    """Measure by turns, print the table, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--viewers", type=int, default=50, metavar="N", help="how many (default: 50)")
    parser.add_argument("--turns", type=int, default=4, metavar="N", help="of each (default: 4)")
    parser.add_argument("--seconds", type=float, default=15.0, metavar="S", help="of a turn (default: 15)")
    parser.add_argument("--view", metavar="URL", help=argparse.SUPPRESS)
    add_json_flag(parser)
    args = parser.parse_args()
    if args.view:
        asyncio.run(watch(args.view, args.viewers))
        return 0
    about = circumstances()
    found = measured(args.viewers, args.turns, args.seconds)
    nobody, some = found.values()
    kept = [with_some / with_none for with_some, with_none in zip(some, nobody, strict=True)]
    rows = [
        [name, f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f}", f"{max(rates):,.0f}"]
        for name, rates in found.items()
    ]
    page = "Steps a second of a run on this machine, with viewers of its dash and with none, by turns.\n\n"
    page += table(["", "median", "lowest", "highest"], rows)
    page += f"\n\nWith viewers {in_short(kept, '{:.1%}')} of the speed without.\n"
    print(page)
    print(f"kept in {write('viewers', about, found, page)}")
    hand_over(args.json, "viewers", about, [Figure(name="kept with viewers", unit="", values=tuple(kept), target=0.97)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
