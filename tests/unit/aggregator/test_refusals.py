"""Contributions that cannot be counted: refused with the reason, and what that means for the run."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import torch
from torch import nn

from zsfl.aggregator.gathering import Gathering
from zsfl.aggregator.refusals import Refusals
from zsfl.aggregator.roster import Roster
from zsfl.errors import BadShape, RunFailed, StorageError
from zsfl.ids import NodeId, PartName, RunId, Version, parse_cid, step_cid
from zsfl.latest import Latest
from zsfl.learning.averaging import Contribution, StepShare
from zsfl.learning.master import Master
from zsfl.learning.model import SplitModel
from zsfl.learning.optim import OptimizerSpec
from zsfl.learning.weighting import MOST_WEIGHT, weight_objection
from zsfl.spill.layout import MOST_BEFORE_DATA
from zsfl.wire.fields import ShardInfo
from zsfl.wire.messages import SpillOffer

RUN = RunId("3fa9c1")
CIDS = [step_cid(RUN, shard, Version(0)) for shard in (0, 1)]


class Case:
    """Two shards, both of whose steps are expected."""

    def __init__(self, *, exact: bool) -> None:
        model = SplitModel(head=nn.Linear(2, 3), body=nn.Linear(3, 3), tail=nn.Linear(3, 2))
        master = Master(model, OptimizerSpec(torch.optim.SGD, {"lr": 0.1}))
        self.state = master.state()
        self.gathering = Gathering(RUN, max_staleness=4, steps_per_version=1, shards=2)
        self.gathering.begin(Version(0), CIDS)
        roster = Roster(2)
        for shard in (0, 1):
            info = ShardInfo(shard=shard, train_samples=9, test_samples=0)
            roster.join(NodeId(f"c{shard}"), f"client-{shard}", [info])
        self.job = SimpleNamespace(objection_to=lambda n, samples: "", most_samples=lambda held: held)
        self.refusals = Refusals(self.gathering, master, Latest(roster), cast(Any, self.job), is_exact=exact)

    def step(self, shard: int, part: PartName = "client", **changes: Any) -> Contribution:
        names = ("body",) if part == "body" else ("head", "tail")
        grads = {name: torch.ones_like(one) for name, one in self.state.items() if name.startswith(names)}
        plain: dict[str, Any] = {"cid": CIDS[shard], "part": part, "version": Version(0), "n": 3.0, "samples": 3}
        plain |= {"loss_sum": 1.5, "grads": grads, "buffers": {}, "node": "node"}
        return Contribution(**(plain | changes))


WRONG: dict[str, dict[str, Any]] = {
    "a gradient of no tensor of the model": {"grads": {"head.nothing": torch.ones(2)}},
    "another shape": {"grads": {"head.weight": torch.ones(9, 9)}},
    "no weight": {"n": -1.0},
    "no samples": {"samples": 0},
    "a buffer that is none": {"buffers": {"head.nothing": torch.ones(2)}},
}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_objected_to_when_it_comes(changes: dict[str, Any], exact: bool) -> None:
    case = Case(exact=exact)
    assert case.refusals.objection(case.step(0)) == ""
    assert CIDS[0] in case.refusals.objection(case.step(0, **changes))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("part", ["client", "body"])
@pytest.mark.parametrize("n", [0.0, 2.9, 3.1, 1e300, math.inf, math.nan])
def test_without_weights_a_batch_weighs_its_samples(n: float, part: PartName, exact: bool) -> None:
    case = Case(exact=exact)
    case.job.objection_to = lambda n, samples: weight_objection(n, samples, None)
    assert case.refusals.objection(case.step(0, part)) == ""
    said = case.refusals.objection(case.step(0, part, n=n, client="client-0"))
    assert said == f"{CIDS[0]} of client-0: it weighs n={n:g} for 3 samples, and the job has no loss_weight"


def test_with_weights_no_sample_outweighs_all_others() -> None:
    case = Case(exact=True)
    case.job.objection_to = lambda n, samples: weight_objection(n, samples, MOST_WEIGHT)
    for n in (0.0, 0.1, 3 * MOST_WEIGHT):
        assert case.refusals.objection(case.step(0, n=n)) == ""
    for n in (3.01 * MOST_WEIGHT, 1e300, math.inf, math.nan, -1.0):
        said = case.refusals.objection(case.step(0, n=n, client="client-0"))
        assert (
            said
            == f"{CIDS[0]} of client-0: it weighs n={n:g} for 3 samples, and most_weight of the job is 100 for each"
        )


def test_of_what_is_merged_each_step_weighs_what_it_may() -> None:
    case = Case(exact=True)
    case.job.objection_to = lambda n, samples: weight_objection(n, samples, None)
    members = [StepShare(cid=cid, n=n, samples=3, client=f"c{n}") for cid, n in zip(CIDS, (1.0, 5.0), strict=True)]
    merged = case.step(0, "body", n=6.0, samples=6, members=tuple(members))
    assert "c1.0: it weighs n=1 for 3 samples" in case.refusals.objection(merged)


@pytest.mark.parametrize("part", ["client", "body"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_batch_has_no_more_samples_than_its_shard_can_give(part: PartName, exact: bool) -> None:
    case = Case(exact=exact)
    assert case.refusals.objection(case.step(0, part, n=9.0, samples=9)) == ""
    said = case.refusals.objection(case.step(0, part, n=10.0, samples=10, client="client-0"))
    assert said == f"{CIDS[0]} of client-0: it is of 10 samples, and a batch of its shard of 9 at most"
    members = [StepShare(cid=cid, n=n, samples=n, client=f"c{n}") for cid, n in zip(CIDS, (9, 1 << 40), strict=True)]
    merged = case.step(0, "body", n=9.0 + (1 << 40), samples=9 + (1 << 40), members=tuple(members))
    assert f"of c{1 << 40}: it is of {1 << 40:,} samples" in case.refusals.objection(merged)


def test_parts_of_one_step_are_of_one_batch() -> None:
    case = Case(exact=True)
    assert case.gathering.arrived(case.step(0, "body"))
    assert "not of one batch" in case.refusals.objection(case.step(0, n=2.0))
    assert case.refusals.objection(case.step(1, n=2.0)) == ""


@pytest.mark.parametrize(
    "changes", [{"loss_sum": math.nan}, {"grads": {"head.bias": torch.tensor([1.0, math.inf, 0])}}]
)
def test_what_is_not_finite_is_left_out_unless_nothing_goes_on_without_it(changes: dict[str, Any]) -> None:
    assert Case(exact=True).refusals.objection(Case(exact=True).step(0, **changes)) == ""
    assert Case(exact=False).refusals.objection(Case(exact=False).step(0, **changes))


@pytest.mark.parametrize(
    "error", [TypeError("a"), ValueError("a"), OverflowError("a"), RuntimeError("a"), BadShape("a")]
)
def test_whatever_goes_wrong_while_it_is_judged_is_an_objection_and_told_of_once(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    case = Case(exact=False)

    def objection(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(case.refusals._master, "objection", objection)
    for _ in range(3):
        said = case.refusals.objection(case.step(0, client="client-0"))
        assert said.startswith(f"{CIDS[0]} of node for client-0 cannot be judged: ")
    assert capfd.readouterr().err.count("Traceback") == (not isinstance(error, BadShape))


@pytest.mark.parametrize("error", [StorageError("full"), MemoryError()])
def test_a_disk_or_a_memory_that_is_full_is_nobodys_contributions_fault(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(exact=False)

    def objection(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(case.refusals._master, "objection", objection)
    with pytest.raises(type(error)):
        case.refusals.objection(case.step(0))


def test_exact_mode_ends_with_the_name_of_whose_step_it_is() -> None:
    case = Case(exact=True)
    case.refusals.check([0, 1])
    case.refusals.give_up([CIDS[1]], "it has a gradient of nothing")
    with pytest.raises(RunFailed, match=r"it has a gradient of nothing \(it is a step of client-1"):
        case.refusals.check([0, 1])


def test_the_other_modes_go_on_without_it_and_record_why() -> None:
    case = Case(exact=False)
    case.refusals.give_up([CIDS[1]], "it is not finite")
    case.refusals.check([0, 1])
    assert not case.gathering.takes(case.step(1))
    for part in ("body", "client"):
        assert case.gathering.arrived(case.step(0, part))
    window, dropped = case.gathering.take()
    assert [one.cid for one in window] == [CIDS[0]] * 2
    assert dropped == {CIDS[1]: "refused: it is not finite"}


def test_a_run_of_which_no_step_can_be_counted_ends() -> None:
    case = Case(exact=False)
    case.refusals.give_up([CIDS[0]], "of shard 0")
    case.refusals.give_up([CIDS[1]], "of shard 1")
    with pytest.raises(RunFailed, match=r"no step of anybody who takes part can be counted; .* of shard 1"):
        case.refusals.check([0, 1])
    case = Case(exact=False)
    case.refusals.give_up([CIDS[0]], "of shard 0")
    case.refusals.give_up([CIDS[1]], "of shard 1")
    case.refusals.counted(parse_cid(CIDS[0]))
    case.refusals.check([0, 1])


def test_what_is_longer_than_any_spill_of_the_model_is_objected_to_by_its_offer() -> None:
    case = Case(exact=False)
    most = case.refusals.most_bytes + MOST_BEFORE_DATA
    offer = SpillOffer(cid=CIDS[0], part="client", version=Version(0), size_bytes=most)
    assert case.refusals.too_long(offer) == ""
    said = case.refusals.too_long(msgspec.structs.replace(offer, size_bytes=most + 1))
    assert said == f"it is of {most + 1} bytes, and no spill of this model has more than {most}"
