"""How much work a split server takes on: decisions only."""

from __future__ import annotations

from zsfl.errors import Busy
from zsfl.split_server.trying import HeldOutShare
from zsfl.wire.fields import Load

MAX_HELD_BYTES = 1 << 30
"""Of the requests that wait or are worked on; a longer one is taken when nothing else is there."""
SMOOTHING = 0.1
"""Weight of the newest measurement in the moving average of the service time."""


class Admission:
    """At most `slots` steps at once; the rest is refused with an estimate of when to come back."""

    def __init__(self, slots: int) -> None:
        self.tests = HeldOutShare(slots)
        """Test batches, which are taken beside them."""
        self._slots = slots
        self._busy = 0
        self._held_bytes = 0
        self._service_s = 0.0
        self._draining = False

    @property
    def load(self) -> Load:
        """What to advertise."""
        busy = self._busy + self.tests.count
        return Load(slots=0 if self._draining else self._slots, busy=busy, service_s=self._service_s)

    def enter_test(self, peer: str, size_bytes: int) -> None:
        """Take a test batch; Busy when there is no room."""
        self._check_stays()
        self.tests.enter(peer, size_bytes)

    def enter(self, size_bytes: int = 0, *, is_begun: bool = False) -> None:
        """Take a slot for a request of so many bytes; Busy when there is no room.

        `is_begun`: it ends what only this server has begun.
        """
        if not is_begun:
            self._check_stays()
        if self._busy >= self._slots:
            raise Busy(f"all {self._slots} slots are taken; ask another", retry_after_s=self._service_s * self._busy)
        if self._busy and self._held_bytes + size_bytes > MAX_HELD_BYTES:
            raise Busy(f"{self._held_bytes} bytes wait here; ask another", retry_after_s=self._service_s * self._busy)
        self._busy += 1
        self._held_bytes += size_bytes

    def _check_stays(self) -> None:
        if self._draining:
            raise Busy("this split server is leaving; ask another", retry_after_s=60.0)

    def leave(self, size_bytes: int = 0) -> None:
        """Give the slot back."""
        self._busy -= 1
        self._held_bytes -= size_bytes

    def measured(self, service_s: float) -> None:
        """One step took so long to compute."""
        weight = SMOOTHING if self._service_s else 1.0
        self._service_s += weight * (service_s - self._service_s)

    def drain(self) -> None:
        """Take nothing new from now on."""
        self._draining = True

    @property
    def idle(self) -> bool:
        """Whether all requests that were admitted are answered."""
        return not self._busy and not self.tests.count
