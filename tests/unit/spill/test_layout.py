"""What a spill looks like, and that nothing else is taken for one."""

from __future__ import annotations

import json
import math
import re
import zlib

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from zsfl.errors import BadShape, SpillCorrupt
from zsfl.ids import Cid, RunId, Version, step_cid
from zsfl.learning.averaging import StepShare
from zsfl.spill.layout import (
    MAX_HEADER_BYTES,
    SpillMeta,
    decode,
    decode_contribution,
    decode_meta,
    encode,
    header_bytes,
)

META = SpillMeta(
    cid=step_cid(RunId("3fa9c1"), 3, Version(12)),
    part="body",
    version=Version(12),
    n=17.5,
    samples=17,
    loss_sum=3.25,
    client="client-3",
    node="server-0",
)
TENSORS = {
    "grad/body.0.weight": torch.randn(3, 5, generator=torch.Generator().manual_seed(1)),
    "grad/body.0.bias": torch.arange(3, dtype=torch.float64),
    "buffer/body.1.num_batches_tracked": torch.tensor(7),
    "grad/empty": torch.zeros(0, 4),
}
DATA = encode(META, TENSORS)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,), (3, 4), (2, 1, 5)], ids=str)
def test_tensors_come_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape, dtype=torch.float64) * 100).to(dtype)
    meta, tensors = decode(encode(META, {"grad/a": tensor}))
    assert meta == META
    assert tensors["grad/a"].dtype == dtype
    assert tensors["grad/a"].shape == tensor.shape
    assert torch.equal(tensors["grad/a"], tensor)


def test_views_and_gradients_are_stored_as_plain_tensors() -> None:
    base = torch.arange(12.0, requires_grad=True).reshape(3, 4)
    _, tensors = decode(encode(META, {"grad/t": base.t(), "grad/every_other": base[:, ::2]}))
    assert torch.equal(tensors["grad/t"], base.detach().t())
    assert torch.equal(tensors["grad/every_other"], base.detach()[:, ::2])


def test_anybody_can_open_one() -> None:
    assert load(DATA).keys() == TENSORS.keys()


@pytest.mark.parametrize("loss_sum", [None, math.inf, -math.inf, 0.0])
def test_a_loss_comes_back_whatever_it_is(loss_sum: float | None) -> None:
    meta, _ = decode(encode(msgspec.structs.replace(META, loss_sum=loss_sum), TENSORS))
    assert meta.loss_sum == loss_sum


def test_a_loss_that_is_nan_is_not_lost() -> None:
    meta, _ = decode(encode(msgspec.structs.replace(META, loss_sum=math.nan), TENSORS))
    assert meta.loss_sum is not None
    assert math.isnan(meta.loss_sum)


@given(st.integers(0, 8 * len(DATA) - 1))
def test_a_flipped_bit_anywhere_is_noticed(bit: int) -> None:
    altered = bytearray(DATA)
    altered[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SpillCorrupt):
        decode(altered)


def test_every_bit_of_the_header_counts() -> None:
    for bit in range(8 * (8 + int.from_bytes(DATA[:8], "little"))):
        altered = bytearray(DATA)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SpillCorrupt):
            decode(altered)


@given(st.integers(0, len(DATA) - 1))
def test_a_truncated_one_is_noticed(size: int) -> None:
    with pytest.raises(SpillCorrupt):
        decode(DATA[:size])


@given(st.binary(min_size=1, max_size=50))
def test_one_with_something_behind_it_is_noticed(tail: bytes) -> None:
    with pytest.raises(SpillCorrupt):
        decode(DATA + tail)


@given(st.binary(max_size=300))
def test_random_bytes_are_no_spill(data: bytes) -> None:
    with pytest.raises(SpillCorrupt):
        decode(data)


def safetensors(header: object) -> bytes:
    packed = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(packed).to_bytes(8, "little") + packed


NOT_SPILLS = {
    "foreign": save({"a": torch.ones(2)}),
    "other metadata": save({"a": torch.ones(2)}, metadata={"format": "pt"}),
    "empty metadata": save({"a": torch.ones(2)}, metadata={"zsfl": "{}", "crc32": "00000000"}),
    "number": safetensors(12),
    "text": safetensors("text"),
    "list": safetensors([]),
    "null": safetensors(None),
    "text as metadata": safetensors({"__metadata__": "text"}),
    "numbers as metadata": safetensors({"__metadata__": {"zsfl": 1, "crc32": 2}}),
    "deep": safetensors(b"[" * 5000),
    "not text": safetensors(b"\xff\xfe"),
    "size": (1 << 63).to_bytes(8, "little"),
    "huge": (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b" " * (MAX_HEADER_BYTES + 1),
}


@pytest.mark.parametrize("data", NOT_SPILLS.values(), ids=NOT_SPILLS.keys())
def test_what_is_no_spill_is_said_so(data: bytes) -> None:
    with pytest.raises(SpillCorrupt, match="not a whole spill"):
        decode(data)


def resealed(data: bytes, old: str, new: str) -> bytes:
    """A spill with something else in its header, and the checksum of that."""
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].decode()
    assert old in header
    header = re.sub(r'"crc32":"\w+"', '"crc32":"00000000"', header.replace(old, new)).encode()
    altered = len(header).to_bytes(8, "little") + header + data[8 + size :]
    return altered.replace(b"00000000", b"%08x" % zlib.crc32(altered), 1)


