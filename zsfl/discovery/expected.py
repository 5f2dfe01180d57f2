"""Whose key to expect at an address: what somebody answered to there, what others say, and all that are trusted."""

from __future__ import annotations

from collections.abc import Sequence

from zsfl.ids import Address

MAX_KEYS_TRIED = 32
"""So many trusted keys at once at an address; the next ones with the next try."""
MAX_ADDRESSES = 4096
"""About which something is remembered."""


class ExpectedKeys:
    """What is known of the keys of addresses. No hint keeps the right key from being tried."""

    def __init__(self) -> None:
        self._key_at: dict[Address, tuple[str, bool]] = {}
        """And whether somebody answered to it."""
        self._turn: dict[Address, int] = {}
        """Of the keys that are tried there, the first one of the next try."""

    def hinted(self, address: Address, key: str) -> None:
        """Somebody says that this is the key there: it replaces none that was answered to."""
        if key and not self._key_at.get(address, ("", False))[1]:
            self._keep(address, key, answered=False)

    def answered(self, address: Address, key: str) -> None:
        """Somebody answered there, to this key."""
        if key:
            self._keep(address, key, answered=True)

    def _keep(self, address: Address, key: str, *, answered: bool) -> None:
        self._key_at[address] = key, answered
        _bound(self._key_at)

    def next_of(self, address: Address, trusted: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
        """The key to expect there, if one is known, and others to try soon after: of those `trusted` (this machine's
        first, then the oldest first) its own, then those trusted last, and in the end all.
        """
        hinted, _ = self._key_at.get(address, ("", False))
        known = (hinted,) if hinted and hinted in trusted else ()
        others = [key for key in (*trusted[:1], *trusted[:0:-1]) if key not in known]
        if len(others) <= MAX_KEYS_TRIED:
            return known, others
        first = self._turn.pop(address, 0) % len(others)
        self._turn[address] = first + MAX_KEYS_TRIED
        _bound(self._turn)
        return known, (others[first:] + others[:first])[:MAX_KEYS_TRIED]


def _bound(kept: dict[Address, tuple[str, bool]] | dict[Address, int]) -> None:
    while len(kept) > MAX_ADDRESSES:
        kept.pop(next(iter(kept)))
