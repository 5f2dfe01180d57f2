"""Which spills to fetch from whom, which steps are whole, and what becomes of each: decisions only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from zsfl.aggregator.fates import StepSet
from zsfl.ids import Cid, NodeId, PartName, RunId, StepId, Version, parse_cid, step_cid
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
    """Collects both parts of every step that may still count, each exactly once.

    A step is counted by the version that `take`s it, or dropped with a reason that the next record carries. One that
    comes when it is too late for it is dropped; spills of other runs, and of steps that nobody asked for, are let be.
    """

    def __init__(self, run: RunId, *, max_staleness: int, steps_per_version: int, shards: int) -> None:
        self._run = run
        self._shards = shards
        self._bound = max_staleness
        self._width = steps_per_version
        self._version = Version(0)
        self._expected: frozenset[Cid] | None = None
        self._open = False
        self._asked: dict[Key, NodeId] = {}
        self._held: dict[Cid, dict[PartName, Contribution]] = {}
        self._settled = StepSet(steps_per_version)
        self._dropped: dict[Cid, str] = {}

    def begin(self, version: Version, expected: Iterable[Cid] | None) -> list[StepId]:
        """Steps at this version are made from now on: those `expected`, or with None any.

        Steps that are too late for it are dropped. The whole late steps that still count, oldest first.
        """
        self._version, self._open = version, True
        self._expected = None if expected is None else frozenset(expected)
        for cid in [cid for cid in self._held if self._is_too_late(parse_cid(cid))]:
            parts = self._held.pop(cid)
            missing = [part for part in PARTS if part not in parts]
            self._drop(cid, f"its {missing[0]} part never came" if missing else self._lateness(parse_cid(cid)))
        return [parse_cid(cid) for cid in sorted(self._held) if len(self._held[cid]) == len(PARTS)]

    def expect(self, expected: Iterable[Cid]) -> None:
        """More steps are asked for at the version that is gathered: somebody joined."""
        if self._expected is not None:
            self._expected |= frozenset(expected)

    def end(self) -> None:
        """No step at the present version is waited for any more; it is committed."""
        self._open = False

    def offered(self, node: NodeId, offers: Iterable[SpillOffer]) -> Verdict:
        """Sort what a holder offers."""
        verdict = Verdict()
        for offer in offers:
            key: Key = offer.cid, offer.part
            step = parse_cid(offer.cid)
            if not self._is_known(step):
                continue
            if step in self._settled:
                verdict.release.append(offer.cid)
            elif self._is_too_late(step):
                self._drop(offer.cid, self._lateness(step))
            elif self._wants(key):
                self._asked[key] = node
                verdict.fetch.append(key)
        return verdict

    def expects(self, cid: Cid) -> bool:
        """Whether this step may still count."""
        step = parse_cid(cid)
        return (
            self._is_known(step)
            and not self._is_too_late(step)
            and step not in self._settled
            and cid not in self._dropped
            and (step.version < self._version or self._expected is None or cid in self._expected)
        )

    def _is_known(self, step: StepId) -> bool:
        """Whether it is a step that this run may ever have asked for."""
        return (
            step.run == self._run
            and step.k < self._width
            and step.shard < self._shards
            and step.version <= self._version
        )

    def _behind(self, step: StepId) -> int:
        """How stale a step is in the next version that can count it."""
        return self._version - step.version + (not self._open)

    def _is_too_late(self, step: StepId) -> bool:
        return self._behind(step) > self._bound

    def _lateness(self, step: StepId) -> str:
        behind = self._behind(step)
        return f"{behind} version{'s' if behind > 1 else ''} late; at most {self._bound} count"

    def _drop(self, cid: Cid, reason: str) -> None:
        self._held.pop(cid, None)
        self._dropped.setdefault(cid, reason)

    def _wants(self, key: Key) -> bool:
        return self.expects(key[0]) and key[1] not in self._held.get(key[0], ()) and key not in self._asked

    def arrived(self, contribution: Contribution) -> bool:
        """Take a verified contribution; whether it was news (a second copy is not)."""
        cid, part = contribution.cid, contribution.part
        self._asked.pop((cid, part), None)
        if not self.expects(cid) or contribution.version != parse_cid(cid).version:
            return False
        parts = self._held.setdefault(cid, {})
        if part in parts:
            return False
        parts[part] = contribution
        return True

    def samples(self, step: StepId) -> int:
        """Samples of a step that is whole."""
        return self._held[step_cid(step.run, step.shard, step.version, step.k)]["client"].samples

    def is_whole(self, cid: Cid) -> bool:
        """Whether both parts of this step are here."""
        return len(self._held.get(cid, ())) == len(PARTS)

    def not_delivered(self, node: NodeId, keys: Iterable[Key] | None = None) -> None:
        """A holder did not hand over these (None: anything); they may be asked of whoever offers them next."""
        wanted = list(self._asked) if keys is None else list(keys)
        for key in wanted:
            if self._asked.get(key) == node:
                del self._asked[key]

    def void(self, reason: str) -> None:
        """Nothing of what is here will count."""
        for cid in list(self._held):
            self._drop(cid, reason)

    def take(self) -> tuple[Sequence[Contribution], Mapping[Cid, str]]:
        """All whole steps, in cid order, as counted from now on; and what was dropped since, with the reason."""
        whole = sorted(cid for cid in self._held if self.is_whole(cid))
        window = [self._held[cid][part] for cid in whole for part in PARTS]
        for cid in whole:
            del self._held[cid]
            self._settled.add(parse_cid(cid))
        dropped, self._dropped = self._dropped, {}
        for cid in dropped:
            self._settled.add(parse_cid(cid))
        return window, dropped
