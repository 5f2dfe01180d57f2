"""What came is on the disk, large contributions only there, and comes back bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from zsfl.aggregator.journal import IN_MEMORY_BYTES, Journal
from zsfl.errors import SpillCorrupt, StorageError
from zsfl.ids import RunId, Version, parse_cid, step_cid
from zsfl.learning.averaging import Contribution, average
from zsfl.learning.flat import FlatTensors
from zsfl.spill.layout import SpillMeta, decode, decode_contribution, encode

NUMBERS = IN_MEMORY_BYTES // 4 + 10
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


def journal_at(folder: Path, version: int = 2) -> Journal:
    journal = Journal(folder / "journal")
    journal.begin(Version(version))
    return journal


def kept(journal: Journal, data: bytes) -> Contribution:
    return journal.keep(decode_contribution(data), data)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_on_the_disk_are_those_of_the_spill(tmp_path: Path, dtype: torch.dtype) -> None:
    journal = journal_at(tmp_path)
    for shard in range(3):
        data = stored(shard, dtype)
        meta, tensors = decode(data)
        for one in (decode_contribution(data), kept(journal, data), journal.kept().read((meta.cid, "body"))):
            assert isinstance(one.grads, FlatTensors)
            assert (one.cid, one.n, one.client) == (meta.cid, meta.n, meta.client)
            found = {f"grad/{name}": tensor for name, tensor in one.grads.items()}
            found |= {f"buffer/{name}": tensor for name, tensor in one.buffers.items()}
            assert found.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert found[name].dtype == tensor.dtype
                assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_average_is_the_same_to_the_last_bit_wherever_contributions_wait(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    journal = journal_at(tmp_path)
    datas = [stored(shard, dtype) for shard in range(4)]

    def window(contributions: list[Contribution]) -> list[Contribution]:
        return [replace(one, damping=0.5 + shard / 10) for shard, one in enumerate(contributions)]

    in_memory = window([decode_contribution(data) for data in datas])
    on_disk = window([kept(journal, data) for data in datas])
    plain = average([as_tensors(one) for one in in_memory])
    for contributions in (in_memory, on_disk, [as_tensors(in_memory[0]), *on_disk[1:]]):
        found = average(contributions)
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


def test_small_contributions_stay_in_memory_too(tmp_path: Path) -> None:
    data = stored(1, numbers=100)
    one = decode_contribution(data)
    journal = journal_at(tmp_path)
    assert journal.keep(one, data) is one
    assert list(journal.kept()) == [(one.cid, "body")]


def test_earlier_versions_are_dropped_and_what_was_taken_of_them_can_still_be_read(tmp_path: Path) -> None:
    journal, data = journal_at(tmp_path), stored(1)
    one = kept(journal, data)
    journal.begin(Version(3))
    journal.keep(decode_contribution(stored(2)), stored(2))
    assert list(journal.sizes()) == [2, 3]
    journal.drop_before(3)
    assert list(journal.sizes()) == [3]
    assert [cid for cid, _ in journal.kept()] == [step_cid(RunId("3fa9c1"), 2, Version(2))]
    assert torch.equal(one.grads["a"], decode_contribution(data).grads["a"])


def test_what_a_killed_process_left_is_read_but_for_its_torn_end_and_gone_on_with(tmp_path: Path) -> None:
    for shard in range(2):
        kept(journal_at(tmp_path), stored(shard))
    (path,) = (tmp_path / "journal").iterdir()
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(whole[: len(whole) // 3])
    after = Journal(tmp_path / "journal")
    assert len(list(after.kept())) == 2
    assert path.stat().st_size > len(whole), "who only looks changes nothing"
    after.begin(Version(2))
    kept(after, stored(7))
    assert [parse_cid(cid).shard for cid, _ in after.kept()] == [0, 1, 7]
    assert path.read_bytes().startswith(whole)


def test_what_was_altered_is_not_whole(tmp_path: Path) -> None:
    journal, data = journal_at(tmp_path), stored(1)
    one = kept(journal, data)
    (path,) = (tmp_path / "journal").iterdir()
    altered = bytearray(path.read_bytes())
    altered[-1] ^= 1
    path.write_bytes(altered)
    with pytest.raises(SpillCorrupt, match="checksum"):
        journal.kept().read((one.cid, "body"))


def test_a_folder_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("a file")
    with pytest.raises(StorageError, match="check that disk, and that it has room"):
        journal_at(tmp_path)
