"""Robust averages against a reference of their own, in float64 and without zsfl."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from zsfl.aggregator.journal import IN_MEMORY_BYTES, Journal
from zsfl.errors import ConfigError, RunFailed
from zsfl.ids import PartName, RunId, Version, step_cid
from zsfl.learning import robust
from zsfl.learning.averaging import Contribution, average
from zsfl.learning.flat import FlatTensors
from zsfl.learning.robust import Krum, Median, NormBound, Rule, TrimmedMean, combine
from zsfl.spill.layout import SpillMeta, decode_contribution, encode

Votes = NDArray[np.float64]


def step(
    shard: int, grads: Mapping[str, Tensor], n: float = 1.0, *, k: int = 0, part: PartName = "client", late: int = 0
) -> Contribution:
    """One part of a step, `late` versions before version 9."""
    version = Version(9 - late)
    return Contribution(
        cid=step_cid(RunId("abc123"), shard, version, k),
        part=part,
        version=version,
        n=n,
        loss_sum=None,
        samples=max(1, int(n)),
        grads=grads,
        buffers={},
        node=f"client-{shard}",
    )


def by_median(votes: Votes, _f: int) -> Votes:
    return np.median(votes, axis=0)


def by_trimming(votes: Votes, f: int) -> Votes:
    return np.sort(votes, axis=0)[f : len(votes) - f].mean(axis=0)


def by_krum(votes: Votes, f: int, m: int = 1) -> Votes:
    n = len(votes)
    scores: list[float] = []
    for i in range(n):
        others = sorted(float(((votes[i] - votes[j]) ** 2).sum()) for j in range(n) if j != i)
        scores.append(sum(others[: n - f - 2]))
    return votes[np.argsort(scores, kind="stable")[:m]].mean(axis=0)


RULES: dict[str, tuple[Callable[[int], Rule], Callable[[Votes, int], Votes], Callable[[int], int]]] = {
    "median": (lambda f: Median(f=f), by_median, lambda f: 2 * f + 1),
    "trimmed": (lambda f: TrimmedMean(f=f), by_trimming, lambda f: 2 * f + 1),
    "krum": (lambda f: Krum(f=f), by_krum, lambda f: 2 * f + 3),
    "multi-krum": (lambda f: Krum(f=f, m=2), lambda votes, f: by_krum(votes, f, 2), lambda f: 2 * f + 4),
}


def drawn(clients: int, seed: int) -> list[dict[str, Tensor]]:
    """Mean gradients of so many clients, of three tensors."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"head.w": (3, 2), "head.b": (), "tail.w": (5,)}
    return [{n: torch.randn(s, generator=draw, dtype=torch.float64) for n, s in shapes.items()} for _ in range(clients)]


def flat(grads: Mapping[str, Tensor]) -> Votes:
    return torch.cat([grads[name].reshape(-1) for name in sorted(grads)]).double().numpy()


@pytest.mark.parametrize("block", [8, 64, robust.BLOCK_BYTES])
@pytest.mark.parametrize("name", RULES)
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(0, 5), st.integers(0, 10**6))
def test_each_rule_is_what_its_paper_says(name: str, block: int, f: int, more: int, seed: int) -> None:
    rule, reference, least = RULES[name]
    means = drawn(least(f) + more, seed)
    sizes = random.Random(seed).choices(range(1, 40), k=len(means))
    steps = [
        step(shard, {tensor: n * mean for tensor, mean in means[shard].items()}, n) for shard, n in enumerate(sizes)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robust, "BLOCK_BYTES", block)
        result, _ = combine(rule(f), steps)
    assert [result[n].shape for n in means[0]] == [mean.shape for mean in means[0].values()]
    np.testing.assert_allclose(flat(result), reference(np.stack([flat(mean) for mean in means]), f), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(0, 4), st.integers(0, 10**6))
