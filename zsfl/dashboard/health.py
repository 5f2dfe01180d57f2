"""Whether a node is alive, and ready for its part, as whoever restarts nodes and sends them work asks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from zsfl.ids import Role
from zsfl.lane import soon_in_lane
from zsfl.wire.messages import Beat

MAIN_S = 30.0
"""What the main loop may take to answer: nothing in it ever takes long."""
LANE_S = 900.0
"""What the lane may: it loads data, and computes what takes long."""
NEEDS: dict[Role, tuple[Role, ...]] = {
    Role.CLIENT: (Role.AGGREGATOR, Role.SPLIT_SERVER),
    Role.SPLIT_SERVER: (Role.AGGREGATOR,),
    Role.STANDBY: (Role.AGGREGATOR,),
}
"""Whom a node has to have found to be ready; an aggregator nobody, as it is found."""


class _Pulse:
    """Whether a loop answers, as far as that is known by now: it is asked anew each time."""

    def __init__(self, soon: Callable[[Callable[[], None]], object], limit_s: float) -> None:
        self._soon = soon
        self._limit_s = limit_s
        self._asked_s: float | None = None

    def is_there(self) -> bool:
        now_s = time.monotonic()
        if (asked_s := self._asked_s) is None:
            self._asked_s = now_s
            with suppress(RuntimeError):  # the loop is closed, and will not answer
                self._soon(self._answer)
            return True
        return now_s - asked_s < self._limit_s

    def _answer(self) -> None:
        self._asked_s = None


class Health:
    """Of one node; asked from another thread than those that it asks about."""

    def __init__(self, main: asyncio.AbstractEventLoop) -> None:
        self._main = _Pulse(main.call_soon_threadsafe, MAIN_S)
        self._lane = _Pulse(soon_in_lane, LANE_S)
        self.beat: Beat | None = None
        """The newest heartbeat."""
        self.rests = False
        """Whether it has nothing left to do, and so lacks nothing for it."""

    def not_alive(self) -> str:
        """What does not answer; empty where all does."""
        silent = [name for name, pulse in (("main loop", self._main), ("lane", self._lane)) if not pulse.is_there()]
        return f"no answer comes from the {' and the '.join(silent)} any more" if silent else ""

    def not_ready(self) -> str:
        """What the node lacks for its part; empty when it lacks nothing."""
        if self.rests:
            return ""
        if self.beat is None:
            return "it does not serve yet: it loads its model and data, or waits for its port"
        known = {peer.role for peer in self.beat.peers}
        missing = [f"{role}" for role in NEEDS.get(self.beat.card.role, ()) if role not in known]
        return f"it knows no {' and no '.join(missing)} yet" if missing else ""
