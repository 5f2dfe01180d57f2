"""Whom a run waits for before it begins, or goes on."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Sequence
from contextlib import suppress

from zsfl.aggregator.holders import Holders
from zsfl.aggregator.roster import Roster
from zsfl.errors import NoPeer
from zsfl.ids import Role
from zsfl.latest import Latest
from zsfl.node import Node
from zsfl.ranges import clients_for


class Assembly:
    """Waits for clients and split servers, and knows whom a run goes on without."""

    def __init__(self, node: Node, roster: Latest[Roster], holders: Holders, start_with: int) -> None:
        """`start_with`: shards whose clients a run begins with; 0: all, as one that is resumed does."""
        self._node = node
        self._roster = roster
        self._holders = holders
        self._start_with = start_with
        self._is_resumed = False
        self._left: frozenset[int] = frozenset()

    def resume(self, without: frozenset[int]) -> None:
        """It is one that is resumed: these shards' clients had left it."""
        self._is_resumed, self._left = True, without

    async def until_there(self) -> frozenset[int]:
        """Wait for what the run cannot begin without; without whom it goes on. NoPeer where they do not come."""
        join_s = self._node.settings.join_s
        try:
            with self._node.waiting(self._missing):
                async with asyncio.timeout(join_s):
                    await self._until_whole()
        except TimeoutError:
            raise NoPeer(f"after {join_s:g} s it still waits for {self._missing()}") from None
        if gone := sorted(self._revoked().intersection(self._roster.value.missing()) - self._left):
            self._node.note(
                f"going on without {clients_for(gone)}: the key of whose machine is not trusted here any more; one on "
                "another machine takes part once it joins",
                "warning",
            )
        return self._left | frozenset(gone)

    async def until_back(self, most_s: float) -> None:
        """Wait for all who took part; but who went with the aggregator before is waited for no longer than ever."""
        with self._node.waiting(self._missing), suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                await self._until_whole()
        if absent := self._roster.value.absent(self._left, 0):
            self._node.note(f"going on without {clients_for(absent)}, until they are back", "warning")
            self._left |= frozenset(absent)
        self._start_with = 1

    async def _until_whole(self) -> None:
        while self._missing():  # a key may be revoked meanwhile, of which nobody is told
            await self._roster.changed_within(self._node.settings.beat_s)

    def _revoked(self) -> frozenset[int]:
        """Whom a run that is resumed does without, as it does when their keys are revoked in the middle of it."""
        return self._holders.revoked() if self._is_resumed else frozenset()

    def _missing(self) -> str:
        """What the run cannot begin without, for people."""
        absent = self._roster.value.absent(self._left | self._revoked(), self._start_with)
        wanted = [clients_for(absent) + self._how_without(absent)] if absent else []
        if not absent and not self._roster.value.present():
            wanted = ["a client"]  # where all are revoked, or had left
        wanted += [] if self._node.peers(Role.SPLIT_SERVER) else ["a split server"]
        return " and ".join(wanted)

    def _how_without(self, shards: Sequence[int]) -> str:
        """Of which other machines these are, and what to do where one will not come back; nothing where none is."""
        machines = self._holders.machines_of(shards, but=self._node.card.key)
        if not self._is_resumed or not machines:
            return ""
        of = f"machine {machines[0]}" if len(machines) == 1 else f"{len(machines)} machines, one of them {machines[0]}"
        folder = f" --keys {shlex.quote(self._node.settings.keys)}" if self._node.settings.keys else ""
        return f" (of {of}; to go on without, run here: zsfl keys revoke {machines[0]}{folder})"
