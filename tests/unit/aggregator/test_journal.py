"""Large contributions wait on the disk, and come back bit for bit."""

from __future__ import annotations

import gc
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from zsfl.aggregator.spool import SPOOLED_BYTES, Spool
from zsfl.errors import StorageError
from zsfl.ids import RunId, Version, step_cid
from zsfl.learning.averaging import Contribution, average
from zsfl.learning.flat import FlatTensors
from zsfl.spill.layout import SpillMeta, decode, decode_contribution, encode

NUMBERS = SPOOLED_BYTES // 4 + 10
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def stored(shard: int, dtype: torch.dtype = torch.float32, numbers: int = NUMBERS) -> bytes:
    """A spill with gradients of one dtype, and buffers of two."""
    draw = torch.Generator().manual_seed(shard)
    cid = step_cid(RunId("3fa9c1"), shard, Version(2))
    meta = SpillMeta(
        cid=cid, part="body", version=Version(2), n=3.0, samples=3, loss_sum=None, client=f"c{shard}", node="s"
    )
    tensors = {
        "grad/a": torch.randn(numbers, 3, generator=draw).to(dtype),
        "grad/b": torch.randn(5, generator=draw).to(dtype),
        "grad/empty": torch.zeros(0, 4, dtype=dtype),
        "buffer/mean": torch.randn(7, generator=draw),
        "buffer/count": torch.tensor(shard),
    }
    return encode(meta, tensors)


def as_tensors(one: Contribution) -> Contribution:
    return replace(one, grads={name: tensor.clone() for name, tensor in one.grads.items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_in_one_piece_are_those_of_the_spill(tmp_path: Path, dtype: torch.dtype) -> None:
    spool = Spool(tmp_path)
    for shard in range(3):
        data = stored(shard, dtype)
        meta, tensors = decode(data)
        for one in (decode_contribution(data), spool.keep(decode_contribution(data))):
            assert isinstance(one.grads, FlatTensors)
            assert (one.cid, one.n, one.client) == (meta.cid, meta.n, meta.client)
            found = {f"grad/{name}": tensor for name, tensor in one.grads.items()}
            found |= {f"buffer/{name}": tensor for name, tensor in one.buffers.items()}
            assert found.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert found[name].dtype == tensor.dtype
                assert torch.equal(found[name], tensor)
    assert spool.size_bytes > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_average_is_the_same_to_the_last_bit_wherever_contributions_wait(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    spool = Spool(tmp_path)
    window = [replace(decode_contribution(stored(shard, dtype)), damping=0.5 + shard / 10) for shard in range(4)]
    plain = average([as_tensors(one) for one in window])
    for kept in (window, [spool.keep(one) for one in window], [as_tensors(window[0]), *map(spool.keep, window[1:])]):
        found = average(kept)
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


def test_what_is_counted_makes_room(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    size = 0
    for version in range(5):
        window = [spool.keep(decode_contribution(stored(shard + version))) for shard in range(3)]
        if version == 0:
            size = spool.size_bytes
        average(window)
        del window
        gc.collect()
    assert spool.size_bytes == size
    assert size == 3 * 4 * (3 * NUMBERS + 5)


def test_small_contributions_stay_in_memory(tmp_path: Path) -> None:
    one = decode_contribution(stored(1, numbers=100))
    spool = Spool(tmp_path)
    assert spool.keep(one) is one
    assert spool.size_bytes == 0


def test_a_folder_that_is_gone_is_said_so(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    with pytest.raises(StorageError, match="check that the disk has room"):
        Spool(tmp_path).keep(decode_contribution(stored(1)))
