"""What `zsfl doctor` prints."""

from __future__ import annotations

import asyncio
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from zsfl.dashboard.pages import console
from zsfl.doctor.here import look_at_torch
from zsfl.doctor.judging import findings
from zsfl.doctor.looking import look
from zsfl.doctor.seen import Finding, Seen, SeenNode
from zsfl.doctor.together import groups_of, hears, should_meet
from zsfl.settings import NodeSettings

if TYPE_CHECKING:
    from rich.table import Table

STATES = {"good": ("good", "green"), "warn": ("warn", "yellow"), "bad": ("BAD", "bold red")}
MOST_DRAWN = 20
"""Nodes in the matrix of who hears whom; more are no help to the eye."""


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """As data."""

    well: bool
    findings: Sequence[Finding]
    seen: Seen


def print_findings(settings: NodeSettings, job: Path | None, name: str, *, as_json: bool) -> int:
    """Look, judge, and say so; 1 when something is wrong."""
    seen = asyncio.run(look(settings, look_at_torch(settings.device, job), "" if job else name))
    found = findings(seen)
    well = all(finding.state != "bad" for finding in found)
    if as_json:
        told = msgspec.json.encode(Told(well=well, findings=found, seen=seen))
        sys.stdout.buffer.write(msgspec.json.format(told, indent=2) + b"\n")
    else:
        print_all(seen, found)
    return 0 if well else 1


def print_all(seen: Seen, found: Sequence[Finding]) -> None:
    """A line for each check, who hears whom, and how many things are wrong."""
    from rich.text import Text

    out = console()
    width = out.width if out.is_terminal else 1 << 16  # who reads a pipe wants whole lines
    for finding in found:
        word, style = STATES[finding.state]
        first, *more = _wrapped(finding.what, width)
        out.print(Text.assemble((f"{word:6}", style), f"{finding.check:10}{first}"), soft_wrap=True)
        for line in [*more, *(_wrapped(f"-> {finding.do}", width) if finding.do else ())]:
            out.print(Text(" " * 16 + line), soft_wrap=True)
    for nodes in groups_of(seen)[0].values():
        if (drawn := matrix(nodes)) is not None:
            print()
            out.print(drawn)
    bad = sum(finding.state == "bad" for finding in found)
    print("\nall is well" if not bad else f"\n{bad} thing{'s are' if bad > 1 else ' is'} wrong")


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(40, width - 16), break_long_words=False, break_on_hyphens=False)


def matrix(nodes: Sequence[SeenNode]) -> Table | None:
    """Who hears whom: a line for each that listens, a column for each that is heard."""
    from rich.table import Table
    from rich.text import Text

    told = [(node, node.condition) for node in nodes if node.condition]
    if not 1 < len(told) <= MOST_DRAWN:
        return None
    table = Table(box=None, pad_edge=False)
    table.add_column("who hears whom", no_wrap=True)
    for number in range(1, len(told) + 1):
        table.add_column(str(number), justify="center")
    for number, (node, mine) in enumerate(told, 1):
        row = [Text(f"{number} {mine.card.name}")]
        for other, theirs in told:
            heard = hears(mine, theirs.card)
            if other is node:
                row.append(Text("·"))
            elif heard:
                row.append(Text("yes", style="green"))
            elif heard is None:
                row.append(Text("?"))
            else:
                row.append(Text("NO", style="bold red") if should_meet(mine.card, theirs.card) else Text("-"))
        table.add_row(*row)
    return table