def test_who_is_called_what_changes_no_bit(name: str, f: int, more: int, seed: int) -> None:
    rule, _, least = RULES[name]
    means = drawn(least(f) + more, seed)
    renamed = random.Random(seed).sample(range(len(means)), len(means))
    one, chosen = combine(rule(f), [step(shard, mean) for shard, mean in enumerate(means)])
    other, others = combine(rule(f), [step(renamed[shard], mean) for shard, mean in enumerate(means)])
    assert {renamed[shard] for shard in chosen} == set(others)
    for tensor in one:
        if name == "multi-krum":  # a mean of several, summed in the order of their names
            torch.testing.assert_close(one[tensor], other[tensor], rtol=0, atol=1e-15)
        else:
            assert torch.equal(one[tensor], other[tensor])


POISON = st.floats(allow_nan=False, allow_infinity=False, width=32)


@pytest.mark.parametrize("rule", [Median, TrimmedMean])
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(0, 4), st.data())
def test_wrong_clients_never_lead_out_of_the_range_of_the_honest(
    rule: type[Median | TrimmedMean], f: int, more: int, data: st.DataObject
) -> None:
    n = 2 * f + 1 + more
    honest = torch.tensor(data.draw(st.lists(st.lists(POISON, min_size=3, max_size=3), min_size=n - f, max_size=n - f)))
    wrong = torch.tensor(data.draw(st.lists(st.lists(POISON, min_size=3, max_size=3), min_size=f, max_size=f)))
    names = random.Random(data.draw(st.integers(0, 999))).sample(range(n), n)
    steps = [step(shard, {"w": vote}) for shard, vote in zip(names, [*honest, *wrong], strict=True)]
    result = combine(rule(f=f), steps)[0]["w"]
    assume(bool(torch.isfinite(result).all()))  # a sum of honest ones may overflow, which ends the step
    low, high = honest.min(0).values, honest.max(0).values
    room = 1e-5 * honest.abs().max()  # a rounding error of the mean
    assert bool(((result >= low - room) & (result <= high + room)).all())


def test_krum_takes_no_gradient_that_is_far_from_all_others() -> None:
    means = drawn(7, seed=3)
    near = [{name: 1 + 1e-3 * mean for name, mean in one.items()} for one in means[:5]]
    far = [{name: -100 + mean for name, mean in one.items()} for one in means[5:]]
    result, chosen = combine(Krum(f=2, m=3), [step(shard, mean) for shard, mean in enumerate([*far, *near])])
    assert len(chosen) == 3
    assert set(chosen) <= {2, 3, 4, 5, 6}
    assert all(bool((tensor > 0.9).all()) for tensor in result.values())


def test_all_steps_of_a_client_are_one_vote() -> None:
    """Both parts of several steps, one of them late: the client's own average, damped, is what it votes for."""
    torch.manual_seed(1)
    steps: list[Contribution] = []
    votes: list[dict[str, Tensor]] = []
    for shard in range(5):
        mine: list[Contribution] = []
        for k, late in ((0, 0), (1, 0), (0, 3)):
            n = shard + k + 1.0
            halves: list[tuple[PartName, str]] = [("body", "body.w"), ("client", "head.w")]
            for part, name in halves:
                one = step(shard, {name: torch.randn(4).double()}, n, k=k, part=part, late=late)
                mine.append(replace(one, damping=(1 + late) ** -0.5, clip=0.5 if k else 1.0))
        steps += mine
        votes.append(average(mine))
    result, _ = combine(Median(f=2), steps)
    for name in ("body.w", "head.w"):
        torch.testing.assert_close(result[name], torch.stack([vote[name] for vote in votes]).median(0).values)


def test_a_missing_gradient_is_zero_and_who_weighs_nothing_has_no_vote() -> None:
    steps = [step(shard, {"w": torch.tensor([1.0 + shard])}) for shard in range(2)]
    assert combine(Median(), [*steps, step(2, {})])[0]["w"].item() == 1.0
    with pytest.raises(RunFailed, match=r"Median\(f=1\) needs the steps of 3 clients, and there are those of 2"):
        combine(Median(), [*steps, step(2, {"w": torch.zeros(1)}, n=0.0)])


