"""Small float64 jobs that can be compared with `helpers.reference`, and how to run them on a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from helpers import reference
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import zsfl

FEATURES, CLASSES = 6, 3
CLASS_WEIGHTS = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.2}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "weight-decay": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}),
    "adam": (torch.optim.Adam, {"lr": 0.02}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What one exactness test trains."""

    optimizer: str = "momentum"
    tail: bool = True
    sizes: tuple[int, ...] = (13, 7, 20, 4)
    """Samples by shard: with batches of 5, last batches are smaller, and some shards have fewer batches."""
    copies: int = 1
    """Each shard's data is given to so many clients."""
    shuffle: bool = True
    frozen_head: bool = False
    weighted: bool = False
    dropout: float = 0.0
    norm: bool = False
    """Batch norm in the body."""
    tested: int = 5
    """Held-out samples by shard."""
    seed: int = 11
    batch_size: int = 5
    rounds: int = 2
    batches: Any = "equal"
    steps: int = 1
    mode: Any = "exact"
    batch_norm: Any = "per-client"
    merge: bool = False
    average: Any = "mean"
    norm_bound: Any = None
    protect: Any = None

    @property
    def clients(self) -> int:
        """How many shards the job has."""
        return len(self.sizes) * self.copies

    def parts(self) -> dict[str, nn.Module]:
        """Head, body and perhaps tail, with weights from torch's generator."""
        head = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(self.dropout))
        # A bias before batch norm has no gradient but rounding errors, which Adam would make steps of.
        layers: list[nn.Module] = [nn.Linear(8, 8, bias=not self.norm), nn.Tanh(), nn.Dropout(self.dropout)]
        if self.norm:
            layers.insert(1, nn.BatchNorm1d(8))
        end = nn.Sequential(nn.Dropout(self.dropout), nn.Linear(8, CLASSES))
        parts: dict[str, nn.Module] = {"head": head, "body": nn.Sequential(*layers)}
        parts |= {"tail": end} if self.tail else {"body": nn.Sequential(*layers, end)}
        head.requires_grad_(not self.frozen_head)
        return {name: part.double() for name, part in parts.items()}

    def model(self) -> zsfl.SplitModel:
        """The parts as zsfl takes them."""
        parts = self.parts()
        return zsfl.SplitModel(parts["head"], parts["body"], parts.get("tail"))

    def samples(self, shard: int) -> tuple[Tensor, Tensor]:
        """The training samples of one client."""
        return _samples(1000 + shard // self.copies, self.sizes[shard // self.copies])

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean over the samples, or the mean weighted by class."""
        return F.cross_entropy(output, target, weight=CLASS_WEIGHTS if self.weighted else None)

    def job(self) -> zsfl.Job:
        """The same thing as zsfl is told it."""
        factory, options = OPTIMIZERS[self.optimizer]
        return zsfl.Job(
            name="exact",
            model=self.model,
            loss=self.loss,
            data=lambda shard, _: (
                TensorDataset(*self.samples(shard)),
                TensorDataset(*_samples(2000 + shard, self.tested)),
            ),
            optimizer=zsfl.optimizer(factory, **options),
            batch_size=self.batch_size,
            batches=self.batches,
            steps=self.steps,
            mode=self.mode,
            batch_norm=self.batch_norm,
            merge=self.merge,
            average=self.average,
            norm_bound=self.norm_bound,
            protect=self.protect,
            rounds=self.rounds,
            shards=self.clients,
            seed=self.seed,
            shuffle=self.shuffle,
            loss_weight=(lambda target: float(CLASS_WEIGHTS[target].sum())) if self.weighted else None,
        )

    def job_file(self, folder: Path) -> Path:
        """A job file for processes of their own."""
        path = folder / "exact.py"
        tests = str(Path(__file__).parents[1])
        path.write_text(
            f"import sys\nsys.path.insert(0, {tests!r})\nfrom helpers.exact import Case\n"
            f"from zsfl import Async, Elastic, Exact, Krum, Median, NormBound, TrimmedMean\n"
            f"from zsfl.learning.privacy import Protection\njob = {self!r}.job()\n"
        )
        return path


def _samples(seed: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (count,), generator=generator)


@dataclass(frozen=True, slots=True)
class Ran:
    """What a run left."""

    folder: Path
    reports: list[zsfl.RoundReport]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The final model."""
        return load_file(self.folder / "model.safetensors")


async def in_process(case: Case, runs: Path, *, rounds: int | None = None, servers: int = 1, **settings: Any) -> Ran:
    """Train `case` with every node in this process."""
    job = case.job()
    return await _train(zsfl.LocalCluster(job, in_process=True, split_servers=servers, runs=runs, **settings), rounds)


async def in_processes(case: Case, runs: Path, *, servers: int = 1, **settings: Any) -> Ran:
    """Train `case` with every node in a process of its own."""
    job = case.job_file(runs)
    return await _train(zsfl.LocalCluster(job, mdns=False, split_servers=servers, runs=runs, **settings), None)


async def _train(cluster: zsfl.LocalCluster, rounds: int | None) -> Ran:
    async with cluster:
        reports = [report async for report in cluster.train(rounds)]
    assert cluster.result is not None
    return Ran(Path(cluster.result.folder), reports)


def ordinary(case: Case) -> dict[str, Tensor]:
    """What training `case` in one process gives."""
    data = [case.samples(shard) for shard in range(case.clients)]
    return reference.train(
        case.parts,
        data,
        case.loss,
        OPTIMIZERS[case.optimizer],
        seed=case.seed,
        rounds=case.rounds,
        batch_size=case.batch_size,
        shuffle=case.shuffle,
        proportional=case.batches == "proportional",
        steps=case.steps,
        frozen_norms=case.batch_norm == "frozen",
    )


def spills_left(runs: Path) -> list[Path]:
    """Spill files that nobody released."""
    return [path for path in runs.rglob("*") if path.is_file() and "spills" in path.parts]


def assert_equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal bit for bit."""
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def assert_close(mine: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Float64, and equal to `tolerance`."""
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype
        off = (tensor - theirs[name]).abs().max().item()
        assert off <= tolerance, f"{name} is off by {off:.3g}"
