"""What a spill looks like: a safetensors file that anybody can open.

Tensors are named `grad/NAME` (sums of per-sample gradients) and `buffer/NAME` (buffers as the step left them). The
metadata says whose contribution it is, and begins with a CRC-32 over every byte of the spill (with zeros in its own
place). The stored bytes are the message: they travel as they are and are verified wherever they arrive.

Written by hand, since safetensors' own writer took ten times as long for a small network: of steps with the same
tensors, the header is the same but for the metadata.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Annotated, Literal

import msgspec
import torch

from zsfl.errors import BadShape, SpillCorrupt
from zsfl.ids import Cid, SpillKind, Version, parse_cid
from zsfl.learning.averaging import Contribution, StepShare
from zsfl.learning.flat import FlatLayout, FlatTensors
from zsfl.spill.coded import CODED, uncoded
from zsfl.tensors.codec import check_bools
from zsfl.tensors.spec import MAX_NDIM, MAX_TENSOR_BYTES
from zsfl.wire.fields import MAX_MEMBERS, ShortText

MAX_HEADER_BYTES = 1 << 20
"""Of the safetensors header: some thousands of tensors."""
MOST_BEFORE_DATA = 8 + MAX_HEADER_BYTES
"""Bytes of a spill that are not its tensors'."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_WORDS = {dtype: word for word, dtype in _DTYPES.items()}
_START, _ZEROS = b'{"__metadata__":{"crc32":"', b"00000000"
_CRC = slice(8 + len(_START), 8 + len(_START) + len(_ZEROS))
"""Where in a spill its checksum stands."""
_GRAD, _BUFFER = "grad/", "buffer/"
_CACHED_BYTES = 1 << 16
"""Of longer headers nothing is remembered."""

Buffer = bytes | bytearray | memoryview


class SpillMeta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose contribution a spill holds."""

    cid: Annotated[Cid, msgspec.Meta(max_length=64)]
    part: Literal["body", "client"]
    version: Version
    n: Annotated[float, msgspec.Meta(ge=0, le=1e300)]
    """Weight sum of the batch: what the averaged gradient is divided by."""
    samples: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
    loss_sum: float | None
    """Sum of the loss over the batch, times its weight; None from a party that does not see the loss."""
    client: ShortText
    node: ShortText
    """Name of the node that wrote it."""
    members: Annotated[tuple[StepShare, ...], msgspec.Meta(max_length=MAX_MEMBERS)] = ()
    """Of a merged spill, the steps whose body gradients it sums up, its own cid first: all of one run and version.

    `n` and `samples` are the sums of theirs.
    """

    @property
    def kind(self) -> SpillKind:
        """What it is offered and asked for as; beside a merged spill there may be one of its first step alone."""
        return "merged" if self.members else self.part


class _TensorInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[list[Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]], msgspec.Meta(max_length=MAX_NDIM)]
    data_offsets: tuple[int, int]


_Name = Annotated[str, msgspec.Meta(max_length=512)]
_Place = tuple[str, torch.dtype, tuple[int, ...], int, int]
"""Name, dtype and shape of a tensor, and where among the data it begins and how many numbers it has."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is where in the data."""

    places: Sequence[_Place]
    size_bytes: int
    flat: FlatLayout | None
    """Of the gradients, where they are in one piece and of one dtype."""
    flat_bytes: slice
    """Where that is."""