def test_the_median_of_huge_numbers_does_not_overflow() -> None:
    huge = 3e38
    steps = [step(shard, {"w": torch.tensor([huge])}) for shard in range(4)]
    assert combine(Median(), steps)[0]["w"].item() == pytest.approx(huge)


def test_half_precision_votes_are_counted_in_single() -> None:
    steps = [step(shard, {"w": torch.tensor([256.0 + shard]).bfloat16()}, n=3.0) for shard in range(3)]
    result = combine(TrimmedMean(), steps)[0]["w"]
    assert result.dtype is torch.float32
    assert result.item() == pytest.approx(256.0 / 3)


@pytest.mark.parametrize("rule", [Median(), TrimmedMean(), Krum(), Krum(m=2)])
def test_gradients_on_the_disk_are_read_in_blocks(rule: Rule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as from memory, with no more of them in memory at once than the bound."""
    journal = Journal(tmp_path)
    journal.begin(Version(9))
    torch.manual_seed(2)
    in_memory: list[Contribution] = []
    on_disk: list[Contribution] = []
    for shard in range(6):
        grads = {"head.w": torch.randn(300, 200), "head.b": torch.randn(7)}
        one = step(shard, grads)
        meta = SpillMeta(
            cid=one.cid, part="client", version=one.version, n=1.0, samples=1, loss_sum=None, client="c", node="c"
        )
        data = encode(meta, {f"grad/{name}": tensor for name, tensor in grads.items()})
        in_memory.append(one)
        on_disk.append(journal.keep(decode_contribution(data), data))
    asked: list[int] = []
    piece = robust._piece

    def measured(grads: Mapping[str, Tensor], name: str, start: int, count: int) -> Tensor:
        asked.append(4 * count)
        return piece(grads, name, start, count)

    def whole(self: FlatTensors, name: str) -> Tensor:
        raise AssertionError(f"all of {name} is read at once")

    for grads in (one.grads for one in on_disk):
        monkeypatch.setattr(type(grads), "__getitem__", whole)
    monkeypatch.setattr(robust, "BLOCK_BYTES", 48 << 10)
    monkeypatch.setattr(robust, "_piece", measured)
    assert sum(tensor.nbytes for tensor in in_memory[0].grads.values()) > IN_MEMORY_BYTES
    assert_same(combine(rule, on_disk), combine(rule, in_memory))
    assert 6 * max(asked) <= 48 << 10 or isinstance(rule, Krum)  # of what Krum chose alone, more goes into a block
    journal.close()


def assert_same(mine: tuple[dict[str, Tensor], Sequence[int]], theirs: tuple[dict[str, Tensor], Sequence[int]]) -> None:
    assert mine[1] == theirs[1]
    assert mine[0].keys() == theirs[0].keys()
    assert all(torch.equal(tensor, theirs[0][name]) for name, tensor in mine[0].items())


def test_the_mean_is_the_average_of_samples() -> None:
    steps = [step(shard, mean, n=shard + 1.0) for shard, mean in enumerate(drawn(4, 0))]
    assert_same(combine("mean", steps), (average(steps), ()))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Median(f=0), "f is 0: use a whole number of clients, from 1 up"),
        (lambda: TrimmedMean(f=True), "f is True"),
        (lambda: Krum(f=1, m=0), "m is 0"),
        (lambda: NormBound(0.0), "norm_bound is 0.0: use a norm above 0"),
        (lambda: NormBound(math.nan), "norm_bound is nan"),
        (lambda: NormBound(1.0, "drop"), "beyond is 'drop': use 'clip' or 'refuse'"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_wrong_settings_say_what_to_use(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()
