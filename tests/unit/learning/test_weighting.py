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
from zsfl.learning.averaging import Contribution, average
from zsfl.learning.master import Master
from zsfl.learning.model import SplitModel
from zsfl.learning.optim import sgd
from zsfl.learning.weighting import HORIZON, Shares, staleness_weight

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
    """In each coordinate, with a = lr * curvature, D what is divided by, p_i = c_i n_i / D, w_i the damping of
    contribution i and W = sum p_i w_i <= 1: x' = x - a sum p_i w_i x_i, so that
    |x'| <= (1 - a W)|x| + a sum p_i w_i |x - x_i|. x and x_i are at most tau moves apart. Each of these is at most a M,
    M the largest |x| of the last 2 tau + 1 versions, so |x'| <= (1 - a W (1 - a tau)) M <= rho M, as
    W >= (1 + tau)^-1/2 / C: where D is the sum of n since every c is at least 1/C, and elsewhere W is 1. After
    2 tau + 1 versions M itself has shrunk by rho.
    """
    tau, step, versions = case
    lr = step / max(1, tau) / max(CURVATURES)
    curvature = torch.tensor(CURVATURES, dtype=torch.float64)
    most = max(1 / scale for arrived in versions for _, scale in arrived)
    rho = 1 - lr * min(CURVATURES) * (1 + tau) ** -0.5 * (1 - lr * max(CURVATURES) * tau) / max(1, most)
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


def counted(shares: Shares, times: int, steps: dict[int, int], expected: dict[int, int]) -> None:
    for _ in range(times):
        shares.counted(steps, expected)


@pytest.mark.parametrize("sizes", [(60, 20), (14, 15, 16), (13, 7, 20, 10), (1, 0, 3)])
def test_whoever_comes_as_planned_counts_whole_to_the_last_bit(sizes: tuple[int, ...]) -> None:
    shares = Shares(4.0)
    for version in range(50):
        planned = {shard: size + (version + shard) % 2 for shard, size in enumerate(sizes)}
        shares.there({shard: 10 * size + 1 for shard, size in enumerate(sizes)})
        shares.counted(planned, planned)
        assert {shares.correction(shard) for shard in planned} == {1.0}


def moved(fast: int, most: float, every: int = 5) -> list[float]:
    """By how much of the way each client's gradients move the weights in the long run; the last one is slow."""
    shares, everybody, total = Shares(most), dict.fromkeys(range(fast + 1), 10), [0.0] * (fast + 1)
    shares.there(everybody)
    for version in range(40 * every):
        came = [shard for shard in everybody if shard < fast or version % every == 0]
        shares.counted(dict.fromkeys(came, 10), everybody)
        window = [
            Contribution(
                cid=step_cid(RunId("abcdef"), shard, Version(version)), part="body", version=Version(version), n=10.0,
                loss_sum=None, samples=10, grads={str(shard): torch.tensor(10.0, dtype=torch.float64)}, buffers={},
                node="", scale=shares.correction(shard),
            )
            for shard in came
        ]  # fmt: skip
        for shard, gradient in average(window).items():
            total[int(shard)] += gradient.item() * (version >= 20 * every)
    return [one / sum(total) for one in total]


@pytest.mark.parametrize("fast", [1, 3, 19])
def test_a_slow_client_moves_the_weights_more_nearly_by_its_share(fast: int) -> None:
    share = 1 / (fast + 1)
    assert moved(fast, 1.0)[-1] == pytest.approx(share / 5)
    corrected = moved(fast, 10.0)
    assert 0.45 * share < corrected[-1] <= 1.05 * share
    assert corrected[:-1] == pytest.approx([corrected[0]] * fast)


def test_a_fast_client_is_weighed_down_to_its_share() -> None:
    shares, everybody = Shares(4.0), {0: 10, 1: 10, 2: 10}
    shares.there({0: 100, 1: 100, 2: 100})
    counted(shares, 400, {0: 20, 1: 10, 2: 10}, everybody)
    weighed = [count * shares.correction(shard) for shard, count in enumerate((20, 10, 10))]
    assert weighed == pytest.approx([weighed[0]] * 3, rel=0.01)


def test_no_correction_is_beyond_the_bound() -> None:
    shares = Shares(1.5)
    shares.there({0: 100, 1: 100})
    counted(shares, 400, {0: 20}, {0: 10, 1: 10})
    assert (shares.correction(0), shares.correction(1)) == (1 / 1.5, 1.5)
    assert shares.correction(7) == 1.0
    none = Shares(1.0)
    none.there({0: 100, 1: 100})
    counted(none, 100, {0: 20}, {0: 10, 1: 10})
    assert none.correction(0) == none.correction(1) == 1.0


def test_one_that_joins_begins_with_its_share_and_what_is_remembered_survives_a_checkpoint() -> None:
    shares = Shares(4.0)
    shares.there({0: 100, 1: 100})
    counted(shares, 30, {0: 30, 1: 10}, {0: 20, 1: 20})
    shares.there({0: 100, 1: 100, 2: 50})
    assert shares.correction(2) == 1.0
    again = Shares(4.0)
    again.restore(json.loads(json.dumps(shares.state())))
    again.there({0: 100, 1: 100, 2: 50})
    assert [again.correction(shard) for shard in range(3)] == [shares.correction(shard) for shard in range(3)]
    shares.there({1: 100, 2: 50})
    assert shares.correction(0) == 1.0
    shares.there({})
    shares.there({0: 100, 1: 100})
    assert shares.correction(0) == shares.correction(1) == 1.0


def test_half_of_what_was_counted_is_forgotten_after_so_many_versions() -> None:
    shares, times = Shares(1e9), int(HORIZON)
    shares.there({0: 100, 1: 100})
    counted(shares, times, {0: 20}, {0: 10, 1: 10})
    level = 0.5 / (1 - 0.5 ** (1 / HORIZON))  # the sum of a half a version for ever
    assert shares.correction(1) == pytest.approx(level / (0.5 * level), rel=1e-12)
    assert shares.correction(0) == pytest.approx(level / (0.5 * level + 0.5 * 2 * level), rel=1e-12)
