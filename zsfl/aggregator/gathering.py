"""Which spills to fetch from whom, which steps are whole, and what becomes of each: decisions only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from zsfl.aggregator.fates import StepSet
from zsfl.ids import Cid, NodeId, PartName, RunId, SpillKind, StepId, Version, parse_cid, step_cid
from zsfl.learning.averaging import Contribution
from zsfl.wire.messages import SpillOffer

Key = tuple[Cid, SpillKind]
PARTS: tuple[PartName, PartName] = ("body", "client")
_MOST_ANSWERS = 1 << 16
MOST_DROPPED = 1 << 16
"""By one record, of steps of which nothing is here: what is offered beyond that is dropped by the next one."""
_NO_COMPANY = "the client part of a step that it is merged with never came"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What to do about a digest of offers."""

    fetch: list[Key] = field(default_factory=list[Key])
    release: list[Cid] = field(default_factory=list[Cid])


class _Merged:
    """One contribution that is the body part of several steps."""

    def __init__(self, contribution: Contribution) -> None:
        self.contribution = contribution
        self.cids = [member.cid for member in contribution.members]
        self.missing = set(self.cids)
        """Steps whose client part is not here: before it is, none of them can be counted with this."""


@dataclass(slots=True)
class _Step:
    """What is here of one step."""

    parts: dict[PartName, Contribution] = field(default_factory=dict[PartName, Contribution])
    merged: _Merged | None = None
    told: bool = False
    """It was said to be whole."""

    @property
    def is_merged(self) -> bool:
        """Whether it counts by a merged contribution, which goes before a single one."""
        return self.merged is not None and not self.merged.missing

    @property
    def is_whole(self) -> bool:
        return len(self.parts) == len(PARTS) or self.is_merged

    @property
    def missing(self) -> str:
        """Why it is not whole; empty when it is."""
        if self.is_whole:
            return ""
        if self.merged is not None:
            return "its client part never came" if "client" not in self.parts else _NO_COMPANY
        return f"its {next(part for part in PARTS if part not in self.parts)} part never came"


