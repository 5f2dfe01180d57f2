"""MNIST over 20 client processes and 2 split servers, beside one process that has all the data.

    ZSFL_DATA=... python benchmarks/mnist.py

Wants MNIST's four IDX files in the folder that ZSFL_DATA names, or in `mnist` below it. About two minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from _figures import Figure, add_json_flag, hand_over
from _record import circumstances, table, write

import zsfl

BUDGET_S = 50
IN_THE_LOT = ("--rounds", "1")

JOB = Path(__file__).parent / "jobs" / "mnist.py"
CLIENTS, SPLIT_SERVERS = 20, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round, or epoch: test accuracy in 0..1, and how long training it took."""

    accuracy: float
    seconds: float


def reference(job: zsfl.Job, rounds: int) -> list[Round]:
    """Ordinary PyTorch: the same network from the same weights, all samples, batches of all clients together."""
    train, test = zsfl.mnist(flat=True)
    x, y = train.take(torch.arange(len(train))).tensors
    test_x, test_y = test.take(torch.arange(len(test))).tensors
    model = job.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    order = torch.Generator().manual_seed(job.seed)
    done: list[Round] = []
    for _ in range(rounds):
        begun_s = time.perf_counter()
        for rows in torch.randperm(len(x), generator=order).split(CLIENTS * job.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        seconds = time.perf_counter() - begun_s
        with torch.no_grad():
            right = (model(test_x).argmax(1) == test_y).float().mean().item()
        done.append(Round(accuracy=right, seconds=seconds))
    return done


async def split_federated(rounds: int) -> tuple[list[zsfl.RoundReport], float]:
    """The job over real processes; its rounds, and the seconds until the cluster was ready."""
    with tempfile.TemporaryDirectory(prefix="zsfl-bench-") as runs:
        begun_s = time.perf_counter()
        cluster = zsfl.LocalCluster(JOB, clients=CLIENTS, split_servers=SPLIT_SERVERS, runs=runs)
        async with cluster:
            ready_s = time.perf_counter() - begun_s
            return [report async for report in cluster.train(rounds)], ready_s


def report(together: list[zsfl.RoundReport], alone: list[Round], ready_s: float) -> tuple[str, dict[str, object]]:
    """The page for people, and the figures for machines."""
    head = ["round", "zsfl accuracy", "one process", "zsfl s", "one process s", "steps/s", "kB sent/step"]
    rows = [
        [
            str(ours.round),
            f"{ours.accuracy or 0:.2%}",
            f"{theirs.accuracy:.2%}",
            f"{ours.seconds:.1f}",
            f"{theirs.seconds:.2f}",
            f"{ours.steps_per_s:,.0f}",
            f"{ours.bytes_sent / ours.steps / 1e3:.1f}",
        ]
        for ours, theirs in zip(together, alone, strict=True)
    ]
    steps, train_s = sum(r.steps for r in together), sum(r.seconds for r in together)
    alone_s = sum(r.seconds for r in alone)
    per_step = sum(r.bytes_sent for r in together) / steps
    page = (
        f"{CLIENTS} client processes, {SPLIT_SERVERS} split servers, 1 aggregator, against one process with all the "
        "data: same network, same initial weights, SGD 0.1, momentum 0.9, 1,280 samples a version.\n\n"
        f"{table(head, rows)}\n\n"
        f"zsfl: {steps:,} steps in {train_s:.1f} s, {steps / train_s:,.0f} steps/s with the held-out tests, "
        f"{per_step / 1e3:.1f} kB sent a step by all nodes together; ready after {ready_s:.1f} s. "
        f"One process: {alone_s:.1f} s."
    )
    return page, {
        "clients": CLIENTS,
        "split_servers": SPLIT_SERVERS,
        "ready_s": ready_s,
        "train_s": train_s,
        "steps_per_s": steps / train_s,
        "bytes_per_step": per_step,
        "accuracy": [r.accuracy for r in together],
        "round_s": [r.seconds for r in together],
        "reference_accuracy": [r.accuracy for r in alone],
        "reference_round_s": [r.seconds for r in alone],
    }


def handed(together: list[zsfl.RoundReport], alone: list[Round]) -> list[Figure]:
    """The figures for other programs; the rounds are the repetitions of what does not change with them."""
    points = 100 * ((together[-1].accuracy or 0) - alone[-1].accuracy)
    return [
        Figure(name="accuracy after the last round", unit="%", values=(100 * (together[-1].accuracy or 0),)),
        Figure(name="points more than one process", unit="points", values=(points,)),
        Figure(name="steps", unit="steps/s", values=tuple(r.steps_per_s for r in together)),
        Figure(
            name="sent by all nodes",
            unit="kB/step",
            values=tuple(r.bytes_sent / r.steps / 1e3 for r in together),
            better="lower",
        ),
    ]


def main() -> int:
    """Run both, print the table, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="rounds to train (default: 10)")
    add_json_flag(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = circumstances()
    try:
        alone = reference(zsfl.load_job(JOB), args.rounds)
        together, ready_s = asyncio.run(split_federated(args.rounds))
    except zsfl.ZsflError as error:
        print(f"benchmarks/mnist.py: {error}", file=sys.stderr)
        return 2
    page, figures = report(together, alone, ready_s)
    print(page)
    print(f"\nkept in {write('mnist', about, figures, page)}")
    hand_over(args.json, "mnist", about, handed(together, alone))
    return 0


if __name__ == "__main__":
    sys.exit(main())