def encode(meta: SpillMeta, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The bytes of one spill."""
    return b"".join(pieces(meta, tensors))


def pieces(meta: SpillMeta, tensors: Mapping[str, torch.Tensor]) -> list[Buffer]:
    """The bytes of one spill as its header and its tensors; those that are plain already are not copied.

    BadShape for a cid that is none, and for tensors that no spill can hold.
    """
    _check(meta)
    order, described = _template(tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()))
    head = b'%s%s",%s}%s' % (_START, _ZEROS, _metadata(meta), described)
    head += b" " * (-len(head) % 8)  # so that the data begin where numbers like to
    if len(head) > MAX_HEADER_BYTES:
        raise BadShape(f"{len(tensors)} tensors take a header of {len(head)} bytes; at most {MAX_HEADER_BYTES} go")
    start = bytearray(len(head).to_bytes(8, "little") + head)
    crc = zlib.crc32(start)
    found: list[Buffer] = [start]
    for name in order:
        data = _data(tensors[name])
        crc = zlib.crc32(data, crc)
        found.append(data)
    start[_CRC] = b"%08x" % crc
    return found


def decode(data: Buffer) -> tuple[SpillMeta, dict[str, torch.Tensor]]:
    """Meta and tensors of the spill in `data`; SpillCorrupt when it is not one, whole and unaltered.

    The tensors share the memory of `data`, where that may be written to.
    """
    meta, plan, numbers = _verified(data)
    with _spoiled():
        return meta, uncoded(_tensors(plan.places, numbers))


def decode_contribution(data: Buffer, max_bytes: int | None = None) -> Contribution:
    """The spill in `data` as the averaging takes it; as `decode`, but tensors of one dtype stay in one piece.

    Its tensors may take so many bytes as they are stored, and its packed ones so many once they are unpacked.
    """
    meta, plan, numbers = _verified(data)
    with _spoiled():
        if max_bytes is not None and plan.size_bytes > max_bytes:
            raise BadShape(f"its tensors take {plan.size_bytes} bytes, and {max_bytes} at most are of use")
        return _contribution(meta, plan, numbers, max_bytes)


def _contribution(meta: SpillMeta, plan: _Plan, numbers: memoryview, max_bytes: int | None) -> Contribution:
    grads: Mapping[str, torch.Tensor]
    if plan.flat is not None:
        piece = numbers[plan.flat_bytes]
        owned = bytearray(piece) if piece.readonly else piece
        grads = FlatTensors(plan.flat, torch.frombuffer(owned, dtype=plan.flat.dtype))
        rest = [place for place in plan.places if not place[0].startswith(_GRAD)]
        tensors = _copies(rest, numbers)
    else:
        tensors = uncoded(_tensors(plan.places, numbers), MAX_TENSOR_BYTES if max_bytes is None else max_bytes)
        grads = {name[len(_GRAD) :]: tensor for name, tensor in tensors.items() if name.startswith(_GRAD)}
    buffers = {name[len(_BUFFER) :]: tensor for name, tensor in tensors.items() if name.startswith(_BUFFER)}
    return Contribution(
        cid=meta.cid,
        part=meta.part,
        version=meta.version,
        n=meta.n,
        loss_sum=meta.loss_sum,
        samples=meta.samples,
        grads=grads,
        buffers=buffers,
        node=meta.node,
        client=meta.client,
        members=meta.members,
    )


def flat_bytes(data: Buffer) -> slice:
    """Where in a spill, known to be whole, its gradients are, if they are in one piece (see `FlatTensors`)."""
    view = memoryview(data).cast("B")
    start = header_bytes(view)
    inside = _plan(_split(bytes(view[8:start]))[1]).flat_bytes
    return slice(start + inside.start, start + inside.stop)


def _verified(data: Buffer) -> tuple[SpillMeta, _Plan, memoryview]:
    """Meta, where the tensors are, and their bytes."""
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    with _spoiled():
        size = _header_size(view)
        crc = zlib.crc32(view[_CRC.stop :], zlib.crc32(_ZEROS, zlib.crc32(view[: _CRC.start])))
        if view[_CRC] != b"%08x" % crc:
            raise SpillCorrupt("not a whole spill: its bytes do not match their checksum")
        meta, described = _split(bytes(view[8 : 8 + size]))
        plan = (_plan if len(described) <= _CACHED_BYTES else _plan.__wrapped__)(described)
        if 8 + size + plan.size_bytes != len(view):
            raise SpillCorrupt(f"not a whole spill: {plan.size_bytes} bytes of tensors in {len(view) - 8 - size}")
        return meta, plan, view[8 + size :]


@contextmanager
def _spoiled() -> Iterator[None]:
    """Whatever goes wrong with bytes that may be anything is a SpillCorrupt."""
    try:
        yield
    except (BadShape, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise SpillCorrupt(f"not a whole spill: {type(error).__name__}: {error}") from error


def _copies(places: Sequence[_Place], numbers: memoryview) -> dict[str, torch.Tensor]:
    """Some few of the tensors, in memory of their own: that of the others may be let go."""
    found: dict[str, torch.Tensor] = {}
    for name, dtype, shape, start, count in places:
        piece = numbers[start : start + count * dtype.itemsize]
        found |= _tensors([(name, dtype, shape, 0, count)], memoryview(bytearray(piece)))
    return found


def _tensors(places: Sequence[_Place], numbers: memoryview) -> dict[str, torch.Tensor]:
    owned = bytearray(numbers) if numbers.readonly else numbers
    found: dict[str, torch.Tensor] = {}
    for name, dtype, shape, start, count in places:
        if not count:
            found[name] = torch.empty(shape, dtype=dtype)
            continue
        if dtype is torch.bool:
            check_bools(name, torch.frombuffer(owned, dtype=torch.uint8, count=count, offset=start))
        found[name] = torch.frombuffer(owned, dtype=dtype, count=count, offset=start).view(shape)
    return found


def decode_meta(head: Buffer) -> SpillMeta:
    """What a spill says of itself, from its first bytes (all of its header): nothing is verified."""
    view = memoryview(head).cast("B") if len(head) else memoryview(b"")
    with _spoiled():
        return _split(bytes(view[8 : 8 + _header_size(view)]))[0]


def header_bytes(start: Buffer) -> int:
    """How many bytes `decode_meta` needs of the spill that begins like this; of one with too long a header, too few."""
    return 8 + min(int.from_bytes(start[:8], "little"), MAX_HEADER_BYTES)


def _header_size(view: memoryview) -> int:
    size = int.from_bytes(view[:8], "little")
    if not len(_START) <= size <= min(MAX_HEADER_BYTES, len(view) - 8) or view[8 : _CRC.start] != _START:
        raise SpillCorrupt(f"not a whole spill: header of {size} bytes in a file of {len(view)}")
    return size


def _metadata(meta: SpillMeta) -> bytes:
    """The inside of a JSON object. All values are text, which is all that safetensors allows."""
    client, node = msgspec.json.encode(meta.client).decode(), msgspec.json.encode(meta.node).decode()
    loss = "null" if meta.loss_sum is None else repr(float(meta.loss_sum))  # repr: JSON would make null of NaN
    members = ""
    if meta.members:
        members = f'"members":{msgspec.json.encode(msgspec.json.encode(meta.members).decode()).decode()},'
    return (
        f'{members}"cid":"{meta.cid}","part":"{meta.part}","version":"{meta.version}","n":"{float(meta.n)!r}",'
        f'"samples":"{meta.samples}","loss_sum":"{loss}","client":{client},"node":{node}'
    ).encode()


def _split(header: bytes) -> tuple[SpillMeta, bytes]:
    """Meta, and what the header says of the tensors."""
    end = header.find(b'"},"')  # nowhere inside a text, where quotes are escaped
    end = len(header.rstrip()) - 2 if end < 0 else end + 1
    inside = b"{" + header[_CRC.stop - 8 + 2 : end] + b"}"
    if b'"members":"' in inside:
        fields = msgspec.json.decode(inside, type=dict[str, str])
        members = msgspec.json.decode(fields.pop("members"), type=tuple[StepShare, ...])
        meta = msgspec.convert({**fields, "members": members}, SpillMeta, strict=False)
    else:
        meta = msgspec.json.decode(inside, type=SpillMeta, strict=False)
    _check(meta)
    return meta, header[end + 1 :].rstrip()  # padded or not, the same tensors are described by the same bytes


def _check(meta: SpillMeta) -> None:
    """BadShape unless the cids fit one another and the version."""
    step = parse_cid(meta.cid)
    if step.version != meta.version:
        raise BadShape(f"step {meta.cid} cannot be of version {meta.version}")
    if not meta.members:
        return
    steps = [parse_cid(member.cid) for member in meta.members]
    whole = sum(member.samples for member in meta.members) == meta.samples
    if meta.members[0].cid != meta.cid or meta.part != "body" or len(set(steps)) < len(steps) or not whole:
        raise BadShape(f"the spill {meta.cid} does not add up to its {len(steps)} steps")
    if any((one.run, one.version) != (step.run, step.version) for one in steps):
        raise BadShape(f"the steps of spill {meta.cid} are not of one version")


@lru_cache(256)
def _template(tensors: tuple[tuple[str, torch.dtype, torch.Size], ...]) -> tuple[Sequence[str], bytes]:
    """The order of the tensors' data, wide numbers first, and the end of the header, which describes them."""
    order = sorted(tensors, key=lambda one: (-one[1].itemsize, one[0]))
    described: dict[str, _TensorInfo] = {}
    start = 0
    for name, dtype, shape in order:
        if dtype not in _WORDS:
            raise BadShape(f"{name} is of {dtype}, which no spill can hold")
        end = start + shape.numel() * dtype.itemsize
        described[name] = _TensorInfo(_WORDS[dtype], list(shape), (start, end))
        start = end
    inside = msgspec.json.encode(described)[1:]
    return [name for name, _, _ in order], b"," + inside if described else inside


@lru_cache(64)  # that of each kind of contribution, and of each cut
def _plan(described: bytes) -> _Plan:
    """Where the tensors are, and how many bytes they take."""
    text = b"{" + described[1:] if described.startswith(b",") else b"{" + described
    infos = msgspec.json.decode(text, type=dict[_Name, _TensorInfo])
    places: list[_Place] = []
    total = 0
    for name, info in sorted(infos.items(), key=lambda one: one[1].data_offsets):
        dtype, count = _DTYPES[info.dtype], prod(info.shape)
        if info.data_offsets != (total, total + count * dtype.itemsize):
            raise BadShape(f"{name} does not take the bytes that it is said to")
        if total % dtype.itemsize:
            raise BadShape(f"{name} begins where no {info.dtype} may")
        places.append((name, dtype, tuple(info.shape), total, count))
        total = info.data_offsets[1]
    return _Plan(places, total, *_flat(places))


def _flat(places: Sequence[_Place]) -> tuple[FlatLayout | None, slice]:
    """Where all gradients are, if they are of one dtype and follow one another, as `encode` writes them."""
    grads = [place for place in places if place[0].startswith(_GRAD)]
    if len({dtype for _, dtype, *_ in grads}) != 1 or any(place[0].startswith(CODED) for place in places):
        return None, slice(0)
    dtype, first, count = grads[0][1], grads[0][3], sum(place[4] for place in grads)
    piece = slice(first, first + count * dtype.itemsize)
    if not count or piece.stop != grads[-1][3] + grads[-1][4] * dtype.itemsize:
        return None, slice(0)
    inside = [(name[len(_GRAD) :], shape, (start - first) // dtype.itemsize, n) for name, _, shape, start, n in grads]
    return FlatLayout(dtype, inside), piece


def _data(tensor: torch.Tensor) -> Buffer:
    """The bytes of a tensor, which is copied only where they are not in one piece of this machine's memory."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if not tensor.is_cpu:
        tensor = tensor.cpu()
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    if tensor.dtype is torch.bfloat16:  # of which numpy knows nothing
        tensor = tensor.view(torch.int16)
    return tensor.numpy().data if tensor.ndim else tensor.numpy().tobytes()
