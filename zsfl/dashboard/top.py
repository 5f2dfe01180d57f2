"""`zsfl top`: who is there and what they do, redrawn in place until Ctrl-C."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from zsfl.dashboard.observer import observing
from zsfl.dashboard.pages import nodes_table, run_line, where
from zsfl.dashboard.watch import Snapshot, Watch
from zsfl.errors import ConfigError
from zsfl.settings import NodeSettings

if TYPE_CHECKING:
    from rich.console import RenderableType

REDRAW_S = 0.5
MOST_EVENTS = 6
"""Of what happened, shown below."""


def watch_nodes(run: str | None, settings: NodeSettings) -> int:
    """Show who is there until Ctrl-C; ConfigError where there is no terminal, or nothing to look for."""
    console = Console()
    if not console.is_terminal:
        raise ConfigError("`zsfl top` draws on a terminal: here, `zsfl ls` lists who is there")
    with suppress(KeyboardInterrupt):
        asyncio.run(_watch(run, settings, console))
    return 0


async def _watch(run: str | None, settings: NodeSettings, console: Console) -> None:
    found, facts = where(run, settings)
    watch, loop, said = Watch(settings.beat_s), asyncio.get_running_loop(), list[str]()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            looked_for = found, facts
            async with observing(found, facts, said.append, lambda: None, watch):
                while looked_for == (found, facts):
                    live.update(drawn(watch.snapshot(loop.time()), said, console.height), refresh=True)
                    del said[:-1]
                    await asyncio.sleep(REDRAW_S)
                    if watch.is_alone:  # it may be started again elsewhere
                        with suppress(ConfigError):
                            found, facts = where(run, settings)


def drawn(now: Snapshot, notes: list[str], lines: int) -> RenderableType:
    """What fits so many lines: the run, who is there, and what happened last."""
    if not now.nodes:
        said = f"\n{notes[-1]}" if notes else ""
        return Text(f"nobody is there yet: looking{said}")
    room = max(1, lines - MOST_EVENTS - 5)
    parts: list[RenderableType] = [
        Text(run_line(now) if now.run else "no aggregator says how the run stands", style="bold"),
        nodes_table(now.nodes[:room]),
    ]
    if len(now.nodes) > room:
        parts.append(Text(f"and {len(now.nodes) - room} more: `zsfl ls` lists them all", style="dim"))
    parts.append(Text())
    for event in now.events[:MOST_EVENTS]:
        parts.append(Text(f"{event.ago_s:5.0f} s ago  {event.node} {event.what}", style="dim"))
    return Group(*parts)
