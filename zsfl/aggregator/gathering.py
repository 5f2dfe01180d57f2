"""Which spills to fetch from whom, which are settled, and when a window is complete: decisions only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from zsfl.ids import Cid, NodeId, PartName, RunId, Version, parse_cid
from zsfl.learning.averaging import Contribution
from zsfl.wire.messages import SpillOffer

Key = tuple[Cid, PartName]
PARTS: tuple[PartName, PartName] = ("body", "client")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What to do about a digest of offers."""

    fetch: list[Key] = field(default_factory=list[Key])
    release: list[Cid] = field(default_factory=list[Cid])


class Gathering:
    """Collects each part of each expected step of one version after another, exactly once."""

    def __init__(self) -> None:
        self._version = Version(0)
        self._run: RunId | None = None
        self._expected: Mapping[Cid, int] = {}
        self._asked: dict[Key, NodeId] = {}
        self._held: dict[Key, Contribution] = {}

    def begin(self, version: Version, expected: Mapping[Cid, int]) -> None:
        """Gather the steps of this version from now on; every earlier version is committed."""
        self._version, self._expected = version, expected
        for cid in expected:
            self._run = parse_cid(cid)[0]
            break
        self._asked.clear()
        self._held.clear()

    def offered(self, node: NodeId, offers: Iterable[SpillOffer], was_counted: Callable[[Cid], bool]) -> Verdict:
        """Sort what a holder offers; `was_counted` tells of a cid of an earlier version what became of it.

        A late copy of a step that was counted is released. Steps that nobody asked for, and those of other runs,
        are let be.
        """
        verdict = Verdict()
        for offer in offers:
            key = (offer.cid, offer.part)
            run, version, _ = parse_cid(offer.cid)
            if run != self._run:
                continue
            if version < self._version:
                if was_counted(offer.cid):
                    verdict.release.append(offer.cid)
            elif version == self._version and self._wants(key):
                self._asked[key] = node
                verdict.fetch.append(key)
        return verdict

    def expects(self, cid: Cid) -> bool:
        """Whether this step belongs to the version that is gathered."""
        return cid in self._expected

    def _wants(self, key: Key) -> bool:
        return key[0] in self._expected and key not in self._held and key not in self._asked

    def arrived(self, contribution: Contribution) -> bool:
        """Take a verified contribution; whether it was news (a second copy is not)."""
        key = (contribution.cid, contribution.part)
        self._asked.pop(key, None)
        if contribution.cid not in self._expected or contribution.version != self._version or key in self._held:
            return False
        self._held[key] = contribution
        return True

    def not_delivered(self, node: NodeId, keys: Iterable[Key] | None = None) -> None:
        """A holder did not hand over these (None: anything); they may be asked of whoever offers them next."""
        wanted = list(self._asked) if keys is None else list(keys)
        for key in wanted:
            if self._asked.get(key) == node:
                del self._asked[key]

    @property
    def complete(self) -> bool:
        """Whether every part of every expected step is here."""
        return len(self._held) == len(PARTS) * len(self._expected)

    def missing(self) -> list[int]:
        """Shards whose step is not wholly here."""
        return [shard for cid, shard in self._expected.items() if any((cid, part) not in self._held for part in PARTS)]

    def window(self) -> Sequence[Contribution]:
        """All that arrived, in cid order."""
        return [self._held[key] for key in sorted(self._held)]
