"""Jobs whose tensors travel packed: they learn, repeat themselves where they promise it, and say where they do not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import safetensors.torch
import torch

import zsfl

DIGITS = Path(zsfl.__file__).with_name("demo.py")
COARSE = "int4, gradient=rank6, spill=rand2"


def job_with(folder: Path, codec: str, **changes: object) -> Path:
    path = folder / "packed.py"
    fields = {"codec": codec, "name": "packed", **changes}
    path.write_text(
        f"import dataclasses, zsfl\nfrom zsfl.demo import job\njob = dataclasses.replace(job, **{fields!r})\n"
    )
    return path


async def train(folder: Path, codec: str, rounds: int = 3, **changes: object) -> tuple[list[zsfl.RoundReport], Path]:
    folder.mkdir()
    job = job_with(folder, codec, **changes)
    async with zsfl.LocalCluster(job, clients=3, split_servers=2, in_process=True, runs=folder) as cluster:
        reports = [report async for report in cluster.train(rounds)]
    assert cluster.result is not None
    return reports, Path(cluster.result.folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[zsfl.RoundReport], Path]:
    """The run in which nothing is packed."""
    return asyncio.run(train(tmp_path_factory.mktemp("runs") / "raw", "raw"))


@pytest.mark.parametrize(
    "codec", ["auto", "auto-lossless", "int8, spill=int8", COARSE, "int4, gradient=int8, spill=rand2+feedback"]
)
async def test_a_job_learns_whatever_its_tensors_travel_as(
    codec: str, raw: tuple[list[zsfl.RoundReport], Path], tmp_path: Path
) -> None:
    (plain, folder), (packed, other) = raw, await train(tmp_path / "packed", codec)
    assert (packed[-1].accuracy or 0) > (plain[-1].accuracy or 0) - 0.05
    assert [report.samples for report in packed] == [report.samples for report in plain]
    if not codec.startswith("auto"):
        assert sum(report.bytes_sent for report in packed) < sum(report.bytes_sent for report in plain)
    if codec == "auto-lossless":
        assert all(torch.equal(weights(folder)[name], tensor) for name, tensor in weights(other).items())


async def test_a_fixed_lossy_codec_gives_the_same_weights_each_time(
    raw: tuple[list[zsfl.RoundReport], Path], tmp_path: Path
) -> None:
    runs = [await train(tmp_path / str(number), COARSE) for number in range(2)]
    first, second = (weights(folder) for _, folder in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    plain = weights(raw[1])
    assert any(not torch.equal(plain[name], first[name]) for name in plain)


async def test_label_sharing_packs_activations_and_never_labels(tmp_path: Path) -> None:
    path = tmp_path / "sharing.py"
    path.write_text(
        "import dataclasses, torch.nn as nn, zsfl\nfrom zsfl.demo import job as digits\n"
        "def model():\n"
        "    return zsfl.SplitModel(head=nn.Linear(64, 32), body=nn.Sequential(nn.ReLU(), nn.Linear(32, 10)))\n"
        "job = dataclasses.replace(digits, name='sharing', model=model, codec='int4, gradient=rank6, spill=rand2')\n"
    )
    async with zsfl.LocalCluster(path, clients=2, split_servers=1, in_process=True, runs=tmp_path) as cluster:
        reports = [report async for report in cluster.train(3)]
    assert (reports[-1].accuracy or 0) > 0.7


def test_what_is_not_reproducible_is_said(tmp_path: Path) -> None:
    def warnings(codec: str, mode: str = "exact") -> list[str]:
        return zsfl.load_job(job_with(tmp_path, codec, mode=mode)).warnings()

    for codec in ("auto", "auto-half", "int8, spill=fp16+feedback"):
        (said,) = warnings(codec)
        assert f"codec={codec!r} loses what measured speeds, or the choice of servers, say" in said
        assert not warnings(codec, "elastic")
    for codec in ("raw", "auto-lossless", "int8, spill=int8", COARSE):
        assert not warnings(codec)
