"""What it costs a run to be watched: its steps a second with 50 viewers of the dash, with Prometheus asking for its
metrics each second, and with nobody, by turns.

    python benchmarks/viewers.py
    python benchmarks/viewers.py --viewers 200 --turns 8

`zsfl up JOB --dash --metrics PORT` runs all the while. Who watches is one process that takes in all that browsers, or
Prometheus, would, at the lowest priority: what they do themselves would be done on their own machines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from urllib.parse import urlsplit

from _figures import Figure, add_json_flag, hand_over
from _record import circumstances, in_short, table, write

import zsfl.demo

READY_S = 120.0
SETTLING_S = 3.0
"""After viewers came or went, before anything is counted."""
SCRAPE_S = 1.0
"""Prometheus is usually told to ask every 15 or 60 s."""
NOBODY, SCRAPED = "nobody", "a scrape a second"


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


def scrape(url: str) -> None:
    """Ask for the metrics again and again, until killed."""
    while True:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310, of this machine
            if b"zsfl_" not in answer.read():
                raise SystemExit("there are no metrics")
        time.sleep(SCRAPE_S)


@contextmanager
def beside(*args: str) -> Iterator[None]:
    """With this file as another process, which has to be there still at the end."""
    process = subprocess.Popen([sys.executable, __file__, *args], preexec_fn=_humble)
    try:
        yield
        if process.poll() is not None:
            raise SystemExit("whoever watched has left")
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
    if not rounds:
        raise SystemExit(f"no round began and ended within {seconds:g} s: give turns more --seconds")
    return sum(steps for steps, _ in rounds) / sum(took_s for _, took_s in rounds)


def measured(viewers: int, turns: int, seconds: float) -> dict[str, list[float]]:
    """Steps a second with nobody, with viewers, and with scrapes, as often as said."""
    with tempfile.TemporaryDirectory(prefix="zsfl-bench-") as folder:
        flags = ("--dash", "--metrics", str(free_port()), "--rounds", "1000000", "--no-mdns")
        command = [sys.executable, "-m", "zsfl", "up", str(Path(zsfl.demo.__file__)), *flags]
        up = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
        try:
            page, scraped = addresses(up.stdout or ())
            metrics = Path(folder, "runs", "digits", "metrics.jsonl")
            threading.Thread(target=lambda: list(up.stdout or ()), daemon=True).start()  # unread, it would stop
            ends_s = time.monotonic() + READY_S
            while not (metrics.exists() and len(rounds_in(metrics)) > 3) and time.monotonic() < ends_s:
                time.sleep(0.2)
            ways = {
                NOBODY: nullcontext,
                f"{viewers} viewers": lambda: beside("--view", page, "--viewers", str(viewers)),
                SCRAPED: lambda: beside("--scrape", scraped),
            }
            found: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(turns):
                for name in sorted(ways, reverse=bool(turn % 2)):
                    with ways[name]():
                        found[name].append(rate_in(metrics, seconds))
                print({name: [round(rate) for rate in rates] for name, rates in found.items()}, flush=True)
        finally:
            up.send_signal(signal.SIGINT)
            up.wait(60)
    return found


def addresses(said: Iterable[str]) -> tuple[str, str]:
    """Of the page and of the metrics, once a run that says these lines has told both."""
    page = scraped = ""
    for line in said:
        for url in re.findall(r"http://\S+", line):
            page, scraped = (page, url) if url.endswith("/metrics") else (url, scraped)
        if page and scraped:
            return page, scraped
    raise SystemExit("the run has ended, and did not say where it can be watched")


def free_port() -> int:
    """One that nobody has now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def main() -> int:
    """Measure by turns, print the table, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--viewers", type=int, default=50, metavar="N", help="how many (default: 50)")
    parser.add_argument("--turns", type=int, default=4, metavar="N", help="of each (default: 4)")
    parser.add_argument("--seconds", type=float, default=15.0, metavar="S", help="of a turn (default: 15)")
    parser.add_argument("--view", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--scrape", metavar="URL", help=argparse.SUPPRESS)
    add_json_flag(parser)
    args = parser.parse_args()
    if args.view:
        asyncio.run(watch(args.view, args.viewers))
    if args.scrape:
        scrape(args.scrape)
    about = circumstances()
    found = measured(args.viewers, args.turns, args.seconds)
    nobody = found[NOBODY]
    kept = {
        name: [watched / alone for watched, alone in zip(rates, nobody, strict=True)] for name, rates in found.items()
    }
    rows = [
        [name, *(f"{of(rates):,.0f}" for of in (statistics.median, min, max)), in_short(kept[name], "{:.1%}")]
        for name, rates in found.items()
    ]
    page = "Steps a second of a run on this machine, by who watches it, by turns.\n\n"
    page += table(["", "median", "lowest", "highest", "of the speed with nobody"], rows)
    print(page)
    print(f"kept in {write('viewers', about, found, page)}")
    names = {SCRAPED: "kept with scrapes"}
    figures = [
        Figure(name=names.get(name, "kept with viewers"), unit="", values=tuple(values), target=0.97)
        for name, values in kept.items()
        if name != NOBODY
    ]
    hand_over(args.json, "viewers", about, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
