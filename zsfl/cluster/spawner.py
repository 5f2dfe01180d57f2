"""What it takes to start a node somewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from zsfl.ids import Role
from zsfl.reports import AnyReport


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCommand:
    """One node to start."""

    name: str
    role: Role
    flags: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Settings by field name (`zsfl.settings.NodeSettings`)."""

    def settings(self) -> dict[str, Any]:
        """The node's name and flags, fit for JSON; what is None is left to the node's own defaults."""
        given = {"name": self.name, **self.flags}
        return {
            key: str(value) if isinstance(value, Path) else value for key, value in given.items() if value is not None
        }


class Spawner(Protocol):
    """Starts, signals and ends nodes; what they say, and that they ended, comes through `reports`."""

    reports: asyncio.Queue[AnyReport]

    async def open(self) -> None:
        """Get ready to start nodes."""
        ...

    async def start(self, command: NodeCommand) -> None:
        """Start one node; it reports Ready, or Failed and Exited."""
        ...

    async def stop(self, name: str) -> None:
        """Ask a node to drain and leave."""
        ...

    async def kill(self, name: str) -> None:
        """End a node at once (SIGKILL, where it is a process)."""
        ...

    async def close(self) -> None:
        """End whatever still runs, and wait for it.

        Those that record versions leave first: of what is left while others leave no version is to be made.
        """
        ...
