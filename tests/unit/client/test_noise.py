"""Noise of a client's own key: the same for a step that is made again, another for everything else."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zsfl
from zsfl.client.local import LocalParts, step_seed
from zsfl.client.noise import KEY_BYTES, Noise, noise_key
from zsfl.errors import ConfigError, StorageError
from zsfl.ids import Cid, RunId, Version, step_cid
from zsfl.learning.privacy import gaussian_noise, normal, private_activations

CPU = torch.device("cpu")
SECRET = gaussian_noise(std=0.5)
KNOWN = gaussian_noise(std=0.5, secret=False)


def cid(shard: int = 0, version: int = 0, k: int = 0, run: str = "abc123") -> Cid:
    return step_cid(RunId(run), shard, Version(version), k)


def added(protection: Any, key: bytes, step: Cid, x: Tensor, seed: int = 1) -> Tensor:
    return Noise(protection, key).on(x, step, seed, len(x)) - x


X = torch.arange(12, dtype=torch.float64).view(4, 3)


def test_a_step_that_is_made_again_gets_the_same_noise_and_no_other_does() -> None:
    first = added(SECRET, b"k" * 32, cid(), X)
    assert torch.equal(added(SECRET, b"k" * 32, cid(), X.clone()), first)
    others = [
        added(SECRET, b"l" * 32, cid(), X),
        added(SECRET, b"k" * 32, cid(), X, seed=2),
        added(SECRET, b"k" * 32, cid(run="abc124"), X),
        added(SECRET, b"k" * 32, cid(), X + 1e-9),  # made at other weights: the difference would tell of the sample
    ]
    assert all(float((first - other).abs().min()) > 1e-6 for other in others)


@pytest.mark.parametrize("mode", ["exact", "elastic", "async"])
def test_seeds_are_those_of_the_batch_whatever_its_step_is_called(mode: Any) -> None:
    """A window that is asked for anew has the same batches under other names; in async mode they are others."""
    steps = 1 if mode == "async" else 2
    stated = job(nn.Linear(3, 3), mode=mode, steps=steps)
    seeds = [step_seed(stated, cid(k=k)) for k in range(4)]
    assert len(set(seeds)) == (4 if mode == "async" else 2)
    assert mode == "async" or seeds[:2] == seeds[2:]
    assert len({step_seed(stated, one) for one in (cid(), cid(shard=1), cid(version=1))}) == 3


def test_without_a_secret_it_follows_the_seed_in_every_run() -> None:
    first = added(KNOWN, b"", cid(), X)
    assert torch.equal(added(KNOWN, b"k" * 32, cid(run="abc124"), X), first)
    torch.testing.assert_close(first, 0.5 * normal(b"1", 12).view(4, 3), rtol=0, atol=1e-14)
    assert float((added(KNOWN, b"", cid(), X, seed=2) - first).abs().min()) > 1e-6


def test_a_key_is_made_once_and_nobody_else_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "noise" / "client-0.key"
    found: list[bytes] = []
    makers = [threading.Thread(target=lambda: found.append(noise_key(path))) for _ in range(8)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len(set(found)) == 1
    assert len(found) == 8
    assert len(found[0]) == KEY_BYTES
    assert noise_key(path) == found[0] != noise_key(tmp_path / "other.key")
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in path.parent.iterdir()] == ["client-0.key"]


def test_a_key_that_is_none_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "short.key").write_bytes(b"short")
    with pytest.raises(ConfigError, match=r"others may read .*short\.key, and so take the noise off again"):
        noise_key(tmp_path / "short.key")
    (tmp_path / "short.key").chmod(0o600)
    with pytest.raises(StorageError, match=r"short.key is no key: 5 bytes instead of 32; remove it"):
        noise_key(tmp_path / "short.key")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot keep the key of the noise"):
        noise_key(tmp_path / "file" / "client-0.key")


@pytest.mark.parametrize("x", [torch.zeros(4, 3, dtype=torch.int64), torch.zeros(2, 6)])
def test_what_has_no_row_of_numbers_for_each_sample_cannot_be_protected(x: Tensor) -> None:
    with pytest.raises(ConfigError, match="it must give one row of floating point numbers for each"):
        Noise(SECRET, b"k" * 32).on(x, cid(), 1, 4)


def job(head: nn.Module, **fields: Any) -> zsfl.Job:
    stated: dict[str, Any] = {"name": "noisy", "loss": F.cross_entropy, "data": print, "optimizer": zsfl.sgd(lr=0.1)}
    stated["model"] = lambda: zsfl.SplitModel(head, nn.Linear(3, 3), nn.Linear(3, 2))
    return zsfl.Job(**(stated | fields))


def test_training_is_protected_and_evaluation_is_not() -> None:
    protection = private_activations(clip=0.7, epsilon=5.0, delta=1e-3, secret=False)
    protected = job(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).double(), protect=protection)
    model = protected.build()
    local = LocalParts(protected, model, CPU, None, Noise(protection, b""))
    plain = LocalParts(job(model.head), model, CPU)
    weights, y = local.load(model.state_dict()), torch.tensor([0, 1, 1, 0])
    assert torch.equal(local.head_infer(weights, X), plain.head_infer(weights, X))
    noisy, quiet = (parts.begin(weights, cid(), Version(0), X, y) for parts in (local, plain))
    clipped = quiet.activations * (0.7 / quiet.activations.norm(dim=1, keepdim=True).clamp_min(0.7))
    wanted = clipped + protection.std * normal(b"%d" % step_seed(protected, cid()), 12).view(4, 3)
    torch.testing.assert_close(noisy.activations, wanted, rtol=0, atol=1e-13)  # under the same dropout
    again = local.begin(weights, cid(), Version(0), X, y)
    assert torch.equal(again.activations, noisy.activations)


def test_what_is_stated_of_each_sample_does_not_go_with_a_head_that_couples_them() -> None:
    head = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    private = private_activations(clip=1.0, epsilon=1.0, delta=1e-5)
    with pytest.raises(ConfigError, match="batch norm in the head tells of the others of its batch"):
        LocalParts(coupled := job(head, protect=private), coupled.build(), CPU)
    LocalParts(frozen := job(head, protect=private, batch_norm="frozen"), frozen.build(), CPU)
    LocalParts(noisy := job(head, protect=SECRET), noisy.build(), CPU)  # of which nothing is stated


class _Mean(nn.Module):
    """Keeps a running mean of what it sees."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64), persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x


