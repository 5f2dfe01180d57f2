"""What it brings that a split server takes several waiting steps through the body at once.

    ZSFL_DATA=... python benchmarks/merging.py

Wants MNIST's four IDX files in the folder that ZSFL_DATA names, or in `mnist` below it. A minute; two with a GPU, where
it also runs a convolutional body, or anywhere with `--all`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _cluster import Load, load
from _figures import Figure, add_json_flag, hand_over
from _jobs import JOBS
from _record import circumstances, in_short, table, write

import zsfl

BUDGET_S = 60
IN_THE_LOT = ("--repeat", "2", "--seconds", "1")


@dataclass(slots=True, kw_only=True)
class Case:
    """One body, with merging and without."""

    name: str
    job: Path
    changes: dict[str, Any]
    clients: int
    least: float
    """How many times as fast it is to be with merging."""
    on: list[Load] = field(default_factory=list[Load])
    off: list[Load] = field(default_factory=list[Load])

    @property
    def ratios(self) -> list[float]:
        """Of each turn: how many times as fast with merging."""
        return [on.steps_per_s / off.steps_per_s for on, off in zip(self.on, self.off, strict=True)]

    async def run(self, turn: int, seconds: float) -> None:
        """Both, the one first that came second the last time."""
        for merge in (True, False) if turn % 2 else (False, True):
            found = await load(
                self.job,
                self.changes | {"merge": merge},
                seconds=seconds,
                clients=self.clients,
                split_servers=1,
                client_processes=1,
            )
            (self.on if merge else self.off).append(found)
            print(
                f"{turn + 1} {self.name}, {'on' if merge else 'off'}: {found.steps_per_s:,.0f} steps/s",
                flush=True,
            )


def cases(everything: bool) -> list[Case]:
    """A body that is too small to gain, and, where it is worth while, one that has much to gain."""
    small = Case(
        name="64-64 ReLU, 20 clients, batches of 64",
        job=JOBS / "microsfl_untested.py",
        changes={"steps": 16},
        clients=20,
        least=0.95,
    )
    deep = Case(
        name="12 residual blocks, 32 clients, batches of 8",
        job=JOBS / "convolutional.py",
        changes={},
        clients=32,
        least=3.0,
    )
    return [small, deep] if everything else [small]


def page(found: Sequence[Case], device: str) -> str:
    """The table."""
    rows = [
        [
            case.name,
            in_short([one.steps_per_s for one in case.on]),
            in_short([one.steps_per_s for one in case.off]),
            in_short(case.ratios, "{:.2f}"),
            f"{case.least:g}",
            in_short([one.cpu_us("split-server") for one in case.on]),
            in_short([one.cpu_us("split-server") for one in case.off]),
        ]
        for case in found
    ]
    head = ["", "steps/s merged", "not merged", "times as fast", "aim", "server us a step merged", "not merged"]
    return (
        f"One split server on {device}, all clients in one process, exact mode; {len(found[0].on)} turns, with and "
        f"without merging (`Job.merge`), in changing order: median (lowest to highest).\n\n{table(head, rows)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--repeat", type=int, default=5, metavar="N", help="turns (default: 5)")
    add("--seconds", type=float, default=2.0, metavar="S", help="about how long to measure each time (default: 2)")
    add("--all", action="store_true", help="the convolutional body without a GPU, too")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    about = circumstances()
    has_gpu = torch.cuda.is_available()
    found = cases(args.all or has_gpu)
    try:
        asyncio.run(_measure(found, args))
    except zsfl.ZsflError as error:
        print(f"benchmarks/merging.py: {error}", file=sys.stderr)
        return 2
    text = page(found, torch.cuda.get_device_name() if has_gpu else "the CPU")
    details = {
        case.name: {
            "merged_steps_per_s": [one.steps_per_s for one in case.on],
            "steps_per_s": [one.steps_per_s for one in case.off],
            "ratios": case.ratios,
            "least": case.least,
        }
        for case in found
    }
    print(f"\n{text}\n\nkept in {write('merging', about, details, text)}")
    figures = [
        Figure(name=case.name, unit="times as fast", values=tuple(case.ratios), target=case.least) for case in found
    ]
    hand_over(args.json, "merging", about, figures)
    return 0


async def _measure(found: Sequence[Case], args: argparse.Namespace) -> None:
    for turn in range(args.repeat):
        for case in found:
            await case.run(turn, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