class Gathering:
    """Collects both parts of every step that may still count, each exactly once.

    A step is counted by the version that `take`s it, or dropped with a reason that the next record carries. One that
    comes when it is too late for it is dropped; spills of other runs, and of steps not asked for so far, are let
    be. Those of steps that this run never asks for are released.

    A merged contribution is the body part of all its steps. It counts with all of them, once their client parts are
    here, in place of what came of them singly; or, when one of them was counted or dropped without it, not at all.
    """

    def __init__(self, run: RunId, *, max_staleness: int, steps_per_version: int, shards: int) -> None:
        self._run = run
        self._shards = shards
        self._bound = max_staleness
        self._width = steps_per_version
        self._version = Version(0)
        self._expected: frozenset[Cid] | None = None
        self._open = self._begun = False
        self._asked: dict[Key, NodeId] = {}
        self._held: dict[Cid, _Step] = {}
        self._settled = StepSet(steps_per_version)
        self._dropped: dict[Cid, str] = {}
        self._taken: frozenset[Cid] = frozenset()
        """For the version that is made of them: before it is recorded, nobody may let go of these."""
        self._answers: dict[Cid, bool] = {}
        """What `expects` said since the last change, since it is asked several times of each step."""

    def begin(self, version: Version, expected: Iterable[Cid] | None) -> list[StepId]:
        """Steps at this version are made from now on: those `expected`, or with None any.

        Steps that are too late for it are dropped. The whole late steps that still count, oldest first.
        """
        self._version, self._open, self._begun = version, True, True
        self.recorded()
        self._answers.clear()
        self._expected = None if expected is None else frozenset(expected)
        late = {cid: step for cid, step in self._held.items() if self._is_too_late(parse_cid(cid))}
        reasons = [step.missing or self._lateness(parse_cid(cid)) for cid, step in late.items()]
        for cid, reason in zip(late, reasons, strict=True):
            self._drop(cid, reason)
        whole = sorted(cid for cid, step in self._held.items() if step.is_whole)
        for cid in whole:
            self._held[cid].told = True
        return [parse_cid(cid) for cid in whole]

    def resume(self, run: RunId, settled: Iterable[Cid]) -> None:
        """Go on with a run of which these steps were counted or dropped."""
        self._run = run
        for cid in settled:
            self._settled.add(parse_cid(cid))

    def expect(self, expected: Iterable[Cid]) -> None:
        """More steps are asked for at the version that is gathered: somebody joined."""
        if self._expected is not None:
            self._expected |= frozenset(expected)
            self._answers.clear()

    def end(self) -> None:
        """No step at the present version is waited for any more; it is committed."""
        self._open = False
        self._answers.clear()

    def recorded(self) -> None:
        """What was taken is in a record that stays: whoever holds it may let go of it."""
        self._taken = frozenset()

    def stop(self) -> None:
        """Nothing that comes from now on may count."""
        self._begun = False
        self._answers.clear()

    def offered(
        self, node: NodeId, offers: Iterable[SpillOffer], may_hold: Callable[[SpillOffer], bool] = lambda _: True
    ) -> Verdict:
        """Sort what a holder offers. Of what it cannot rightly have, only what is of no use is told."""
        verdict = Verdict()
        for offer in offers:
            cids = offer.members or (offer.cid,)
            if not may_hold(offer):
                verdict.release.extend(cid for cid in cids if self._is_useless(parse_cid(cid)))
            elif all([self._may_still_count(cid, verdict) for cid in cids]) and self._wants(offer):
                key: Key = offer.cid, offer.kind
                self._asked[key] = node
                verdict.fetch.append(key)
        if self._taken:
            return Verdict(fetch=verdict.fetch, release=[cid for cid in verdict.release if cid not in self._taken])
        return verdict

    def _may_still_count(self, cid: Cid, verdict: Verdict) -> bool:
        """Whether an offered step may; one that is of no use is released, one that is too late dropped."""
        step = parse_cid(cid)
        is_useless = self._is_useless(step)
        if not is_useless and not self._is_known(step):
            return False
        if is_useless:
            verdict.release.append(cid)
        elif not self._begun:
            pass  # it is offered again
        elif self._is_too_late(step):
            if len(self._dropped) < MOST_DROPPED:
                self._drop(cid, self._lateness(step))
        else:
            return True
        return False

    def _is_useless(self, step: StepId) -> bool:
        """Whether it is settled, or one that this run never asks for."""
        return step.run == self._run and (step in self._settled or not self._is_possible(step))

    def beside(self, contribution: Contribution) -> list[Contribution]:
        """What is here of the same steps."""
        found: dict[int, Contribution] = {}
        for cid in [member.cid for member in contribution.members] or [contribution.cid]:
            if (step := self._held.get(cid)) is not None:
                merged = () if step.merged is None else (step.merged.contribution,)
                found |= {id(one): one for one in (*step.parts.values(), *merged)}
        return list(found.values())

    def refuse(self, cids: Iterable[Cid], reason: str) -> None:
        """These steps are not to count, whatever else comes of them."""
        for cid in cids:
            if self.expects(cid):
                self._drop(cid, reason)

    def expects(self, cid: Cid) -> bool:
        """Whether this step may still count."""
        answer = self._answers.get(cid)
        if answer is None:
            answer = self._expects(cid)
            if len(self._answers) < _MOST_ANSWERS:
                self._answers[cid] = answer
        return answer

    def _expects(self, cid: Cid) -> bool:
        step = parse_cid(cid)
        return (
            self._begun
            and self._is_known(step)
            and not self._is_too_late(step)
            and step not in self._settled
            and cid not in self._dropped
            and (step.version < self._version or self._expected is None or cid in self._expected)
        )

    def _is_known(self, step: StepId) -> bool:
        """Whether it is a step that this run may ever have asked for."""
        return step.run == self._run and self._is_possible(step) and step.version <= self._version

    def _is_possible(self, step: StepId) -> bool:
        return step.k < self._width and step.shard < self._shards

    def _behind(self, step: StepId) -> int:
        """How stale a step is in the next version that can count it."""
        return self._version - step.version + (not self._open)

    def _is_too_late(self, step: StepId) -> bool:
        return self._behind(step) > self._bound

    def _lateness(self, step: StepId) -> str:
        behind = self._behind(step)
        return f"{behind} version{'s' if behind > 1 else ''} late; at most {self._bound} count"

    def _drop(self, cid: Cid, reason: str) -> None:
        step = self._held.pop(cid, None)
        self._dropped.setdefault(cid, reason)
        self._answers.pop(cid, None)
        if step is not None and step.merged is not None:
            self._dissolve(step.merged)

    def _dissolve(self, merged: _Merged) -> None:
        """One of its steps has a fate of its own: the others wait for contributions of their own."""
        for cid in merged.cids:
            step = self._held.get(cid)
            if step is not None and step.merged is merged:
                step.merged = None

    def _wants(self, offer: SpillOffer) -> bool:
        return (offer.cid, offer.kind) not in self._asked and self.lacks(offer)

    def lacks(self, offer: SpillOffer) -> bool:
        """Whether what is offered may count and is not here, be it asked for or not."""
        if offer.members:
            return all(self.expects(cid) and not self._has_merged(cid) for cid in offer.members)
        return self.expects(offer.cid) and not self._has(offer.cid, offer.part)

    def _has_merged(self, cid: Cid) -> bool:
        step = self._held.get(cid)
        return step is not None and step.merged is not None

    def _has(self, cid: Cid, part: PartName) -> bool:
        step = self._held.get(cid)
        return step is not None and (part in step.parts or (part == "body" and step.merged is not None))

    def takes(self, contribution: Contribution) -> bool:
        """Whether a verified contribution may count and is news (a second copy is not)."""
        cids = [member.cid for member in contribution.members] or [contribution.cid]
        if not all(self.expects(cid) and contribution.version == parse_cid(cid).version for cid in cids):
            return False
        if contribution.members:
            return not any(map(self._has_merged, cids))
        return not self._has(contribution.cid, contribution.part)

    def arrived(self, contribution: Contribution) -> bool:
        """Take a verified contribution, if it `takes` it; whether it did."""
        cid, part = contribution.cid, contribution.part
        self._asked.pop((cid, "merged" if contribution.members else part), None)
        if not self.takes(contribution):
            return False
        if contribution.members:
            self._merged_arrived(_Merged(contribution))
            return True
        step = self._held.get(cid)
        if step is None:
            step = self._held[cid] = _Step()
        step.parts[part] = contribution
        if part == "client" and step.merged is not None:
            step.merged.missing.discard(cid)
        return True

    def _merged_arrived(self, merged: _Merged) -> None:
        for cid in merged.cids:
            step = self._held.setdefault(cid, _Step())
            step.merged = merged
            if "client" in step.parts:
                merged.missing.discard(cid)

    def completed(self, cid: Cid) -> list[StepId]:
        """Steps that can be counted since what came last, which was of this step, and could not before."""
        step = self._held.get(cid)
        if step is None or not step.is_whole:
            return []
        cids = step.merged.cids if step.merged is not None and step.is_merged else [cid]
        new = [one for one in cids if not self._held[one].told]
        for one in new:
            self._held[one].told = True
        return [parse_cid(one) for one in new]

    def samples(self, step: StepId) -> int:
        """Samples of a step that is whole."""
        return self._held[step_cid(step.run, step.shard, step.version, step.k)].parts["client"].samples

    def is_missing(self, cid: Cid, part: PartName) -> bool:
        """Whether this part of a step may still count and is not here."""
        return self.expects(cid) and not self._has(cid, part)

    def may_need(self, cid: Cid, part: PartName) -> bool:
        """Whether this part of a step is not here and may count, be it that nobody has asked for the step so far."""
        step = parse_cid(cid)
        if step.run != self._run or step in self._settled or cid in self._dropped:
            return False
        return not (self._begun and self._is_too_late(step)) and not self._has(cid, part)

    def halves(self) -> list[Cid]:
        """Steps whose client part is here, and whose body part is neither here nor about to be handed over."""
        if any(kind == "merged" for _, kind in self._asked):  # which may be the body part of any of them
            return []
        return [
            cid
            for cid, step in self._held.items()
            if "client" in step.parts and self.is_missing(cid, "body") and (cid, "body") not in self._asked
        ]

    def is_whole(self, cid: Cid) -> bool:
        """Whether both parts of this step are here, and of all steps that it is merged with."""
        step = self._held.get(cid)
        return step is not None and step.is_whole

    def is_stuck(self, there: Collection[int]) -> bool:
        """Whether a step that is merged waits for the client part of a shard that is not `there`."""
        return any(
            step.merged is not None
            and not step.is_whole
            and "client" in step.parts
            and any(parse_cid(cid).shard not in there for cid in step.merged.missing)
            for step in self._held.values()
        )

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
        window: list[Contribution] = []
        whole = sorted(cid for cid, step in self._held.items() if step.is_whole)
        self._taken = frozenset((*whole, *self._dropped))
        for cid in whole:
            step = self._held.pop(cid)
            self._settled.add(parse_cid(cid))
            if step.merged is None or not step.is_merged:
                window.append(step.parts["body"])
                if step.merged is not None:
                    self._dissolve(step.merged)
            elif step.merged.contribution.cid == cid:
                window.append(step.merged.contribution)
            window.append(step.parts["client"])
        self._answers.clear()
        dropped, self._dropped = self._dropped, {}
        for cid in dropped:
            self._settled.add(parse_cid(cid))
        return window, dropped
