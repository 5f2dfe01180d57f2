"""What the aggregator asks of everybody: the state of the run, announced at every change and with every heartbeat."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

import msgspec

from zsfl.ids import Cid, RunId, Version
from zsfl.node import Node
from zsfl.wire.messages import Announcement, RunState


class Stage:
    """Holds the state of a run."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._settled: tuple[tuple[Cid, ...], tuple[Cid, ...]] = ((), ())
        self.run = RunId(secrets.token_hex(3))
        self.state = RunState(run=self.run, phase="waiting", version=Version(0), round=0, rounds=0, window=0, windows=0)

    def resume(self, run: RunId) -> None:
        """Go on with a run that began earlier."""
        self.run = run
        self.place(run=run)

    def settle(self, counted: Iterable[Cid], dropped: Iterable[Cid]) -> None:
        """A commit named these steps; the next announcement says so."""
        self._settled = (*self._settled[0], *counted), (*self._settled[1], *dropped)

    def place(self, **changes: Any) -> None:
        """Change the state; peers hear of it with the next announcement or heartbeat."""
        self.state = msgspec.structs.replace(self.state, serial=self.state.serial + 1, **changes)

    def enter(self, **changes: Any) -> None:
        """Change the state and announce it."""
        self.place(**changes)
        (counted, dropped), self._settled = self._settled, ((), ())
        announcement = Announcement(node=self._node.card.id, state=self.state, counted=counted, dropped=dropped)
        self._node.publish(announcement)
