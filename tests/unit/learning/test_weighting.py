"""Staleness and shares; and that delayed descent converges within the stated bound, whatever the delays are."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from zsfl.ids import RunId, Version, step_cid
from zsfl.learning.averaging import Contribution
from zsfl.learning.master import Master
from zsfl.learning.model import SplitModel
from zsfl.learning.optim import sgd
from zsfl.learning.weighting import Shares, staleness_weight

CURVATURES = (0.2, 0.5, 1.0)


class Quadratic(nn.Module):
    """x, to minimise the sum of curvature * x^2 / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64))


def test_a_fresh_gradient_counts_whole_and_a_late_one_less() -> None:
    assert [staleness_weight(t) for t in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3)]


@st.composite
def delayed(draw: st.DrawFn) -> tuple[int, float, list[list[tuple[int, float]]]]:
    """tau, a share of the largest step that the bound allows, and each version's (delay, scale) of contributions."""
    tau = draw(st.integers(0, 6))
    worst = st.tuples(st.just(tau), st.just(1.0))
    any_ = st.tuples(st.integers(0, tau), st.floats(0.25, 4.0))
    return tau, draw(st.floats(0.05, 0.95)), draw(st.lists(st.lists(any_ | worst, min_size=1, max_size=4), min_size=30))


@settings(max_examples=40, deadline=None)
@given(delayed())
@example((0, 1.0, [[(0, 1.0)]] * 30))
@example((6, 0.95, [[(6, 1.0)]] * 60))
def test_delayed_descent_on_a_quadratic_converges_within_the_bound(
    case: tuple[int, float, list[list[tuple[int, float]]]],
) -> None:
    """In each coordinate, with a = lr * curvature, p_i the share of contribution i in the sum of c n, w_i its damping
    and W = sum p_i w_i: x' = x - a sum p_i w_i x_i, so |x'| <= (1 - a W)|x| + a sum p_i w_i |x - x_i|, as a W <= 1.
    x and x_i are at most tau moves apart. Each of these is at most a M, M the largest |x| of the last 2 tau + 1
    versions, so |x'| <= (1 - a W (1 - a tau)) M <= rho M, as W >= (1 + tau)^-1/2. After 2 tau + 1 versions M itself
    has shrunk by rho.
    """
    tau, step, versions = case
    lr = step / max(1, tau) / max(CURVATURES)
    curvature = torch.tensor(CURVATURES, dtype=torch.float64)
    rho = 1 - lr * min(CURVATURES) * (1 + tau) ** -0.5 * (1 - lr * max(CURVATURES) * tau)
    master = Master(SplitModel(nn.Identity(), Quadratic()), sgd(lr))
    path = [master.state()["body.x"]]
    for version, arrived in enumerate(versions):
        window = []
        for shard, (lag, scale) in enumerate(arrived):
            delay = min(lag, version)
            made_at = Version(version - delay)
            one = Contribution(
                cid=step_cid(RunId("abcdef"), shard, made_at),
                part="body",
                version=made_at,
                n=shard + 1.0,
                loss_sum=None,
                samples=shard + 1,
                grads={"body.x": (shard + 1) * curvature * path[made_at]},
                buffers={},
                node="s",
            )
            window.append(replace(one, scale=scale, damping=staleness_weight(delay)))
        master.step(window, version=version)
        path.append(master.state()["body.x"])
        bound = rho ** ((version + 1) // (2 * tau + 1))
        assert path[-1].abs().max().item() <= bound * (1 + 1e-12)


def counted(shares: Shares, times: int, steps: dict[int, int]) -> None:
    for _ in range(times):
        shares.counted(steps)


def test_everybody_who_contributes_its_share_counts_whole() -> None:
    shares = Shares(4.0)
    shares.there({0: 600, 1: 200}, batch=80)
    for _ in range(50):
        shares.counted({0: 60, 1: 20})
        assert [shares.correction(0), shares.correction(1)] == pytest.approx([1.0, 1.0], abs=1e-12)


def test_a_fast_client_is_weighed_down_to_its_share_and_a_slow_one_up() -> None:
    shares = Shares(4.0)
    shares.there({0: 100, 1: 100, 2: 100}, batch=30)
    counted(shares, 60, {0: 20, 1: 10, 2: 5})
    weighed = [count * shares.correction(shard) for shard, count in enumerate((20, 10, 5))]
    assert weighed == pytest.approx([weighed[0]] * 3, rel=0.01)


def test_no_correction_is_beyond_the_bound() -> None:
    shares = Shares(2.0)
    shares.there({0: 100, 1: 100}, batch=20)
    counted(shares, 100, {0: 20})
    assert (shares.correction(0), shares.correction(1)) == (pytest.approx(0.5, abs=0.01), 2.0)
    assert shares.correction(7) == 1.0
    none = Shares(1.0)
    none.there({0: 100, 1: 100}, batch=20)
    counted(none, 100, {0: 20})
    assert none.correction(0) == none.correction(1) == 1.0


def test_one_that_joins_begins_with_its_share_and_what_is_remembered_survives_a_checkpoint() -> None:
    shares = Shares(4.0)
    shares.there({0: 100, 1: 100}, batch=20)
    counted(shares, 30, {0: 30, 1: 10})
    shares.there({0: 100, 1: 100, 2: 50}, batch=25)
    assert shares.correction(2) == pytest.approx(1.0)
    again = Shares(4.0)
    again.restore(json.loads(json.dumps(shares.state())))
    again.there({0: 100, 1: 100, 2: 50}, batch=25)
    assert [again.correction(shard) for shard in range(3)] == [shares.correction(shard) for shard in range(3)]
    shares.there({1: 100, 2: 50}, batch=15)
    assert shares.correction(0) == 1.0
    shares.there({}, batch=0)
    shares.there({0: 100, 1: 100}, batch=20)
    assert shares.correction(0) == shares.correction(1) == 1.0


def test_half_of_what_was_counted_is_forgotten_after_four_merged_batches() -> None:
    shares = Shares(100.0)
    shares.there({0: 100, 1: 100}, batch=20)
    counted(shares, 4, {0: 20})  # of the 40 + 40 at the start a half is left, and the new ones fade as they age
    new = 20 * sum(0.5 ** (age / 4) for age in range(4))
    assert shares.correction(1) == pytest.approx(0.5 * (20 + 20 + new) / 20, rel=1e-12)