class _Centred(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


def begin(head: nn.Module, protection: zsfl.Protection, x: torch.Tensor = X) -> None:
    made = job(head.requires_grad_(False), protect=protection)
    model = made.build()
    local = LocalParts(made, model, CPU, None, Noise(protection, b"k" * 32))
    weights, y = local.load(model.state_dict()), torch.zeros(len(x), dtype=torch.long)
    for k in range(2):
        local.begin(weights, cid(k=k), Version(0), x.clone(), y)


def test_what_a_pass_writes_down_of_its_samples_is_not_sent_beside_private_activations() -> None:
    private = private_activations(clip=1.0, epsilon=1.0, delta=1e-5)
    for head, name in (
        (nn.Sequential(_Mean(persistent=True), nn.Linear(3, 3).double()), r"head\.0\.mean"),
        (
            nn.Sequential(
                nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1, track_running_stats=True).double(), nn.Flatten()
            ),
            r"head\.1\.running_mean",
        ),
    ):
        for x in (X, X[:1]):
            with pytest.raises(ConfigError, match=f"a training pass writes to {name}, which is sent without noise"):
                begin(head, private, x)
        begin(head, SECRET)  # of which nothing is stated
    begin(nn.Sequential(_Mean(persistent=False), nn.Linear(3, 3).double()), private)


def test_a_head_of_private_activations_takes_each_sample_by_itself() -> None:
    private = private_activations(clip=1.0, epsilon=1.0, delta=1e-5)
    with pytest.raises(ConfigError, match="depends on the others of its batch: use layers there"):
        begin(nn.Sequential(nn.Linear(3, 3).double(), _Centred()), private)
    begin(nn.Sequential(nn.Linear(3, 3).double(), nn.LayerNorm(3).double(), nn.Dropout(0.5)), private)
    begin(nn.Sequential(nn.Linear(3, 3).double(), _Centred()), SECRET)


class _Branch(nn.Module):
    """What joins the samples of a batch, but only as far as a weight says."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight], dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight * x.sum(0, keepdim=True)


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_weights_hide_nothing_of_what_joins_samples(weight: float) -> None:
    with pytest.raises(ConfigError, match="depends on the others of its batch"):
        begin(_Branch(weight), private_activations(clip=1.0, epsilon=1.0, delta=1e-5))


def test_weights_that_make_nan_of_one_sample_and_not_of_another_tell_nothing_of_them() -> None:
    private = private_activations(clip=1.0, epsilon=1.0, delta=1e-5)
    spoiled = X.clone()
    spoiled[0, 1], spoiled[2, 0] = float("inf"), float("nan")
    zeroed = spoiled.nan_to_num(0, 0, 0)
    zeroed[0], zeroed[2] = 0, 0
    noise = Noise(private, b"k" * 32)
    released = noise.on(spoiled, cid(), 1, 4)
    assert bool(released.isfinite().all())
    assert float((released - private.apply(zeroed, torch.zeros)).abs().max()) < 20 * private.std
    x = spoiled.clone().requires_grad_()
    noise.on(x, cid(), 1, 4).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
