"""Which spills a node holds, and where each is, wherever that may be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from zsfl.ids import Cid, RunId, SpillKind, parse_cid
from zsfl.spill.layout import SpillMeta
from zsfl.wire.messages import SpillOffer

Key = tuple[Cid, SpillKind]
FRESH_BYTES = 4 << 20
"""Kept in memory of those that were put last, until they are offered."""


class Home(Protocol):
    """What spills are in: a file or an object, of one spill or of many."""

    held: int
    """Spills in it that are not released."""


_Home = TypeVar("_Home", bound=Home)


@dataclass(slots=True)
class Held(Generic[_Home]):
    """One spill."""

    offer: SpillOffer
    home: _Home
    place: int
    """Where in its home it begins."""
    unsettled: set[Cid]
    """Cids that no commit has named yet."""


class Index(Generic[_Home]):
    """The spills that are held. A merged one is held until all its steps are released.

    What lets go of some gives the homes that none are in any more.
    """

    def __init__(self) -> None:
        self._held: dict[Key, Held[_Home]] = {}
        self._keys: dict[Cid, list[Key]] = {}
        """By cid, the spills that have to do with it."""
        self._fresh: dict[Key, bytes] = {}
        self._fresh_bytes = 0

    def hold(self, offer: SpillOffer, home: _Home, place: int = 0) -> list[_Home]:
        """Hold a spill that is in place; one of the same key makes room."""
        home.held += 1  # before: it may be the home of the other, too
        emptied = self.forget((offer.cid, offer.kind))
        held = self._held[offer.cid, offer.kind] = Held(offer, home, place, set(cids_of(offer)))
        for cid in held.unsettled:
            self._keys.setdefault(cid, []).append((offer.cid, offer.kind))
        return emptied

    def get(self, key: Key) -> Held[_Home] | None:
        """A spill that is held."""
        return self._held.get(key)

    def holds(self, cid: Cid) -> bool:
        """Whether anything of this step is held."""
        return cid in self._keys

    def homes(self) -> list[_Home]:
        """Where those are that are held."""
        return list({id(held.home): held.home for held in self._held.values()}.values())

    def offers(self, run: RunId) -> list[SpillOffer]:
        """What is held of one run, oldest version first; may be asked from any thread."""
        held = [held.offer for held in list(self._held.values()) if held.offer.cid.startswith(f"{run}-")]
        return sorted(held, key=lambda offer: (offer.version, offer.cid))

    def of_others(self, run: RunId) -> tuple[int, set[Cid]]:
        """How many spills of other runs are held, and their steps."""
        others = [held for key, held in self._held.items() if parse_cid(key[0]).run != run]
        return len(others), {cid for held in others for cid in held.unsettled}

    def release(self, cids: Iterable[Cid]) -> list[_Home]:
        """Hold the spills of these no more, as far as all their steps are released."""
        emptied: list[_Home] = []
        for cid in cids:
            for key in list(self._keys.get(cid, ())):
                held = self._held[key]
                if held.unsettled == {cid}:
                    emptied += self.forget(key)
                else:
                    held.unsettled.discard(cid)
                    self._unlist(cid, key)
        return emptied

    def forget(self, key: Key) -> list[_Home]:
        """Hold a spill no more, if it is held."""
        self.fresh(key)
        if (held := self._held.pop(key, None)) is None:
            return []
        for cid in held.unsettled:
            self._unlist(cid, key)
        held.home.held -= 1
        return [] if held.home.held else [held.home]

    def _unlist(self, cid: Cid, key: Key) -> None:
        keys = self._keys[cid]
        keys.remove(key)
        if not keys:
            del self._keys[cid]

    def keep_fresh(self, key: Key, data: bytes) -> None:
        """Remember the bytes of a spill that was just put."""
        self._fresh[key] = data
        self._fresh_bytes += len(data)
        while self._fresh_bytes > FRESH_BYTES:
            self._fresh_bytes -= len(self._fresh.pop(next(iter(self._fresh))))

    def fresh(self, key: Key) -> bytes | None:
        """These bytes, the first time that they are asked for."""
        if data := self._fresh.pop(key, None):
            self._fresh_bytes -= len(data)
        return data

    def clear(self) -> None:
        """Hold nothing; what is there stays there."""
        self._held, self._keys, self._fresh, self._fresh_bytes = {}, {}, {}, 0


def offer_of(meta: SpillMeta, size_bytes: int) -> SpillOffer:
    """What a spill of so many bytes is offered as."""
    members = tuple(member.cid for member in meta.members)
    return SpillOffer(cid=meta.cid, part=meta.part, version=meta.version, size_bytes=size_bytes, members=members)


def cids_of(offer: SpillOffer) -> Sequence[Cid]:
    """The steps that it stands for."""
    return offer.members or (offer.cid,)
