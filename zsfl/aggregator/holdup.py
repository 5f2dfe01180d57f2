"""What there is to say of a window that is not over yet: who holds it up, whether that is unusual, and what to do."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from zsfl.aggregator.roster import Roster
from zsfl.errors import RunFailed
from zsfl.ids import NodeId, PublicKey, Role
from zsfl.keys.machine import machine_id
from zsfl.latest import Latest
from zsfl.node import Node
from zsfl.waits import FIRST_WORD_S, LONELY_S

USUAL = 3.0
"""A window may take so many times as long as the quicker of the two before without a word."""
MOST_HINTS = 3
"""Clients of whom it is said what to do."""


class HoldUp:
    """Follows one window after another."""

    def __init__(
        self,
        node: Node,
        roster: Latest[Roster],
        missing: Callable[[], Sequence[int]],
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`missing`: shards whose steps are waited for now."""
        self._node = node
        self._roster = roster
        self._all_missing = missing
        self._met: frozenset[int] = frozenset()
        """Shards whose steps wait to be merged with the others'."""
        self._clock_s = clock_s
        self._began_s: float | None = None
        self._took_s: deque[float] = deque(maxlen=2)
        """By the last windows."""

    def began(self) -> float:
        """A window is opened, and the one before is over; when that is."""
        now_s = self._clock_s()
        if self._began_s is not None:
            self._took_s.append(now_s - self._began_s)
        self._began_s, self._met = now_s, frozenset()
        return now_s

    async def until(self, role: Role, fits: Callable[[Roster], bool]) -> None:
        """Wait for peers of a role without which no window can be; RunFailed when they do not come."""
        patience_s, what = self._node.settings.patience_s, role.replace("-", " ")
        try:
            with self._node.waiting(f"a {what}", lambda: self._node.hints_of_gone(role)):
                async with asyncio.timeout(patience_s):
                    await self._roster.wait_for(fits)
        except TimeoutError:
            raise RunFailed(f"for {patience_s:g} s there was no {what}; start some, then go on with --resume") from None

    def merging(self, shards: Iterable[int]) -> None:
        """The steps of these shards are where all of the window are to be merged, and wait for the others."""
        self._met = frozenset(shards)

    def _missing(self) -> Sequence[int]:
        missing = self._all_missing()
        return [shard for shard in missing if shard not in self._met] or missing

    def names(self) -> str:
        """Whose steps are missing, for people."""
        served = "" if self._node.peers(Role.SPLIT_SERVER) else ", and no split server is there to make them with"
        return (self._roster.value.names(self._missing()) or "any client") + served

    def unusual(self) -> str:
        """The same, where there is something to say: somebody is gone, or it takes longer than it should."""
        lasted_s = self._clock_s() - (self._began_s or 0.0)
        all_there = self._node.peers(Role.SPLIT_SERVER) and {*self._missing()} <= {*self._roster.value.present()}
        usual_s = max(FIRST_WORD_S, USUAL * min(self._took_s)) if self._took_s else LONELY_S
        return "" if all_there and lasted_s < usual_s else f"the steps of {self.names()}"

    def hints(self) -> tuple[str, ...]:
        """What to look at, and how to start what is gone."""
        roster, missing = self._roster.value, self._missing()
        there = set(roster.present())
        if not self._node.peers(Role.SPLIT_SERVER):
            return self._node.hints_of_gone(Role.SPLIT_SERVER)
        found: list[str] = []
        gone: dict[NodeId, list[int]] = {}
        for shard in missing if there else roster.missing():
            if shard not in there and (holder := roster.node_of(shard)) is not None:
                gone.setdefault(holder, []).append(shard)
        for node, shards in list(gone.items())[:MOST_HINTS]:
            found += self._node.hints_of_gone(Role.CLIENT, node, shards)
        if slow := [shard for shard in missing if shard in there][:MOST_HINTS]:
            names = ", ".join(map(roster.label, slow))
            found.append(
                f"{names}: there, and at work or stuck; the terminal or the log of each says what it waits for"
            )
            found.append(f"the run goes on without a client that is stopped{self._revoked(slow)}")
        return tuple(found)

    def _revoked(self, shards: Sequence[int]) -> str:
        """How to be rid of those on other machines that nobody can stop from here; nothing where no keys are used."""
        cards = (self._node.peer(node) for shard in shards if (node := self._roster.value.node_of(shard)) is not None)
        keys = dict.fromkeys(card.key for card in cards if card and card.key not in ("", self._node.card.key))
        folder = f" --keys {shlex.quote(self._node.settings.keys)}" if self._node.settings.keys else ""
        revokes = ", ".join(f"zsfl keys revoke {machine_id(PublicKey(key))}{folder}" for key in keys)
        return f", or whose machine is trusted no more: {revokes}" if revokes else ""
