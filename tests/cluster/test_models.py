"""Existing models: cut by name, trained, and loaded again without zsfl."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from helpers.exact import Case, in_process
from helpers.resnet import ResNet18
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import TensorDataset

import zsfl

BATCH, WINDOWS = 4, 2
HELD_OUT = 3
LOADING = """
import sys
assert not any(name.split(".")[0] == "zsfl" for name in sys.modules)
exec(open("load_model.py").read())
assert not any(name.split(".")[0] == "zsfl" for name in sys.modules)
import torch
print(type(model).__name__, sum(p.double().sum().item() for p in model.state_dict().values()))
"""


def pictures(seed: int, count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 32, 32, generator=generator)
    return TensorDataset(x, torch.randint(10, (count,), generator=generator))


def resnet_job() -> zsfl.Job:
    return zsfl.Job(
        name="resnet",
        model=lambda: zsfl.split(ResNet18(), after="layer1", tail="fc"),
        loss=F.cross_entropy,
        data=lambda shard, _: (pictures(shard, BATCH * WINDOWS), pictures(100 + shard, HELD_OUT)),
        optimizer=zsfl.sgd(lr=0.05, momentum=0.9),
        batch_size=BATCH,
        rounds=1,
        shards=2,
    )


async def python(code: str, folder: Path, path: str = "") -> str:
    """What `code` prints in a fresh interpreter in `folder`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        cwd=folder,
        env={"PYTHONPATH": path, "PATH": ""},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


def total(state: dict[str, Tensor]) -> float:
    return sum(tensor.double().sum().item() for tensor in state.values())


async def test_a_resnet_cut_by_name_loads_into_the_original_class(tmp_path: Path) -> None:
    async with zsfl.LocalCluster(resnet_job(), in_process=True, split_servers=2, runs=tmp_path) as cluster:
        [report] = [report async for report in cluster.train()]
    assert cluster.result is not None
    assert (report.version, report.steps) == (WINDOWS, 2 * WINDOWS)
    assert report.loss is not None

    state = load_file(Path(cluster.result.folder) / "model.safetensors")
    model = ResNet18()
    model.load_state_dict(state, strict=True)
    # The weights are those that the clients tested at the end.
    model.eval()
    held_out = [pictures(100 + shard, HELD_OUT).tensors for shard in range(2)]
    x, y = (torch.cat(column) for column in zip(*held_out, strict=True))
    with torch.no_grad():
        assert abs(F.cross_entropy(model(x), y).item() - report.loss) < 1e-5
    # Batch norm of head and body has seen every window, and every part has learned.
    torch.manual_seed(resnet_job().seed)
    before = ResNet18().state_dict()
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            assert int(tensor) == WINDOWS
        else:
            assert not torch.equal(tensor, before[name]), name


async def test_the_lines_a_run_leaves_load_a_resnet(tmp_path: Path) -> None:
    async with zsfl.LocalCluster(resnet_job(), in_process=True, split_servers=1, runs=tmp_path) as cluster:
        _ = [report async for report in cluster.train()]
    assert cluster.result is not None
    folder = Path(cluster.result.folder)
    name, total_there = (await python(LOADING, folder, path=str(Path(__file__).parents[1]))).split()
    assert name == "ResNet18"
    assert abs(float(total_there) - total(load_file(folder / "model.safetensors"))) < 1e-9


async def test_the_lines_a_run_leaves_load_a_model_made_of_parts(tmp_path: Path) -> None:
    ran = await in_process(Case(rounds=1), tmp_path)
    name, total_there = (await python(LOADING, ran.folder)).split()
    assert name == "Sequential"
    assert abs(float(total_there) - total(ran.weights)) < 1e-12
