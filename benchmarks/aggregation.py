"""What spills cost: written by a split server or client, verified and averaged by the aggregator, and its memory.

    python benchmarks/aggregation.py

Everything in one thread, in turn with the bare equivalents.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from _figures import Figure, add_json_flag, hand_over
from _record import circumstances, table, write
from safetensors.torch import save_file

from zsfl.aggregator.journal import Journal
from zsfl.ids import PartName, RunId, Version, step_cid
from zsfl.learning.averaging import Contribution, average
from zsfl.spill.layout import SpillMeta, decode_contribution, encode, pieces
from zsfl.spill.store import SpillStore

BUDGET_S = 60
IN_THE_LOT = ("--repeat", "2", "--spills", "500")

Measured = Mapping[str, Sequence[float]]
RUN, MB = RunId("b3fc40"), 1_000_000
BATCH = 20
"""Spills written with one call, and between two releases."""
BODY = {"grad/body.0.weight": torch.randn(64, 64), "grad/body.0.bias": torch.randn(64)}
CLIENT = {"grad/tail.weight": torch.randn(10, 64), "grad/tail.bias": torch.randn(10)}


def meta(shard: int, version: int = 0, part: PartName = "body") -> SpillMeta:
    """Whose spill it is, of a batch of 64 samples."""
    return SpillMeta(
        cid=step_cid(RUN, shard, Version(version)),
        part=part,
        version=Version(version),
        n=64.0,
        samples=64,
        loss_sum=12.5,
        client=f"client-{shard}",
        node="split-server-0",
    )


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    begun_s = time.perf_counter()
    work()
    return time.perf_counter() - begun_s


@contextmanager
def no_garbage() -> Iterator[None]:
    """The garbage collector does not run inside a measurement."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# --- writing ---------------------------------------------------------------------------------------------


def writing(folder: Path, repeat: int, count: int) -> dict[str, dict[str, list[float]]]:
    """Microseconds a spill, for spills of a small network's body and of its tail."""
    found: dict[str, dict[str, list[float]]] = {}
    for number in range(repeat):
        for name, tensors in (("body, 16.6 KB", BODY), ("tail, 2.6 KB", CLIENT)):
            for way, work in ways_to_write(folder / f"{number}{name[:4]}", tensors, count).items():
                with no_garbage():
                    found.setdefault(name, {}).setdefault(way, []).append(1e6 * timed(work) / count)
    return found


