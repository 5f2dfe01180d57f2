"""Spills whose gradients are packed: what is stored, what comes back, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from zsfl.errors import SpillCorrupt
from zsfl.ids import RunId, Version, step_cid
from zsfl.spill.coded import SpillCoder
from zsfl.spill.layout import SpillMeta, decode, decode_contribution, encode
from zsfl.spill.store import SpillStore
from zsfl.tensors.codec import SUPPORTED, Codec, unpack
from zsfl.tensors.spec import BASES

RUN = RunId("3fa9c1")


def meta(shard: int = 0, version: int = 2) -> SpillMeta:
    cid = step_cid(RUN, shard, Version(version))
    return SpillMeta(
        cid=cid, part="client", version=Version(version), n=4.0, samples=4, loss_sum=1.5, client="c", node="s"
    )


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "grad/tail.weight": torch.randn(10, 64, generator=draw),
        "grad/tail.bias": torch.randn(10, generator=draw, dtype=torch.float64),
        "grad/scale": torch.randn((), generator=draw),
        "grad/none": torch.empty(0, 3),
        "buffer/seen": torch.tensor(7),
    }


@pytest.mark.parametrize("name", [*BASES, "bf16+shuffle+lz4", "raw+lz4"])
def test_what_was_packed_comes_back_as_the_codec_has_it(name: str) -> None:
    given, codec = tensors(), Codec.parse(name)
    data = encode(meta(), SpillCoder(codec).coded(meta(), given))
    said, found = decode(data)
    assert said == meta()
    assert set(found) == set(given)
    for key, tensor in given.items():
        wanted = unpack(*codec.pack("x", tensor)) if key.startswith("grad/") else tensor
        assert torch.equal(found[key], wanted)
        assert found[key].dtype == tensor.dtype
    contribution = decode_contribution(data)
    assert {f"grad/{key}" for key in contribution.grads} == {key for key in given if key.startswith("grad/")}
    assert torch.equal(contribution.grads["tail.weight"], found["grad/tail.weight"])
    assert torch.equal(contribution.buffers["seen"], torch.tensor(7))


def test_a_store_packs_what_is_put_and_safetensors_reads_it(tmp_path: Path) -> None:
    plain, packed = SpillStore(tmp_path / "plain"), SpillStore(tmp_path / "packed", SpillCoder(Codec.parse("rand2")))
    offers = [store.put(meta(), tensors()) for store in (plain, packed)]
    assert offers[1].size_bytes < offers[0].size_bytes / 2
    stored = safetensors.torch.load(packed.read((offers[1].cid, "client")) or b"")
    assert stored["coded/rand2/float32/10x64/grad/tail.weight"].shape == (4 + 10 + 160,)


def test_feedback_is_kept_for_each_shard() -> None:
    coder, small = SpillCoder(Codec.parse("int4"), feedback=True), {"grad/w": torch.tensor([[1.0, 0.03]])}

    def sent(shard: int) -> float:
        return float(decode(encode(meta(shard), coder.coded(meta(shard), small)))[1]["grad/w"][0, 1])

    assert [sent(0) for _ in range(3)].count(0.0) == 2  # what is too small to send comes through when it has added up
    assert sent(1) == 0.0
    assert sum(sent(2) for _ in range(100)) == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"coded/int8/float32/2x2/grad/w": torch.zeros(5, dtype=torch.uint8)},
        {"coded/int8/float32/2x2/grad/w": torch.zeros(12)},
        {"coded/zip/float32/2x2/grad/w": torch.zeros(12, dtype=torch.uint8)},
        {"coded/int8/float32/2xy/grad/w": torch.zeros(12, dtype=torch.uint8)},
        {"coded/int8/float32": torch.zeros(12, dtype=torch.uint8)},
        {"coded/int8/float32/2x2/grad/w": torch.zeros(12, dtype=torch.uint8), "grad/w": torch.zeros(2, 2)},
        {"coded/int2/float32/99999999x99999999/grad/w": torch.zeros(12, dtype=torch.uint8)},
    ],
)
def test_what_is_packed_wrongly_is_no_spill(changes: dict[str, torch.Tensor]) -> None:
    data = encode(meta(), changes)
    for read in (decode, decode_contribution):
        with pytest.raises(SpillCorrupt):
            read(data)


@pytest.mark.parametrize("codec", ["raw+lz4", "rank6"])
def test_a_few_bytes_that_stand_for_very_many_are_no_spill(codec: str) -> None:
    """Each of them alone would have room."""
    spec, packed = Codec.parse(codec).pack("grad/w", torch.zeros(512, 512))
    name = f"coded/{spec.codec}/float32/512x512/grad"
    few = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    data = encode(meta(), {f"{name}/{number}": few for number in range(4)})
    assert len(decode_contribution(data, max_bytes=4 << 20).grads) == 4
    with pytest.raises(SpillCorrupt, match=f"more than {3 << 20} bytes once they are unpacked"):
        decode_contribution(data, max_bytes=3 << 20)


def test_all_bases_are_offered() -> None:
    assert set(BASES) < set(SUPPORTED)
