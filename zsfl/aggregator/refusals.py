"""What becomes of contributions that cannot be counted, whoever made them: decisions only."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from zsfl.aggregator.faults import Faults
from zsfl.aggregator.gathering import Gathering
from zsfl.aggregator.roster import Roster
from zsfl.errors import RunFailed
from zsfl.ids import Cid, StepId, parse_cid
from zsfl.latest import Latest
from zsfl.learning.averaging import Contribution, StepShare, is_loss
from zsfl.learning.job import Job
from zsfl.learning.master import Master
from zsfl.spill.layout import MOST_BEFORE_DATA
from zsfl.spill.segments import MAX_SEGMENT_BYTES
from zsfl.wire.messages import SpillOffer
from zsfl.words import number_of

MOST_REASON = 500
"""Characters, in a record."""


class Refusals:
    """Those of one run. In exact mode nothing goes on without a step, so that one in vain is the end of it; the other
    modes leave the step out, with the reason in the next record, as long as anybody's can be counted.
    """

    def __init__(
        self,
        gathering: Gathering,
        master: Master,
        roster: Latest[Roster],
        job: Job,
        *,
        is_exact: bool,
    ) -> None:
        """`roster` is touched when a step is given up."""
        self._gathering = gathering
        self._master = master
        self._roster = roster
        self._is_exact = is_exact
        self._job = job
        self._shards: dict[int, str] = {}
        """Shards whose last step was given up, and why."""
        self._ruin: str = ""
        self._faults = Faults()

    @property
    def most_bytes(self) -> int:
        """What the tensors of one contribution may take, unpacked or not."""
        return self._master.most_bytes

    @property
    def most_object_bytes(self) -> int:
        """What an object of a store may take: one contribution, or many small ones."""
        return self.most_bytes + MOST_BEFORE_DATA + 2 * MAX_SEGMENT_BYTES

    def too_long(self, offer: SpillOffer) -> str:
        """Why a spill that is offered is not even fetched; empty where it may be of this model, by its length."""
        most = self.most_bytes + MOST_BEFORE_DATA
        return f"it is of {offer.size_bytes} bytes, and no spill of this model has more than {most}" * (
            offer.size_bytes > most
        )

    def objection(self, one: Contribution) -> str:
        """Why a contribution that just came cannot be counted; empty when it can.

        What is not finite is let be in exact mode, where the commit finds it, and the same step comes out so again.
        """
        if self._is_exact and one.loss_sum is not None and not is_loss(one.loss_sum):
            return ""
        try:
            for step in one.members or [one]:
                if why := self._too_many(step) or self._job.objection_to(step.n, step.samples):
                    return f"{one.cid} of {step.client or one.whose}: {why}"
            return self._master.objection(one, self._gathering.beside(one), finite=not self._is_exact)
        except Exception as error:
            return f"{one.cid} of {one.whose} cannot be judged: {self._faults.said(error)}"

    def _too_many(self, step: Contribution | StepShare) -> str:
        shard = parse_cid(step.cid).shard
        held = self._roster.value.train_samples(shard)
        most = math.inf if held is None else self._job.most_samples(held)
        return f"it is of {number_of(step.samples, 'sample')}, and a batch of its shard of {most} at most" * (
            step.samples > most
        )

    def give_up(self, cids: Sequence[Cid], why: str) -> None:
        """What came of these steps was made again in vain."""
        shards = [parse_cid(cid).shard for cid in cids]
        if self._is_exact:
            names = self._roster.value.names(shards)
            self._ruin = f"{why} (it is a step of {names}, and was made again in vain)"
        else:
            self._gathering.refuse(cids, f"refused: {why}"[:MOST_REASON])
            self._shards |= dict.fromkeys(shards, why)
        self._roster.touch()

    def counted(self, step: StepId) -> None:
        """A step is whole that can be counted."""
        self._shards.pop(step.shard, None)

    def check(self, there: Collection[int]) -> None:
        """RunFailed when the run cannot go on; `there` are those who take part."""
        if not self._ruin and there and self._shards.keys() >= set(there):
            last = self._shards.popitem()[1]
            self._ruin = f"no step of anybody who takes part can be counted; the last was refused: {last}"
        if self._ruin:
            raise RunFailed(self._ruin)
