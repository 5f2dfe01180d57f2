"""Figures that a program can read: what a benchmark hands to run.py and compare.py by `--json FILE`.

A benchmark calls `add_json_flag` on its parser and `hand_over` when it is done; all else about it is its own affair.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One thing measured, as often as it was."""

    name: str
    """The same in every run of the benchmark."""
    unit: str
    values: tuple[float, ...]
    """One for each repetition; at least one."""
    better: Literal["higher", "lower"] = "higher"
    target: float | None = None
    """What the median should reach: at least, or at most, as `better` says."""
    headline: bool = True
    """Whether it is worth a line in the table of all benchmarks; the others are there to be compared."""

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the target; None without one."""
        if self.target is None:
            return None
        return self.median >= self.target if self.better == "higher" else self.median <= self.target


class Handed(msgspec.Struct, frozen=True, kw_only=True):
    """What one run of a benchmark hands over."""

    benchmark: str
    about: dict[str, Any]
    """See `_record.circumstances`."""
    figures: tuple[Figure, ...]


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """Let the benchmark be told where to hand its figures over."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE, for programs")


def hand_over(path: Path | None, name: str, about: Mapping[str, Any], figures: Sequence[Figure]) -> None:
    """Write the figures where `--json` said, if it was given."""
    if path is not None:
        handed = Handed(benchmark=name, about=dict(about), figures=tuple(figures))
        path.write_bytes(msgspec.json.format(msgspec.json.encode(handed)) + b"\n")


def taken(path: Path) -> Handed:
    """What a benchmark has written to `path`; ValueError when that is no such thing, OSError when there is none."""
    return msgspec.json.decode(path.read_bytes(), type=Handed)


def shown(value: float) -> str:
    """A number with three digits that mean something, or all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """The lowest and the highest of several values; nothing of one."""
    return f"{shown(min(values))} to {shown(max(values))}" if len(values) > 1 else ""
