"""What codecs save and what they cost: bytes and accuracy of a step, and steps a second through links of given rates.

    ZSFL_DATA=... python benchmarks/compression.py
    ZSFL_DATA=... python benchmarks/compression.py --only accuracy --epochs 8 --codecs raw "int2, spill=rand2"

Wants MNIST's four IDX files in the folder that ZSFL_DATA names, or in `mnist` below it. About three minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import zmq
from _figures import Figure, add_json_flag, hand_over, shown, spread
from _link import Stepper, program, stepper
from _record import circumstances, path_of, table, write
from _training import Outcome, run

import zsfl

BUDGET_S = 60
IN_THE_LOT = ("--only", "link", "--repeat", "1")

SMALLEST = "int2, gradient=rank6, spill=rand2+feedback"
CODECS = (
    "raw",
    "raw+shuffle+lz4, spill=raw+shuffle+lz4",
    "fp16, spill=fp16",
    "int8, spill=int8",
    "int4, gradient=rank6, spill=rand2",
    "topk4, gradient=int8, spill=int8",
    SMALLEST,
)
EPOCHS, SEEDS = 6, (0, 1, 2)
WIDTHS = (64, 512)
"""Of the tensors that cross a link: 16 KiB, as MicroSFL's, and 128 KiB."""
RATES, LINKED, AUTO = (100, 1000), ("raw", "raw+lz4", "fp16", "int8"), "auto"
SHARDS, TURN_S, LEARN_S = 8, 0.5, 4.0
FAST_BYTES = {"raw": 66 * 1024, "int8, spill=int8": 18 * 1024}
"""What a step may take."""
TIMES_FEWER, POINTS_LOST = 16.0, 1.0
Link = tuple[int, int]
"""Mbit/s, and how wide the tensors are: 64 samples of so many numbers."""
LINKS: tuple[Link, ...] = tuple((rate, width) for width in WIDTHS for rate in RATES)
Rates = dict[tuple[Link, str], list[float]]


def trained(codecs: Sequence[str], seeds: Sequence[int], epochs: int) -> dict[str, list[Outcome]]:
    """All runs, as many at once as there are cores; those of one seed share initial weights and batches."""
    found: dict[str, list[Outcome]] = {codec: [] for codec in codecs}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = [(codec, pool.submit(run, codec, seed, epochs)) for seed in seeds for codec in codecs]
        for codec, job in jobs:
            found[codec].append(job.result())
    return found


def accuracy_page(found: dict[str, list[Outcome]], epochs: int, picture: str) -> str:
    """The table of codecs, for people."""
    raw = next(iter(found.values()))
    rows: list[list[str]] = []
    for codec, runs in found.items():
        size, lost = runs[0].bytes_per_step, points_lost(raw, runs)
        rows.append(
            [
                codec,
                f"{size:,.0f}",
                f"{raw[0].bytes_per_step / size:.1f}",
                f"{runs[0].spill_file_bytes:,}",
                f"{1e6 * statistics.fmean(one.codec_s / one.steps for one in runs):,.0f}",
                f"{100 * statistics.fmean(one.accuracy[-1] for one in runs):.2f}",
                f"{statistics.fmean(lost):+.2f} ({min(lost):+.2f} to {max(lost):+.2f})",
            ]
        )
    head = ["codec", "bytes/step", "times fewer", "spill files", "codec us/step", "accuracy, %", "points lost"]
    return (
        f"MicroSFL's workload (frozen head 784-64 with noise, 64-64 ReLU, 64-10), batches of 64, 20 clients, {epochs} "
        f"epochs, {len(raw)} seeds: mean, and for the points lost to raw of the same seed the spread.\n\n"
        f"{table(head, rows)}\n\n![bytes to accuracy]({picture})"
    )


def points_lost(raw: Sequence[Outcome], runs: Sequence[Outcome]) -> list[float]:
    """Of each seed, at the end."""
    return [100 * (first.accuracy[-1] - one.accuracy[-1]) for first, one in zip(raw, runs, strict=True)]


