"""What is stated of the noise, against published values, numeric integration and what it does to samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import zsfl
from zsfl.errors import ConfigError
from zsfl.learning.model import SplitModel
from zsfl.learning.privacy import (
    Protection,
    delta_of,
    epsilon_of,
    gaussian_noise,
    noise_multiplier,
    normal,
    private_activations,
)


def integrated(mu: float, epsilon: float) -> float:
    """The hockey-stick divergence of N(mu, 1) from N(0, 1), which is what delta is, by the midpoint rule."""
    x = np.linspace(-12, 12 + mu, 2_000_001)
    x = (x[:-1] + x[1:]) / 2
    p, q = np.exp(-((x - mu) ** 2) / 2), np.exp(epsilon - x**2 / 2)
    return float(np.maximum(p - q, 0).sum() * (x[1] - x[0]) / math.sqrt(2 * math.pi))


@pytest.mark.parametrize("mu", [0.05, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0, 4.0])
def test_delta_is_the_divergence_that_it_stands_for(mu: float, epsilon: float) -> None:
    assert delta_of(mu, epsilon) == pytest.approx(integrated(mu, epsilon), rel=1e-6, abs=1e-14)


def test_the_noise_is_that_of_the_analytic_gaussian_mechanism() -> None:
    # The value that the authors' own program gives for epsilon = 1, delta = 1e-5.
    assert noise_multiplier(1.0, 1e-5) == pytest.approx(3.730632, abs=1e-5)
    for epsilon in (0.01, 0.3, 0.9):  # below 1, where it holds, the classical bound is larger
        assert noise_multiplier(epsilon, 1e-5) < math.sqrt(2 * math.log(1.25e5)) / epsilon
    # Balle & Wang, section 2.3: as epsilon goes to 0, the noise does not grow without end.
    assert noise_multiplier(1e-9, 0.1) == pytest.approx(1 / (2 * inverse_normal(0.55)), rel=1e-4)


def inverse_normal(p: float) -> float:
    low, high = 0.0, 9.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * math.erfc(-middle / math.sqrt(2)) < p else (low, middle)
    return low


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-3, 50), st.floats(1e-12, 0.4))
def test_noise_and_epsilon_undo_one_another(epsilon: float, delta: float) -> None:
    mu = 1 / noise_multiplier(epsilon, delta)
    assert delta_of(mu, epsilon) <= delta * (1 + 1e-9)
    assert delta_of(mu * 1.0001, epsilon) > delta * (1 - 1e-9)
    assert epsilon_of(mu, delta) == pytest.approx(epsilon, rel=1e-3)


@pytest.mark.parametrize("releases", [1, 10, 300])
@pytest.mark.parametrize("multiplier", [1.0, 5.0, 40.0])
def test_many_releases_cost_no_more_than_zero_concentrated_privacy_says(releases: int, multiplier: float) -> None:
    delta = 1e-6
    rho = releases / (2 * multiplier**2)  # Bun & Steinke 2016, Propositions 1.3 and 1.6 and Lemma 1.7
    zcdp = rho + 2 * math.sqrt(rho * math.log(1 / delta))
    exact = epsilon_of(math.sqrt(releases) / multiplier, delta)
    assert exact <= zcdp
    assert exact >= epsilon_of(1 / multiplier, delta)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_two_releases_tell_what_both_of_them_do(epsilon: float) -> None:
    """The divergence of the pair, integrated in two dimensions, is that of one release of sqrt(2) mu."""
    mu = 0.7
    x = np.linspace(-8, 8 + mu, 3001)
    p, q = np.exp(-((x - mu) ** 2) / 2), np.exp(-(x**2) / 2)
    both = np.maximum(np.outer(p, p) - math.exp(epsilon) * np.outer(q, q), 0)
    delta = float(both.sum() * (x[1] - x[0]) ** 2 / (2 * math.pi))
    assert delta_of(mu * math.sqrt(2), epsilon) == pytest.approx(delta, rel=1e-4)


def test_far_out_nothing_overflows() -> None:
    assert delta_of(1e-3, 5.0) == 0.0
    assert delta_of(200.0, 1.0) == pytest.approx(1.0)
    assert delta_of(1.0, 800.0) == 0.0
    assert epsilon_of(100.0, 1e-5) == pytest.approx(5000, rel=0.15)
    assert epsilon_of(1e-9, 1e-5) == 0.0
    assert delta_of(0.0, 1.0) == 0.0


def silent(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100.0), st.sampled_from([(4,), (2, 3), (2, 1, 5)]))
def test_no_sample_moves_its_release_further_than_is_stated(seed: int, clip: float, shape: tuple[int, ...]) -> None:
    protection = private_activations(clip=clip, epsilon=1.0, delta=1e-5)
    draw = torch.Generator().manual_seed(seed)
    scale = torch.rand(6, *[1] * len(shape), generator=draw, dtype=torch.float64) * 300
    one, other = (torch.randn(6, *shape, generator=draw, dtype=torch.float64) * scale for _ in range(2))
    released, instead = (protection.apply(x, silent).flatten(1) for x in (one, other))
    moved = (released - instead).norm(dim=1) / protection.std
    assert bool((moved <= protection.mu * (1 + 1e-12)).all())
    assert protection.mu == pytest.approx(1 / noise_multiplier(1.0, 1e-5))
    # What is short enough stays as it is, and no sample changes with another.
    short = one.flatten(1).norm(dim=1) <= clip
    assert torch.equal(released[short], one.flatten(1)[short])
    alone = torch.cat([protection.apply(row[None], silent) for row in one])
    torch.testing.assert_close(alone.flatten(1), released, rtol=1e-14, atol=0)


def test_opposite_samples_move_as_far_as_is_stated() -> None:
    protection = private_activations(clip=2.0, epsilon=1.0, delta=1e-5)
    far = protection.apply(torch.tensor([[9.0, 0.0], [-9.0, 0.0]], dtype=torch.float64), silent)
    assert float((far[0] - far[1]).norm()) == pytest.approx(protection.mu * protection.std)


def test_gradients_pass_through_clipping_as_through_any_function_and_zeros_are_no_trouble() -> None:
    protection = private_activations(clip=1.0, epsilon=1.0, delta=1e-5)
    x = torch.tensor([[0.3, 0.4], [3.0, -4.0], [0.5, 2.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given: protection.apply(given, silent), (x,))
    zeros = torch.zeros(2, 3, requires_grad=True)
    protection.apply(zeros, silent).sum().backward()
    assert zeros.grad is not None
    assert torch.equal(zeros.grad, torch.ones(2, 3))


def test_noise_is_normal_of_the_stated_deviation_and_keeps_the_type() -> None:
    protection = gaussian_noise(std=0.25)
    made = protection.apply(torch.zeros(1000, 300), lambda count: normal(b"key", count))
    assert made.dtype is torch.float32
    assert float(made.std()) == pytest.approx(0.25, rel=0.01)
    assert abs(float(made.mean())) < 0.005
    assert protection.apply(torch.zeros(2, 2, dtype=torch.bfloat16), silent).dtype is torch.bfloat16


def test_the_stream_is_normal_and_of_its_key() -> None:
    count = 300_001
    drawn = normal(b"a", count)
    assert torch.equal(drawn, normal(b"a", count))
    assert not torch.equal(drawn[:100], normal(b"b", count)[:100])
    # Kolmogorov-Smirnov, beyond which one in a million would be; the key is fixed, so it comes out the same each time.
    exact = 0.5 * torch.erfc(-drawn.sort().values / math.sqrt(2))
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    assert float((exact - steps).abs().max()) < 2.7 / math.sqrt(count)
    pairs = torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1]
    assert abs(float(pairs)) < 5 / math.sqrt(count)
    blocks = torch.corrcoef(torch.stack([drawn[: 1 << 17], drawn[1 << 17 : 2 << 17]]))[0, 1]
    assert abs(float(blocks)) < 5 / math.sqrt(1 << 17)
    assert [len(normal(b"a", count)) for count in (0, 1, 2, 3)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: gaussian_noise(std=0.0), "std is 0.0: use a number above 0"),
        (lambda: gaussian_noise(std=1.0, clip=-1.0), "clip is -1.0"),
        (lambda: private_activations(clip=math.inf, epsilon=1.0, delta=1e-5), "clip is inf"),
        (lambda: private_activations(clip=1.0, epsilon=0.0, delta=1e-5), "epsilon is 0.0"),
        (lambda: private_activations(clip=1.0, epsilon=1.0, delta=1.0), "delta is 1.0: use a probability"),
        (lambda: gaussian_noise(std=1.0, secret=1), "secret is 1: use True or False"),  # pyright: ignore[reportArgumentType]
        (lambda: job(protect=0.5), r"job 'private': protect is 0.5: use zsfl.private_activations\(\)"),
    ],
)
def test_wrong_settings_say_what_to_use(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


def job(*, trained: bool = True, **fields: Any) -> zsfl.Job:
    def model() -> SplitModel:
        return SplitModel(nn.Linear(4, 3).requires_grad_(trained), nn.Linear(3, 3), nn.Linear(3, 2))

    stated: dict[str, Any] = {"name": "private", "model": model, "loss": F.cross_entropy, "data": print}
    stated["optimizer"] = zsfl.sgd(lr=0.1)
    return zsfl.Job(**(stated | fields))


def said_of(protect: Protection, rounds: int = 20, **fields: Any) -> str:
    stated = job(protect=protect, **fields)
    return protect.statement(stated, stated.build_cuts(), rounds)


def test_a_run_says_what_is_proven_and_what_is_not() -> None:
    protect = private_activations(clip=1.5, epsilon=2.0, delta=1e-6)
    said = said_of(protect)
    assert "clipped to a norm of 1.5" in said
    assert f"deviation {protect.std:.4g}, is (2, 1e-06)-differentially private" in said
    assert f"20 of them, one a round, are ({epsilon_of(protect.mu * math.sqrt(20), 1e-6):.4g}, 1e-06)." in said
    assert said.endswith("Not covered: the gradients of the head, which is trained, labels, held-out samples")
    assert said_of(protect, trained=False).endswith("Not covered: labels, held-out samples")
    quick: list[dict[str, Any]] = [{"mode": "async"}, {"batches": zsfl.by_speed()}]
    for fields in quick:
        assert "fast clients may make more" in said_of(protect, **fields)
    assert "nothing is proven of it" in said_of(gaussian_noise(std=0.5))


def test_noise_that_all_nodes_know_is_warned_of() -> None:
    known = private_activations(clip=1.0, epsilon=1.0, delta=1e-5, secret=False)
    assert (
        said_of(known) == f"noise of standard deviation {known.std:g} that all nodes know is added to the activations"
    )
    (warning,) = job(protect=known).warnings()
    assert "it hides nothing" in warning
    assert not job(protect=gaussian_noise(std=1.0)).warnings()


def test_nodes_must_agree_on_it() -> None:
    plain, noisy = (one.facts(one.build_cuts()) for one in (job(), job(protect=gaussian_noise(std=0.5))))
    assert set(noisy) - set(plain) == {"protect"}
    assert "std=0.5" in noisy["protect"]
