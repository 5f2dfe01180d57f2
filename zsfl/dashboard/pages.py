"""What the commands that look at a run print: `zsfl ls`."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from zsfl.bounds import is_address
from zsfl.dashboard.observer import changed_within, observing
from zsfl.dashboard.watch import Participant, Snapshot
from zsfl.errors import ConfigError, NoPeer
from zsfl.reports import ADDRESS, METRICS
from zsfl.settings import NodeSettings
from zsfl.wire.door import is_loopback

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_COLUMNS = 160
QUIET_S = 0.8
"""Once everybody who is known was heard, and nobody came for so long, all are there that can be found."""


def folder_of(run: str | None, settings: NodeSettings) -> Path | None:
    """The folder of a run on this machine, with nothing named the newest; None where `run` is the name of a job, or a
    node is named.

    ConfigError says what else to name where there is none.
    """
    if settings.named:
        return None
    if run is None:
        found = sorted(settings.runs.glob(f"*/{ADDRESS}"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise ConfigError(
                f"there is no run in {settings.runs}: name the job whose nodes to look for, such as mnist, the folder "
                "of a run, or a node with --peer HOST:PORT"
            )
        return found[-1].parent
    for folder in (Path(run), settings.runs / run):
        if any((folder / name).is_file() for name in (ADDRESS, METRICS)):
            return folder
    if Path(run).exists():
        raise ConfigError(f"{run} is no folder of a run; name one, such as runs/mnist, or the job by its name")
    return None


def where(run: str | None, settings: NodeSettings) -> tuple[NodeSettings, Mapping[str, str]]:
    """How to find the nodes of a run: by the folder of one, by addresses, or by mDNS and the name of a job.

    With nothing named it is the newest run beside this folder; ConfigError as in `folder_of`.
    """
    folder = folder_of(run, settings)
    if folder is None:
        return _towards_peers(settings), {} if run is None else {"name": run}
    return _towards_peers(replace(settings, peers=(_address(folder / ADDRESS),))), {}


def _towards_peers(settings: NodeSettings) -> NodeSettings:
    """Where a peer is on another machine, and no address of this one is given: the one by which that is reached."""
    if not is_loopback(settings.host):
        return settings
    for peer in (*settings.peers, *settings.dns):
        host = peer.rpartition(":")[0]
        if not is_loopback(host) and (mine := _address_towards(host)) not in ("", host):
            return replace(settings, host=mine)
    return settings


def _address_towards(host: str) -> str:
    """This machine's own address on the way to another, as the routes say; empty where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect((host, 9))  # which sends nothing
        except OSError:
            return ""
        return str(asking.getsockname()[0])


def _address(path: Path) -> str:
    try:
        address = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path} ({error}), which says where the run's aggregator is") from None
    if not is_address(address):
        raise ConfigError(
            f"{path} is to say where the run's aggregator is, as host:port, and says {address[:80]!r}: "
            "name a node with --peer"
        )
    return address


def print_nodes(run: str | None, settings: NodeSettings, wait_s: float, *, as_json: bool) -> int:
    """List who is there; 1 when nobody is."""
    found = asyncio.run(_looked_around(run, settings, wait_s))
    if as_json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
        return 0 if found.nodes else 1
    if not found.nodes:
        raise NoPeer(_nobody(run, settings))
    if found.run is not None:
        print(run_line(found))
    console().print(nodes_table(found.nodes))
    return 0


def _nobody(run: str | None, settings: NodeSettings) -> str:
    named = run or ", ".join(settings.named) or "the newest run here"
    return f"nobody of {named} answers: is it on still? `zsfl status` shows what it left"


async def _looked_around(run: str | None, settings: NodeSettings, wait_s: float) -> Snapshot:
    settings, facts = where(run, settings)
    loop, news = asyncio.get_running_loop(), asyncio.Event()
    async with observing(settings, facts, lambda said: print(said, file=sys.stderr), news.set) as watch:
        ends_s, quiet_s = loop.time() + wait_s, 0.0
        known: frozenset[str] = frozenset()
        while loop.time() < ends_s:
            now = watch.snapshot(loop.time())
            if (ids := _heard(now)) != known or not ids:
                known, quiet_s = ids, loop.time() + QUIET_S
            elif loop.time() >= quiet_s and len(ids) == len(now.nodes):
                break
            await changed_within(news, min(ends_s, quiet_s) - loop.time())
        return watch.snapshot(loop.time())


def _heard(now: Snapshot) -> frozenset[str]:
    return frozenset(node.id for node in now.nodes if node.counters)


def run_line(found: Snapshot) -> str:
    """How the run stands, in a line."""
    run = found.run or {}
    if run["phase"] != "training":
        return f"the run is {run['phase']}, at version {run['version']}{': ' if run['reason'] else ''}{run['reason']}"
    return f"training: round {run['round'] + 1} of {run['rounds']}, version {run['version']}"


def console() -> Console:
    """Where to print tables: as wide as the terminal, or as they need in a file or a pipe."""
    from rich.console import Console

    usual = Console()
    return usual if usual.is_terminal else Console(width=PIPE_COLUMNS)


def nodes_table(nodes: Sequence[Participant]) -> Table:
    """Who is there, one line each."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("node", "role", "address"):
        table.add_column(title, no_wrap=True, overflow="fold", min_width=max(map(len, (title, *_texts(nodes, title)))))
    table.add_column("state")
    for title in ("heard", "steps/s", "busy", "sent", "received"):
        table.add_column(title, justify="right", no_wrap=True)
    for node in nodes:
        state = {"there": "there", "late": "late", "gone": f"gone: {node.reason}"}[node.presence]
        style = {"there": "", "late": "yellow", "gone": "red"}[node.presence]
        table.add_row(
            node.name,
            node.role,
            node.address,
            state,
            f"{node.heard_s:.1f} s",
            f"{node.rates['steps']:.1f}" if "steps" in node.rates else "",
            "" if node.slots is None else f"{node.busy}/{node.slots}",
            in_bytes(node.counters.get("bytes_sent", 0.0)),
            in_bytes(node.counters.get("bytes_received", 0.0)),
            style=style,
        )
    return table


def _texts(nodes: Sequence[Participant], title: str) -> list[str]:
    return [{"node": node.name, "role": node.role, "address": node.address}[title] for node in nodes]


def in_bytes(count: float) -> str:
    """`1.4 MB`, for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