def test_one_that_is_sealed_anew_is_one() -> None:
    assert decode(resealed(DATA, '"server-0"', '"server-1"'))[0].node == "server-1"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (META.cid, "../../x"),
        ('"version":"12"', '"version":"13"'),
        ('"n":"17.5"', '"n":"-1.0"'),
        ('"n":"17.5"', '"n":"nan"'),
        ('"samples":"17"', '"samples":"-1"'),
        ('"samples":"17"', '"samples":"seventeen"'),
        ('"part":"body"', '"part":"tail"'),
        ('"node":', '"edon":'),
        ('"shape":[3,5]', '"shape":[3,6]'),
        ('"shape":[3,5]', '"shape":[-3,-5]'),
        ('"dtype":"F32","shape":[3,5]', '"dtype":"F99","shape":[3,5]'),
        ('"grad/body.0.weight"', '"grad/body.0.bias"'),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(old: str, new: str) -> None:
    with pytest.raises(SpillCorrupt):
        decode(resealed(DATA, old, new))


@pytest.mark.parametrize("change", [{"cid": Cid("../../x")}, {"version": Version(13)}], ids=str)
def test_metadata_that_makes_no_sense_is_not_written(change: dict[str, object]) -> None:
    with pytest.raises(BadShape):
        encode(msgspec.structs.replace(META, **change), TENSORS)


def test_a_tensor_that_no_spill_can_hold_is_said_so() -> None:
    with pytest.raises(BadShape, match=r"grad/a is of torch.complex64"):
        encode(META, {"grad/a": torch.zeros(2, dtype=torch.complex64)})


SHOWN = st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"]), max_size=20)


@given(SHOWN, SHOWN)
def test_names_come_back_whatever_they_are(client: str, node: str) -> None:
    meta = msgspec.structs.replace(META, client=client, node=node)
    assert decode(encode(meta, TENSORS))[0] == meta
    assert decode(encode(meta, {}))[0] == meta


# --- merged ones -----------------------------------------------------------------------------------------


def share(shard: int, version: int = 12, k: int = 0, samples: int = 17) -> StepShare:
    cid = step_cid(RunId("3fa9c1"), shard, Version(version), k)
    return StepShare(cid=cid, n=float(samples), samples=samples, client=f'client "{shard}"}},"')


def merged(*shares: StepShare, samples: int | None = None) -> SpillMeta:
    total = sum(one.samples for one in shares)
    whole = total if samples is None else samples
    return msgspec.structs.replace(META, cid=shares[0].cid, n=float(total), samples=whole, members=shares)


def test_a_merged_one_names_its_steps() -> None:
    meta = merged(share(3), share(1), share(8))
    data = encode(meta, TENSORS)
    found, tensors = decode(data)
    assert found == meta == decode_meta(data[: header_bytes(data[:8])])
    assert (found.kind, META.kind) == ("merged", "body")
    assert tensors.keys() == TENSORS.keys()


@pytest.mark.parametrize(
    "meta",
    [
        merged(share(3), share(3)),
        merged(share(3), share(4, version=13)),
        merged(share(3), share(4), samples=17),
        msgspec.structs.replace(merged(share(3), share(4)), cid=share(4).cid),
        msgspec.structs.replace(merged(share(3), share(4)), part="client"),
    ],
)
def test_a_merged_one_that_does_not_add_up_is_not_written(meta: SpillMeta) -> None:
    with pytest.raises(BadShape):
        encode(meta, TENSORS)


def test_many_bools_are_looked_at_all_at_once() -> None:
    """One by one they would stop all threads for seconds: heartbeats too."""
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("zsfl.spill.layout.check_bools", lambda _, flags: seen.append(flags))
        decode(encode(META, {"buffer/b": torch.ones(1000, dtype=torch.bool)}))
    assert [(flags.dtype, len(flags)) for flags in seen] == [(torch.uint8, 1000)]


def test_a_bool_is_0_or_1() -> None:
    data = encode(META, {"buffer/b": torch.zeros(1000, dtype=torch.bool)})
    altered = bytearray(data[:-1] + b"\x02")
    size = int.from_bytes(data[:8], "little")
    sealed = resealed(bytes(altered), data[8 : 8 + size].decode()[:2], data[8 : 8 + size].decode()[:2])
    with pytest.raises(SpillCorrupt, match="a bool is neither 0 nor 1"):
        decode(sealed)


def test_what_takes_more_than_is_of_use_is_refused_packed_or_not() -> None:
    data = encode(META, {"grad/a": torch.zeros(4), "buffer/b": torch.zeros(16, dtype=torch.bool)})
    assert decode_contribution(data, 32).samples == 17
    with pytest.raises(SpillCorrupt, match="its tensors take 32 bytes, and 31 at most"):
        decode_contribution(data, 31)


@pytest.mark.parametrize("name", ["\x1b[2Jclient", "client\nanother line", "\u202eclient"])
def test_names_can_be_shown(name: str) -> None:
    share = StepShare(cid=META.cid, n=META.n, samples=META.samples, client=name)
    for changes in ({"client": name}, {"node": name}, {"members": (share,)}):
        data = encode(msgspec.structs.replace(META, **changes), TENSORS)
        for read in (decode, decode_contribution, decode_meta):
            with pytest.raises(SpillCorrupt, match="not a whole spill"):
                read(data)