def draw(path: Path, found: dict[str, list[Outcome]]) -> None:
    """Accuracy over bytes sent so far, and what each codec ends with over its bytes a step."""
    # The object interface, since pyplot keeps global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(12.5, 4.8), dpi=110, layout="constrained")
    along, at_end = figure.subplots(1, 2)
    marks = "os^vD*PX<>ph"
    for number, (codec, runs) in enumerate(found.items()):
        size, epochs = runs[0].bytes_per_step, len(runs[0].accuracy)
        means = [100 * statistics.fmean(one.accuracy[epoch] for one in runs) for epoch in range(epochs)]
        sent = [size * runs[0].steps / epochs * (epoch + 1) / 1e6 for epoch in range(epochs)]
        mark = marks[number % len(marks)]
        along.plot(sent, means, marker=mark, label=codec)
        ends = [100 * one.accuracy[-1] for one in runs]
        errors = [[means[-1] - min(ends)], [max(ends) - means[-1]]]
        at_end.errorbar([size / 1e3], [means[-1]], yerr=errors, marker=mark, markersize=8, capsize=3)
    for axes, title, label in (
        (along, "Accuracy by bytes sent", "MB sent by all clients together"),
        (at_end, "At the end (bars: lowest and highest seed)", "kB a step"),
    ):
        axes.set(title=title, xlabel=label, xscale="log", ylabel="accuracy, % of test images")
        axes.grid(alpha=0.3)
    figure.legend(*along.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    FigureCanvasAgg(figure).print_figure(path, format="png")


async def linked(repeat: int) -> tuple[Rates, dict[Link, dict[str, str]]]:
    """Steps a second by link and codec, one value for each repetition; what auto settled on, by link and role."""
    found, context = defaultdict[tuple[Link, str], list[float]](list), zmq.Context[Any]()
    with ExitStack() as programs:
        servers = {width: programs.enter_context(program("serve", str(width))) for width in WIDTHS}
        steppers: dict[tuple[Link, str], Stepper] = {}
        for rate, width in LINKS:
            port = programs.enter_context(program("shape", str(rate), str(servers[width])))
            for codec in (*LINKED, AUTO):
                steppers[(rate, width), codec] = stepper(context, codec, port, SHARDS, width)
        for turn in range(repeat + 1):  # the first is not counted
            order = list(steppers)
            for key in order[turn % len(order) :] + order[: turn % len(order)]:
                steps_per_s = await steppers[key].run(TURN_S if turn else LEARN_S if key[1] == AUTO else 2 * TURN_S)
                if turn:
                    found[key].append(steps_per_s)
        settled = {link: steppers[link, AUTO].settled() for link in LINKS}
        for one in steppers.values():
            one.node.close()
    context.destroy(linger=0)
    return dict(found), settled


def ratios(found: Rates, link: Link) -> tuple[str, list[float], list[float]]:
    """The fixed codec with the best median; auto over it, and auto over raw, within each repetition."""
    best = max(LINKED, key=lambda codec: statistics.median(found[link, codec]))
    to_best, to_raw = (
        [a / b for a, b in zip(found[link, AUTO], found[link, codec], strict=True)] for codec in (best, "raw")
    )
    return best, to_best, to_raw


def link_page(found: Rates, settled: dict[Link, dict[str, str]]) -> str:
    """Steps a second, for people."""
    parts: list[str] = []
    for link in settled:
        raw = found[link, "raw"]
        rows = [
            [
                codec,
                f"{statistics.median(found[link, codec]):,.0f}",
                spread(found[link, codec]),
                shown(statistics.median(a / b for a, b in zip(found[link, codec], raw, strict=True))),
            ]
            for codec in (*LINKED, AUTO)
        ]
        best, to_best, to_raw = ratios(found, link)
        parts.append(
            f"Tensors of {link[1] // 4} KiB through a simulated link of {link[0]} Mbit/s, {SHARDS} steps at once:"
            "\n\n"
            f"{table(['codec', 'steps/s', 'spread', 'times raw'], rows)}\n\n"
            f"auto is {shown(statistics.median(to_best))} times the best fixed codec ({best}; {spread(to_best)}), "
            f"{shown(statistics.median(to_raw))} times raw ({spread(to_raw)}); it settled on "
            f"{', '.join(f'{codec} for the {role}' for role, codec in settled[link].items())}."
        )
    return "\n\n".join(parts)


def figures(found: dict[str, list[Outcome]], links: Rates) -> list[Figure]:
    """What programs read."""
    given: list[Figure] = []
    for codec, most in FAST_BYTES.items():
        if codec in found:
            values = tuple(one.bytes_per_step for one in found[codec])
            name = f"bytes a step, {codec}"
            given.append(Figure(name=name, unit="B", values=values, better="lower", target=float(most)))
    if {"raw", SMALLEST} <= set(found):
        raw, small = found["raw"], found[SMALLEST]
        fewer = tuple(a.bytes_per_step / b.bytes_per_step for a, b in zip(raw, small, strict=True))
        given.append(Figure(name="times fewer bytes, smallest", unit="", values=fewer, target=TIMES_FEWER))
        lost = (statistics.fmean(points_lost(raw, small)),)
        given.append(Figure(name="points lost, smallest", unit="", values=lost, better="lower", target=POINTS_LOST))
    if {"raw", "int8, spill=int8"} <= set(found):
        lost = (statistics.fmean(points_lost(found["raw"], found["int8, spill=int8"])),)
        given.append(Figure(name="points lost, int8", unit="", values=lost, better="lower", target=0.2))
    for link in dict.fromkeys(link for link, _ in links):
        _, to_best, to_raw = ratios(links, link)
        of = f"at {link[0]} Mbit/s, {link[1] // 4} KiB"
        given.append(Figure(name=f"auto over the best fixed codec {of}", unit="", values=tuple(to_best), target=0.9))
        wanted = 3.0 if link[0] == min(RATES) else None
        given.append(Figure(name=f"auto over raw {of}", unit="", values=tuple(to_raw), target=wanted))
    return given


def main() -> int:
    """Measure, print the tables, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("accuracy", "link"), help="one half of it")
    parser.add_argument("--codecs", nargs="+", default=CODECS, metavar="CODEC", help="the first is compared with")
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help=f"to train (default: {EPOCHS})")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="N", help="of the training runs")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="turns through the link (default: 5)")
    add_json_flag(parser)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    about, pages = circumstances(), list[str]()
    found: dict[str, list[Outcome]] = {}
    links: Rates = {}
    try:
        if asked.only != "link":
            found = trained(asked.codecs, asked.seeds, asked.epochs)
            picture = path_of("compression", about, "png")
            draw(picture, found)
            pages.append(accuracy_page(found, asked.epochs, picture.name))
        if asked.only != "accuracy":
            links, settled = asyncio.run(linked(asked.repeat))
            pages.append(link_page(links, settled))
    except zsfl.ZsflError as error:
        print(f"benchmarks/compression.py: {error}", file=sys.stderr)
        return 2
    page = "\n\n".join(pages)
    kept = {
        "runs": [
            {
                **dataclasses.asdict(dataclasses.replace(one, payload_bytes=Counter())),
                "payload_bytes": dict(one.payload_bytes),
            }
            for runs in found.values()
            for one in runs
        ],
        "steps_per_s": [
            {"mbit_s": link[0], "width": link[1], "codec": codec, "values": v} for (link, codec), v in links.items()
        ],
    }
    print(page)
    print(f"\nkept in {write('compression', about, kept, page)}")
    hand_over(asked.json, "compression", about, figures(found, links))
    return 0


if __name__ == "__main__":
    sys.exit(main())
