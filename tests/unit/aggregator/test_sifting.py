"""Which steps of a window are refused or clipped, and what is said of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsfl.aggregator.sifting import OFTEN, Sieve, Sifted, _square
from zsfl.ids import Cid, PartName, RunId, Version, parse_cid, step_cid
from zsfl.learning.averaging import Contribution
from zsfl.learning.job import Job
from zsfl.learning.master import Master
from zsfl.learning.model import SplitModel
from zsfl.learning.modes import Async, Elastic
from zsfl.learning.optim import sgd
from zsfl.learning.robust import Krum, Median, NormBound

RUN = RunId("abc123")
SAMPLES = 4


def model() -> SplitModel:
    return SplitModel(
        head=nn.Linear(2, 2), body=nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), tail=nn.Linear(2, 2)
    )


class Sifting:
    """A sieve that is fed window after window."""

    def __init__(self, **fields: Any) -> None:
        stated: dict[str, Any] = {"name": "trial", "model": model, "loss": F.cross_entropy, "data": _no_data}
        stated |= {"optimizer": sgd(0.1), "norm_bound": 1.0, "shards": 8}
        self.said: list[str] = []
        master = Master(model(), sgd(0.1))
        self.sieve = Sieve(Job(**(stated | fields)), master.check, self.said.append)

    def sift(self, steps: Sequence[Sequence[Contribution]], version: int = 0) -> Sifted:
        sizes = {shard: [SAMPLES] for shard in range(8)}
        return self.sieve.sift([one for parts in steps for one in parts], {}, Version(version), sizes)


def _no_data(shard: int, shards: int) -> Any:
    raise AssertionError("not asked for")


def step(
    shard: int, norm: float = 0.5, *, version: int = 0, n: float = SAMPLES, samples: int = SAMPLES, **body: Any
) -> list[Contribution]:
    """Both parts of a step whose mean gradient has this norm, 3 parts of 5 of it in the body."""
    both: list[Contribution] = []
    halves: list[tuple[PartName, str, float]] = [("body", "body.0.weight", 0.6), ("client", "tail.weight", 0.8)]
    for part, name, share in halves:
        grad = torch.full((2, 2), share * norm * n / 2)
        one = Contribution(
            cid=step_cid(RUN, shard, Version(version), 0),
            part=part,
            version=Version(version),
            n=n,
            loss_sum=1.0,
            samples=samples,
            grads={name: grad},
            buffers={},
            node=f"client-{shard}" if part == "client" else "server-0",
            client=f"client-{shard}",
        )
        both.append(replace(one, **body) if part == "body" else one)
    return both


def cid(shard: int, version: int = 0) -> Cid:
    return step_cid(RUN, shard, Version(version), 0)


def test_the_norm_is_that_of_the_whole_step() -> None:
    sifted = Sifting().sift([step(0, 0.99), step(1, 2.0)])
    assert [one.clip for one in sifted.window[:2]] == [1.0, 1.0]
    assert [one.clip for one in sifted.window[2:]] == pytest.approx([0.5, 0.5])
    (clipped,) = sifted.clipped.items()
    assert clipped[0] == cid(1)
    assert (clipped[1].by, clipped[1].norm, clipped[1].client) == (pytest.approx(0.5), pytest.approx(2.0), "client-1")
    assert not sifted.dropped


def test_beyond_the_bound_a_step_can_be_refused_whole() -> None:
    sifting = Sifting(norm_bound=NormBound(1.0, "refuse"))
    sifted = sifting.sift([step(0, 0.99), step(1, 2.0)])
    assert {one.cid for one in sifted.window} == {cid(0)}
    assert sifted.dropped == {cid(1): "refused: its gradient has a norm of 2, and 1 is allowed (client-1)"}
    assert sifted.refused == SAMPLES
    assert not sifted.clipped


NAN = torch.full((2, 2), math.nan)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (step(1, grads={"body.0.weight": NAN}), "its gradient is not finite in body.0.weight"),
        (step(1, grads={"body.0.weight": -torch.inf * torch.ones(2, 2)}), "its gradient is not finite in"),
        (
            step(1, grads={"body.0.bias": torch.full((2,), 1e200, dtype=torch.float64)}),
            "its gradient is longer than any number",
        ),
        (step(1, grads={"body.0.bias": torch.ones(2, dtype=torch.int64)}), "of torch.int64 instead of torch.float"),
        (step(1, grads={"body.0.bias": torch.ones(2, dtype=torch.bool)}), "of torch.bool instead of torch.float"),
        (step(1, buffers={"body.1.running_mean": NAN[0]}), "its buffer body.1.running_mean is not finite"),
        (step(1, grads={"body.9.weight": torch.ones(2, 2)}), "which this model has not"),
        (step(1, grads={"body.0.weight": torch.ones(3, 2)}), r"of shape \[3, 2\] instead of \[2, 2\]"),
        (step(1, loss_sum=math.nan), "has a loss of nan"),
        (step(1, n=2.0), "n=2.0 for 4 samples|weighs n=2 for 4 samples"),
        (step(1, n=1e9), "it weighs n=1e"),
        (step(1, n=1e9, samples=10**9), "it is of 1,000,000,000 samples where 4 were asked for"),
        (step(1, n=3.0), "they are not of one batch|it weighs n=3 for 4 samples"),
        ([replace(step(1)[0], n=9.0, samples=9), step(1)[1]], "they are not of one batch"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(bad: list[Contribution], said: str) -> None:
    for fields in ({"norm_bound": math.inf}, {"norm_bound": None, "average": Median(), "batch_norm": "frozen"}):
        sifted = Sifting(**fields).sift([step(shard) for shard in (0, 2, 3)] + [bad])
        assert {parse_cid(one.cid).shard for one in sifted.window} == {0, 2, 3}
        (why,) = sifted.dropped.values()
        assert why.startswith("refused: ")
        assert why.endswith("(client-1)")
        with pytest.raises(AssertionError, match=said):
            raise AssertionError(why)


def test_whatever_goes_wrong_while_a_step_is_looked_at_is_a_reason_to_refuse_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = _square

    def square(grads: Any) -> float:
        if "body.0.bias" in grads:
            raise OverflowError("int too large to convert to float")
        return real(grads)

    monkeypatch.setattr("zsfl.aggregator.sifting._square", square)
    bad = step(1, grads={"body.0.weight": torch.ones(2, 2), "body.0.bias": torch.ones(2)})
    sifted = Sifting().sift([step(0), bad, step(2)])
    assert {parse_cid(one.cid).shard for one in sifted.window} == {0, 2}
    said = "refused: it leads to an error, OverflowError: int too large to convert to float (client-1)"
    assert sifted.dropped == {cid(1): said}
    assert capfd.readouterr().err.count("Traceback") == 1


def test_a_step_that_weighs_nothing_may_have_no_gradient() -> None:
    def weight(target: Tensor) -> float:
        return 0.0

    nothing = step(0, 0.0, n=0.0)
    wrong = [replace(one, grads={name: torch.ones(2, 2) for name in one.grads}) for one in step(1, 0.0, n=0.0)]
    sifted = Sifting(loss_weight=weight).sift([nothing, wrong])
    assert {one.cid for one in sifted.window} == {cid(0)}
    assert sifted.dropped == {cid(1): "refused: it weighs nothing and has a gradient (client-1)"}


def test_nothing_is_looked_at_where_clients_are_trusted() -> None:
    window = [one for parts in (step(0, 1e9), step(1, grads={"body.0.weight": NAN})) for one in parts]
    sifting = Sifting(norm_bound=None)
    sifted = sifting.sieve.sift(window, {cid(7): "late"}, Version(0), {})
    assert sifted == Sifted(window, {cid(7): "late"}, {})
    assert sifted.window is window


def test_who_is_refused_again_and_again_is_named_once() -> None:
    sifting = Sifting(norm_bound=NormBound(1.0, "refuse"))
    for version in range(3 * OFTEN):
        sifting.sift([step(0, version=version), step(5, 3.0, version=version)], version)
        assert len(sifting.said) == (version + 1 >= OFTEN)
    assert sifting.said[0].startswith(
        "the steps of client-5 (shard 5) are refused again and again, of late because its "
    )


def test_a_vote_of_too_few_counts_for_nothing_and_blames_nobody() -> None:
    sifting = Sifting(norm_bound=None, average=Krum(f=1), batch_norm="frozen")
    for version in range(2 * OFTEN):
        sifted = sifting.sift([step(shard, version=version) for shard in range(4)], version)
        assert not sifted.window
        assert set(sifted.dropped.values()) == {
            "refused: Krum(f=1, m=1) needs the steps of 5 clients, and those of 4 could be used"
        }
        assert sifted.refused == 4 * SAMPLES
    (said,) = sifting.said
    assert said.startswith("nothing counts of a version: ")
    assert len(sifting.sift([step(shard, version=9) for shard in range(5)], 9).window) == 10


def test_late_steps_are_held_against_what_was_asked_for_when_they_began() -> None:
    sifting = Sifting(mode=Elastic(max_staleness=2))
    sifting.sift([step(0)])
    assert not sifting.sift([step(1)], 1).dropped
    assert sifting.sift([step(2, samples=5, n=5.0)], 2).dropped
    assert not sifting.sift([step(3, samples=5, n=5.0)], 3).dropped  # what was asked for so long ago is forgotten


def test_async_steps_are_of_about_as_many_samples_as_are_asked_for() -> None:
    sifting = Sifting(mode=Async())
    assert not sifting.sift([step(0, n=5.0, samples=5), step(1, n=1.0, samples=1)]).dropped
    assert sifting.sift([step(0, n=6.0, samples=6, version=1)], 1).dropped


def test_one_number_whose_square_is_no_number_any_more_is_as_long_as_any() -> None:
    assert _square({"a": torch.tensor([1e200], dtype=torch.float64)}) == math.inf