def ways_to_write(folder: Path, tensors: Mapping[str, torch.Tensor], count: int) -> dict[str, Callable[[], None]]:
    """Each writes `count` spills; zsfl's also lets go of them, a batch at a time, as a run does."""
    folder.mkdir()
    stores = [SpillStore(folder / "one"), SpillStore(folder / "batch")]
    data = encode(meta(0), tensors)
    bare = os.open(folder / "bare", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def put(store: SpillStore, together: bool) -> None:
        for version in range(count // BATCH):
            metas = [meta(shard, version) for shard in range(BATCH)]
            if together:
                store.put_all([(one, tensors) for one in metas])
            else:
                for one in metas:
                    store.put(one, tensors)
            store.release(one.cid for one in metas)

    def append() -> None:
        for _ in range(count):
            os.write(bare, data)

    def rename() -> None:
        for number in range(count):
            aside = folder / f"{number}.tmp"
            aside.write_bytes(data)
            aside.rename(folder / f"{number}.bin")

    def safetensors() -> None:
        for number in range(count):
            aside = folder / f"{number}.tmp"
            save_file(dict(tensors), aside)
            aside.rename(folder / f"{number}.safetensors")

    return {
        "zsfl, one by one": lambda: put(stores[0], False),
        f"zsfl, {BATCH} with one write": lambda: put(stores[1], True),
        "bare: the same bytes appended to a file": append,
        "bare: a file each, written aside and renamed": rename,
        "safetensors' save_file and rename": safetensors,
    }


# --- averaging -------------------------------------------------------------------------------------------


def averaging(folder: Path, repeat: int, count: int) -> dict[str, list[float]]:
    """GB of spills a second, for `count` spills of 1 MB; and the memory bandwidth of one thread."""
    big = torch.randn(256 * MB // 4)
    copy = torch.empty_like(big)
    base = torch.randn(MB // 4)
    # As they arrive: in memory that may be written to, so that nothing need be copied.
    stored = [bytearray(encode(meta(shard), {"grad/body.weight": base})) for shard in range(count)]
    plain = [np.frombuffer(data, np.float32, base.numel(), len(data) - 4 * base.numel()) for data in stored]
    decoded = [decode_contribution(data) for data in stored]
    journal = Journal(folder)
    journal.begin(Version(0))

    def bare() -> None:
        total = plain[0].copy()
        for one in plain[1:]:
            total += one

    versions = itertools.count(1)

    def whole_way() -> None:
        version = Version(next(versions))
        journal.begin(version)
        average([journal.keep(decode_contribution(data), data) for data in stored])
        journal.drop_before(version)

    ways: dict[str, tuple[Callable[[], object], int]] = {
        "memory: one thread reads (sum of 256 MB)": (lambda: big.sum(), 256 * MB),
        "memory: one thread copies (bytes read, 256 MB)": (lambda: copy.copy_(big), 256 * MB),
        "bare: numpy adds up arrays in memory": (bare, count * MB),
        "zsfl averages contributions in memory": (lambda: average(decoded), count * MB),
        "zsfl averages contributions on the disk": (lambda: average(on_disk), count * MB),
        "zsfl verifies (CRC-32) contributions": (lambda: [decode_contribution(data) for data in stored], count * MB),
        "zsfl verifies, keeps on the disk and averages": (whole_way, count * MB),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    on_disk = [journal.keep(one, data) for one, data in zip(decoded, stored, strict=True)]
    for _ in range(repeat):
        for way, (work, size) in ways.items():
            with no_garbage():
                found[way].append(size / timed(work) / 1e9)
    return found


def share_of_memory(found: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Each way's GB/s over what one thread reads, repetition by repetition."""
    reads = found["memory: one thread reads (sum of 256 MB)"]
    return {way: [one / read for one, read in zip(rates, reads, strict=True)] for way, rates in found.items()}


# --- memory ----------------------------------------------------------------------------------------------


def memory(cases: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Peak memory above what was there before, in models, by case: so many spills of so many MB."""
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=measure_peaks, args=(theirs, cases))
    process.start()
    found = mine.recv()
    process.join()
    return found


def measure_peaks(pipe: Connection, cases: Sequence[tuple[int, int]]) -> None:
    """In a process of its own, where nothing else takes or leaves memory."""
    torch.set_num_threads(1)
    pipe.send({f"{count:,} spills of {size} MB": peak_models(count, size * MB) for count, size in cases})


def peak_models(count: int, size: int) -> float:
    """Spills arrive one by one, are verified and kept, then averaged."""
    base = {"grad/body.weight": torch.randn(size // 4)}

    def arrive(journal: Journal, count: int) -> None:
        journal.begin(Version(0))
        kept: list[Contribution] = []
        for shard in range(count):
            data = bytearray().join(pieces(meta(shard), base))
            kept.append(journal.keep(decode_contribution(data), data))
        average(kept)

    with tempfile.TemporaryDirectory(prefix="zsfl-bench-") as folder:
        arrive(Journal(Path(folder) / "warm"), 1)  # what is made once, whatever the number
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = resident("VmRSS")
        arrive(Journal(Path(folder) / "measured"), count)
        return (resident("VmHWM") - before) / size


def resident(kind: str) -> int:
    """Bytes of memory of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


# --- what is shown ---------------------------------------------------------------------------------------


def rows(found: Measured, form: str) -> list[list[str]]:
    """Median, lowest and highest of each."""
    return [
        [way, *(format(value, form) for value in (statistics.median(values), min(values), max(values)))]
        for way, values in found.items()
    ]


def main() -> int:
    """Measure, print the tables, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="measurements of each (default: 5)")
    parser.add_argument("--spills", type=int, default=1000, metavar="N", help="spills of 1 MB (default: 1000)")
    add_json_flag(parser)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    about = circumstances()
    with tempfile.TemporaryDirectory(prefix="zsfl-bench-") as folder:
        written = writing(Path(folder), asked.repeat, 400)
        averaged = averaging(Path(folder), asked.repeat, asked.spills)
    shares = share_of_memory(averaged)
    peaks = memory([(10, 1), (asked.spills, 1), (3, 45), (10, 45)])
    head = ["", "median", "lowest", "highest"]
    pages = [
        f"Writing a spill: microseconds, {name}.\n\n{table(head, rows(ways, '.1f'))}" for name, ways in written.items()
    ]
    pages.append(f"Averaging {asked.spills:,} spills of 1 MB: GB/s.\n\n{table(head, rows(averaged, '.2f'))}")
    pages.append(f"The same over what one thread reads from memory.\n\n{table(head, rows(shares, '.0%'))}")
    peak_rows = [[case, f"{models:.2f}"] for case, models in peaks.items()]
    pages.append(f"Peak memory of receiving and averaging, in models.\n\n{table(['', 'models'], peak_rows)}")
    page = "\n\n".join(pages)
    print(page)
    figures = {"writing_us": written, "averaging_gb_per_s": averaged, "peak_models": peaks}
    print(f"\nkept in {write('aggregation', about, figures, page)}")
    named = {
        "averaged in memory, of memory bandwidth": "zsfl averages contributions in memory",
        "verified, kept on the disk and averaged": "zsfl verifies, keeps on the disk and averages",
    }
    handed = [Figure(name=name, unit="of it", values=tuple(shares[way]), target=0.5) for name, way in named.items()]
    peak = max(peaks.values())
    handed.append(Figure(name="peak memory of averaging", unit="models", values=(peak,), better="lower", target=3.0))
    hand_over(asked.json, "aggregation", about, handed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
