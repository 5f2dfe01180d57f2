"""Class counts, logit adjustment against training on the other distribution, and batch sizes against their optimum."""

from __future__ import annotations

import time
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from zsfl.errors import ConfigError
from zsfl.learning import skew
from zsfl.learning.batches import Batches
from zsfl.learning.skew import class_counts, logit_shift, regulate, shifted_loss

# --- class counts -------------------------------------------------------------------------------------------


class Plain(Dataset[tuple[Tensor, int]]):
    """A dataset that hands out samples one by one and shows its labels to nobody."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(2), self.labels[index]


def of(*labels: object, dtype: torch.dtype = torch.int64) -> Batches:
    y = torch.tensor(labels, dtype=dtype)
    return Batches(TensorDataset(torch.zeros(len(y), 1), y))


def test_classes_are_counted_up_to_the_highest_there_is() -> None:
    assert class_counts(of(4, 0, 4, 1)) == (1, 1, 0, 0, 2)
    assert class_counts(of(2, 0, dtype=torch.uint8)) == (1, 0, 1)
    whole = TensorDataset(torch.zeros(5, 1), torch.tensor([0, 1, 2, 1, 1]))
    assert class_counts(Batches(Subset(whole, [1, 3, 4]))) == (0, 3)


def test_any_dataset_is_counted_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skew, "CHUNK", 3)
    labels = [0, 1, 0, 5, 5, 0, 2, 2]
    assert class_counts(Batches(Plain(labels))) == class_counts(of(*labels)) == (3, 1, 2, 0, 0, 2)


def test_every_target_of_a_sample_counts_but_those_that_losses_ignore() -> None:
    assert class_counts(of([[0, 1], [1, 1]], [[2, 2], [-100, 0]])) == (2, 3, 2)
    assert class_counts(of(-100, -100)) == ()


@pytest.mark.parametrize(
    ("labels", "dtype"), [((0.5, 1.0), torch.float32), ((True, False), torch.bool), ((-1, 1), torch.int64)]
)
def test_targets_that_are_no_classes_are_refused(labels: tuple[object, ...], dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match="not class indices from 0 up"):
        class_counts(of(*labels, dtype=dtype))


def test_more_classes_than_may_be_told_are_refused() -> None:
    assert len(class_counts(of(skew.MAX_CLASSES - 1))) == skew.MAX_CLASSES
    with pytest.raises(ConfigError, match="at most 1024"):
        class_counts(of(skew.MAX_CLASSES))


# --- logit adjustment ---------------------------------------------------------------------------------------

counts = st.lists(st.integers(0, 500), min_size=1, max_size=12)


@given(counts, st.integers(1, 50))
def test_equal_shares_shift_nothing(everybody: list[int], times: int) -> None:
    assert torch.equal(logit_shift(everybody, everybody), torch.zeros(len(everybody), dtype=torch.float64))
    torch.testing.assert_close(
        logit_shift(everybody, [times * count for count in everybody]),
        torch.zeros(len(everybody), dtype=torch.float64),
        rtol=0,
        atol=1e-12,
    )


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), min_size=1, max_size=12))
def test_a_shift_is_finite_and_turns_the_shares_of_all_into_those_present(pairs: list[tuple[int, int]]) -> None:
    present = [here for here, _ in pairs]
    everybody = [here + there for here, there in pairs]
    shift = logit_shift(present, everybody)
    assert torch.isfinite(shift).all()
    assert all(shift[c] == 0 for c, count in enumerate(everybody) if not count)
    if sum(present):
        q = torch.tensor(everybody, dtype=torch.float64) / sum(everybody)
        added = skew.SMOOTHING * int((q > 0).sum())
        expected = (torch.tensor(present, dtype=torch.float64) + added * q) / (sum(present) + added)
        torch.testing.assert_close(q * shift.exp(), expected)


def test_a_client_that_lacks_the_last_classes_tells_a_shorter_list() -> None:
    assert torch.equal(logit_shift((3, 1), (6, 6, 6)), logit_shift((3, 1, 0), (6, 6, 6)))


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 2, 2)])
def test_with_everybody_there_not_a_bit_changes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    target = torch.randint(0, 3, shape[:1] + shape[2:])
    given = torch.randn(shape)
    gradients = []
    for loss in (F.cross_entropy, shifted_loss(F.cross_entropy, logit_shift((7, 1, 4), (7, 1, 4)))):
        logits = given.clone().requires_grad_()
        value = loss(logits, target)
        value.backward()
        gradients.append((value.detach(), logits.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert gradients[0][1] is not None
    assert gradients[1][1] is not None
    assert torch.equal(gradients[0][1], gradients[1][1])


def test_a_shift_is_added_along_the_classes_and_needs_as_many_logits() -> None:
    logits, target = torch.randn(2, 3, 4), torch.randint(0, 2, (2, 4))
    shifted = shifted_loss(F.cross_entropy, torch.tensor([1.0, -2.0]))(logits, target)
    torch.testing.assert_close(shifted, F.cross_entropy(logits + torch.tensor([1.0, -2.0, 0.0])[:, None], target))
    with pytest.raises(ConfigError, match=r"the data has 2 classes: adjust_logits needs logits \[B, C"):
        shifted_loss(F.cross_entropy, torch.zeros(2))(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64))


MEANS = torch.tensor([-1.5, 0.0, 2.0], dtype=torch.float64)


def fitted(class_shares: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes and biases, of mean 0, of softmax regression on unit Gaussians around MEANS, over their whole density.

    The posterior of such data is linear: slopes MEANS, biases log share - mean^2 / 2.
    """
    grid = torch.linspace(-7, 8, 601, dtype=torch.float64)
    density = class_shares * torch.softmax(-((grid[:, None] - MEANS) ** 2) / 2, dim=0)
    slopes, biases = (torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.LBFGS(
        [slopes, biases],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    loss = shifted_loss(lambda logits, weights: -(weights * logits.log_softmax(1)).sum(), shift)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(grid[:, None] * slopes + biases, density)
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return (slopes - slopes.mean()).detach(), (biases - biases.mean()).detach()


def test_trained_on_a_skewed_mix_with_the_shift_a_network_learns_the_posterior_of_all_data() -> None:
    present, everybody = (900_000, 90_000, 10_000), (1_000_000, 1_500_000, 2_500_000)
    p, q = (torch.tensor(mix, dtype=torch.float64) / sum(mix) for mix in (present, everybody))
    adjusted = fitted(p, logit_shift(present, everybody))
    trained_on_all = fitted(q, torch.zeros(3))
    unadjusted = fitted(p, torch.zeros(3))
    posterior = q.log() - MEANS**2 / 2
    for found in (adjusted, trained_on_all):
        torch.testing.assert_close(found[0], MEANS - MEANS.mean(), rtol=0, atol=1e-3)
        torch.testing.assert_close(found[1], posterior - posterior.mean(), rtol=0, atol=1e-3)
    assert (unadjusted[1] - trained_on_all[1]).abs().max() > 2
    x = torch.linspace(-4, 4, 401, dtype=torch.float64)[:, None]
    decided = [(x * slopes + biases).argmax(1) for slopes, biases in (adjusted, trained_on_all, unadjusted)]
    assert torch.equal(decided[0], decided[1])
    assert (decided[2] != decided[1]).double().mean() > 0.1


# --- batch sizes --------------------------------------------------------------------------------------------


def chi2(sizes: list[int], mixes: list[list[int]]) -> float:
    """How far the mix of the merged batch is from that of all data."""
    table = np.array(mixes, dtype=float)
    q = table.sum(0) / table.sum()
    merged = np.array(sizes) @ (table / table.sum(1, keepdims=True)) / sum(sizes)
    return float((np.square(merged - q)[q > 0] / q[q > 0]).sum())


def objective(sizes: np.ndarray, speeds: list[float], mixes: list[list[int]], total: int, mix: float) -> float:
    """What `regulate` minimises, as its docstring states it."""
    ideal = np.array(speeds) / sum(speeds)
    return float((np.square(sizes / total - ideal) / ideal).sum()) + mix * chi2(sizes.tolist(), mixes)


some_speeds = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12)


@st.composite
def clients(draw: st.DrawFn, classes: int = 4) -> tuple[list[float], list[list[int]]]:
    speeds = draw(st.lists(st.floats(1.0, 20.0), min_size=2, max_size=10))
    row = st.lists(st.integers(0, 60), min_size=classes, max_size=classes).filter(any)
    return speeds, [draw(row) for _ in speeds]


@settings(max_examples=200)
@given(
    st.lists(st.floats(0, allow_nan=False, allow_infinity=False), min_size=1, max_size=8).filter(any),
    st.data(),
    st.integers(0, 3000),
    st.integers(1, 40),
    st.integers(0, 300),
    st.sampled_from([0.0, 0.3, 1.0, 50.0, 1e6, 1e12]),
)
def test_bounds_and_sum_hold_whatever_is_given(
    speeds: list[float], data: st.DataObject, total: int, least: int, width: int, mix: float
) -> None:
    mixes = [data.draw(st.lists(st.integers(0, 100), max_size=5)) for _ in speeds]
    sizes = regulate(speeds, mixes, total, least, least + width, mix)
    assert len(sizes) == len(speeds)
    assert all(least <= size <= least + width for size in sizes)
    assert sum(sizes) == min(max(total, len(speeds) * least), len(speeds) * (least + width))


@given(some_speeds, st.integers(0, 2000), st.sampled_from([0.0, 1.0, 1e4]))
def test_with_equal_mixes_sizes_are_proportional_to_speed_within_the_bounds(
    speeds: list[float], total: int, mix: float
) -> None:
    sizes = regulate(speeds, [[3, 5]] * len(speeds), total, 4, 200, mix)
    total = min(max(total, 4 * len(speeds)), 200 * len(speeds))

    def clipped(scale: float) -> np.ndarray:
        return np.clip(scale * np.array(speeds), 4, 200)

    low, high = 0.0, 200 / min(speeds)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if clipped(middle).sum() < total else (low, middle)
    assert np.abs(np.array(sizes) - clipped(high)).max() < 1 + 1e-6


@given(some_speeds, st.integers(0, 2000))
def test_who_is_faster_never_gets_less(speeds: list[float], total: int) -> None:
    sizes = regulate(speeds, [()] * len(speeds), total, 4, 200, 1.0)
    for one, size in zip(speeds, sizes, strict=True):
        assert all(size <= other_size for other, other_size in zip(speeds, sizes, strict=True) if other > one)


@given(clients(), st.randoms(use_true_random=False))
def test_the_order_of_the_clients_does_not_matter(
    given_clients: tuple[list[float], list[list[int]]], random: Random
) -> None:
    speeds, mixes = given_clients
    order = list(range(len(speeds)))
    random.shuffle(order)
    sizes = regulate(speeds, mixes, 40 * len(speeds), 4, 300, 2.0)
    shuffled = regulate([speeds[i] for i in order], [mixes[i] for i in order], 40 * len(speeds), 4, 300, 2.0)
    # Equal remainders are rounded up in the order of the clients.
    assert all(abs(sizes[i] - size) <= 1 for i, size in zip(order, shuffled, strict=True))


@settings(max_examples=60)
@given(clients(), st.sampled_from([0.5, 5.0, 500.0]))
def test_the_more_the_mix_counts_the_nearer_it_is(
    given_clients: tuple[list[float], list[list[int]]], mix: float
) -> None:
    speeds, mixes = given_clients
    total = 5000 * len(speeds)  # large, so that rounding does not show
    free, some, more = (regulate(speeds, mixes, total, 8, total, weight) for weight in (0.0, mix, 4 * mix))
    rounding = 1e-2 / np.sqrt(total)
    assert np.sqrt(chi2(more, mixes)) <= np.sqrt(chi2(some, mixes)) + rounding
    assert np.sqrt(chi2(some, mixes)) <= np.sqrt(chi2(free, mixes)) + rounding


@settings(max_examples=60)
@given(clients(), st.sampled_from([0.1, 1.0, 30.0]), st.integers(0, 2**31))
def test_no_exchange_between_two_clients_improves_the_sizes(
    given_clients: tuple[list[float], list[list[int]]], mix: float, seed: int
) -> None:
    speeds, mixes = given_clients
    total, most = 2000 * len(speeds), 4000
    sizes = np.array(regulate(speeds, mixes, total, 100, most, mix), dtype=float)
    best = objective(sizes, speeds, mixes, total, mix)
    slack = 1e-5 * (1 + best)  # of rounding to whole samples
    draw = np.random.default_rng(seed)
    for _ in range(30):
        moved = sizes.copy()
        giver, taker = draw.choice(len(speeds), 2, replace=False)
        moved[[giver, taker]] += np.array([-1, 1]) * draw.integers(1, 400)
        if moved.min() >= 100 and moved.max() <= most:
            assert objective(moved, speeds, mixes, total, mix) >= best - slack


def test_a_mix_of_all_data_that_is_not_there_is_approached_too() -> None:
    speeds, mixes, everybody = [1.0, 1.0], [[10, 0], [0, 10]], [30, 10]
    assert regulate(speeds, mixes, 128, 8, 128, 1e6) == [64, 64]
    assert regulate(speeds, mixes, 128, 8, 128, 1e6, everybody) == [96, 32]
    assert regulate(speeds, mixes, 128, 8, 80, 1e6, everybody) == [80, 48]


def test_a_client_that_told_no_classes_follows_its_speed_alone() -> None:
    sizes = regulate([1.0, 1.0, 2.0], [[9, 1], [1, 9], []], 400, 8, 400, 1e3)
    assert sizes == [100, 100, 200]


def test_a_thousand_clients_are_regulated_in_no_time() -> None:
    draw = np.random.default_rng(0)
    speeds = draw.lognormal(0, 1, 1000).tolist()
    mixes = (draw.dirichlet(np.full(100, 0.1), 1000) * 600).astype(int).tolist()
    before = time.process_time()
    sizes = regulate(speeds, mixes, 64_000, 8, 512, 10.0)
    assert time.process_time() - before < 2  # far more than the 50 ms it takes on a core of its own
    assert sum(sizes) == 64_000
