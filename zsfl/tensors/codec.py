"""Tensor <-> bytes: `Codec.pack`, `unpack`, what it costs, and agreeing on a codec with a peer.

Payloads are little-endian. A packed raw CPU tensor is a view of the tensor: leave it alone until it is sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from math import prod
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from zsfl.errors import BadShape, ConfigError
from zsfl.tensors.compress import Bytes, expand, shuffle, squeeze, unshuffle
from zsfl.tensors.lowbit import LOW_BASES, from_low, to_low
from zsfl.tensors.quantize import from_int8, narrow, to_int8
from zsfl.tensors.spec import (
    BASES,
    DTYPES,
    MAX_LZ4_RATIO,
    MAX_TENSOR_BYTES,
    Base,
    TensorSpec,
    applied_base,
    bad_shape,
    element_bytes,
    payload_bytes,
)
from zsfl.tensors.spec import SUPPORTED as SUPPORTED

Buffer = bytes | bytearray | memoryview

_TORCH: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}
_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in _TORCH.items()}
_HALF: dict[Base, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
_COST_TRIALS = 3
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a codec did to one tensor."""

    bytes: int
    """On the wire."""
    ratio: float
    """Bytes on the wire over bytes of the tensor; 1 for an empty one."""
    encode_s: float
    """Fastest of three."""
    decode_s: float
    """Fastest of three."""
    max_error: float
    """Largest |after - before| over the finite elements; inf if one of them came back non-finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """How tensors become bytes; `str` gives the canonical spelling, such as `fp16+shuffle+lz4`.

    The lossy ones apply to floats that they make smaller, everything else travels raw. Finite values beyond the
    16-bit range are clamped to it, never turned into inf; inf and NaN stay non-finite (from int8 on down: the whole
    sample becomes NaN). `zsfl.tensors.lowbit` says what those below int8 are.
    """

    base: Base = "raw"
    shuffle: bool = False
    lz4: bool = False

    @classmethod
    def parse(cls, text: str) -> Codec:
        """One of BASES, then optionally `+shuffle` and `+lz4`; otherwise ConfigError."""
        first, *steps = text.split("+")
        if first not in BASES or sorted(steps) not in ([], ["lz4"], ["shuffle"], ["lz4", "shuffle"]):
            known = f"one of {', '.join(BASES)}, then optionally +shuffle and +lz4"
            raise ConfigError(f"unknown codec {text!r}: use {known}")
        return cls(base=first, shuffle="shuffle" in steps, lz4="lz4" in steps)

    def __str__(self) -> str:
        return self.base + "+shuffle" * self.shuffle + "+lz4" * self.lz4

    def pack(self, name: str, tensor: Tensor) -> tuple[TensorSpec, bytes | memoryview]:
        """The tensor as read-only bytes, its own if it need not change; BadShape if it is out of bounds."""
        spec, lossless = _packing(self, name, tensor.dtype, tensor.shape)
        if not spec.nbytes:
            return spec, b""
        payload = _encode(lossless.base, tensor.detach())
        if not (lossless.shuffle or lossless.lz4):
            return spec, payload
        done, buffer = lossless._lossless(np.frombuffer(payload, np.uint8), spec.dtype)
        return TensorSpec(name, spec.dtype, spec.shape, str(done), len(buffer)), buffer

    def _lossless(self, payload: Bytes, dtype: str) -> tuple[Codec, bytes | memoryview]:
        """The payload shuffled and compressed, and the codec that says so; as is where lz4 does not pay."""
        itemsize = element_bytes(self.base, dtype) if self.shuffle else 1
        if not self.lz4:
            return self, (shuffle(payload, itemsize) if self.shuffle else payload).data.toreadonly()
        block = squeeze(payload, itemsize)
        return (Codec(base=self.base), payload.data.toreadonly()) if block is None else (self, block)

    def cost(self, tensor: Tensor) -> Cost:
        """Packs and unpacks this very tensor and says what that took."""
        encode_s, (spec, buffer) = _fastest(lambda: self.pack("cost", tensor))
        decode_s, back = _fastest(lambda: unpack(spec, buffer))
        before = tensor.detach().cpu()
        error = (back.double() - before.double()).abs()[before.isfinite()]
        return Cost(
            bytes=spec.nbytes,
            ratio=spec.nbytes / max(1, tensor.nbytes) if tensor.numel() else 1.0,
            encode_s=encode_s,
            decode_s=decode_s,
            max_error=float(error.max().nan_to_num(nan=torch.inf)) if error.numel() else 0.0,
        )


SPELLINGS: dict[str, Codec] = {
    str(codec): codec
    for codec in (Codec(base=b, shuffle=s, lz4=z) for b, s, z in product(BASES, (False, True), (False, True)))
}
"""Every codec by its canonical spelling."""


@cache
def _applied(codec: str, dtype: str) -> str:
    """`codec` without the steps that do nothing to `dtype`; both are known words, so the cache is small."""
    asked = SPELLINGS[codec]
    base = applied_base(asked.base, dtype)
    return str(Codec(base=base, shuffle=asked.shuffle and element_bytes(base, dtype) > 1, lz4=asked.lz4))


@lru_cache(4096)  # the same few tensors travel thousands of times a second
def _packing(codec: Codec, name: str, of: torch.dtype, size: torch.Size) -> tuple[TensorSpec, Codec]:
    """What the packed tensor is called unless lz4 makes it smaller, and the steps that apply to it."""
    dtype, shape = _NAMES.get(of) or str(of), tuple(size)
    base = applied_base(codec.base, dtype)
    nbytes = payload_bytes(name, base, dtype, shape, MAX_TENSOR_BYTES)
    if not nbytes:
        return TensorSpec(name, dtype, shape, "raw", 0), Codec()
    return TensorSpec(name, dtype, shape, base, nbytes), SPELLINGS[_applied(str(codec), dtype)]


def _encode(base: Base, values: Tensor) -> memoryview:
    """The payload before shuffling and lz4, read-only."""
    if base in LOW_BASES:
        return to_low(base, values).data.toreadonly()
    if base == "int8":
        encoded = to_int8(values)
        if not isinstance(encoded, Tensor):
            return encoded.data.toreadonly()
        values = encoded
    elif base != "raw":
        values = narrow(values, _HALF[base])
    if not values.is_cpu:
        values = values.cpu()
    if not values.is_contiguous():
        values = values.contiguous()
    if values.dtype is torch.bfloat16:  # which numpy lacks
        values = values.view(torch.int16)
    return values.numpy().data.cast("B").toreadonly()


def unpack(spec: TensorSpec, buffer: Buffer, *, max_bytes: int = MAX_TENSOR_BYTES) -> Tensor:
    """The CPU tensor in `buffer`; BadShape, before anything is allocated, unless spec, bytes, bounds agree.

    Raw values in a writable buffer are not copied: tensor and buffer share memory. A read-only buffer is
    copied, so the tensor may always be written.
    """
    view = memoryview(buffer)
    try:
        codec, dtype, nbytes = _unpacking(spec.codec, spec.dtype, spec.shape, spec.nbytes, max_bytes)
    except BadShape:
        _unpacking.__wrapped__(spec.codec, spec.dtype, spec.shape, spec.nbytes, max_bytes, spec.name)
        raise
    if not view.c_contiguous or view.nbytes != spec.nbytes:
        raise bad_shape(spec.name, f"{view.nbytes} bytes came, {spec.nbytes} were announced")
    if not nbytes:
        return torch.empty(spec.shape, dtype=dtype)
    payload: Buffer | Bytes = view
    if codec.lz4:
        payload = _expanded(spec, view, nbytes)
    if codec.shuffle:
        payload = unshuffle(np.frombuffer(payload, np.uint8), element_bytes(codec.base, spec.dtype))
    return _decode(spec, codec.base, dtype, payload)


def unpacked_bytes(spec: TensorSpec, size_bytes: int) -> int:
    """Bytes of the tensor that `unpack` would make of so many; BadShape, as there, unless spec, bytes and bounds agree.

    A few packed bytes may stand for very many.
    """
    if size_bytes != spec.nbytes:
        raise bad_shape(spec.name, f"{size_bytes} bytes came, {spec.nbytes} were announced")
    _unpacking(spec.codec, spec.dtype, spec.shape, spec.nbytes, MAX_TENSOR_BYTES)
    return prod(spec.shape) * DTYPES[spec.dtype]


@lru_cache(4096)
def _unpacking(
    codec: str, dtype: str, shape: tuple[int, ...], size: int, max_bytes: int, name: str = ""
) -> tuple[Codec, torch.dtype, int]:
    """How to unpack, and how many bytes are to be there before lz4; BadShape where what a peer says does not agree.

    Without the name, so that a peer that names its tensors anew each time finds nothing remembered of them.
    """
    known = SPELLINGS.get(codec)
    if known is None:
        raise bad_shape(name, f"codec {codec[:80]!r} is not one of {', '.join(SPELLINGS)}")
    nbytes = payload_bytes(name, known.base, dtype, shape, max_bytes)
    applied = _applied(codec, dtype) if nbytes else "raw"
    if codec != applied:
        raise bad_shape(name, f"codec {codec} does not apply to {dtype} {shape}, {applied} does")
    if known.lz4:
        if not size < nbytes <= MAX_LZ4_RATIO * size:
            raise bad_shape(name, f"{size} bytes of lz4 cannot stand for the {nbytes} of {dtype} {shape}")
    elif size != nbytes:
        raise bad_shape(name, f"{dtype} {shape} as {codec} takes {nbytes} bytes, {size} were announced")
    return known, _TORCH[dtype], nbytes


def _expanded(spec: TensorSpec, view: memoryview, nbytes: int) -> bytearray:
    payload = expand(view, nbytes)
    if payload is None:
        raise bad_shape(spec.name, f"its {spec.nbytes} bytes are no lz4 block of {nbytes} bytes")
    return payload


def _decode(spec: TensorSpec, base: Base, dtype: torch.dtype, payload: Buffer | Bytes) -> Tensor:
    """The inverse of `_encode`."""
    if base == "int8":
        return from_int8(np.frombuffer(payload, np.uint8), spec.shape, dtype)
    if base in LOW_BASES:
        values = from_low(base, np.frombuffer(payload, np.uint8), spec.shape, dtype)
        if values is None:
            raise bad_shape(spec.name, f"it does not say which elements of {spec.shape} it kept")
        return values
    if isinstance(payload, memoryview) and payload.readonly:
        payload = bytearray(payload)  # torch warns of read-only memory, and in-place modules would write it
    if base != "raw":
        return _tensor(payload, _HALF[base]).to(dtype).view(spec.shape)
    if dtype is torch.bool:
        flags = _tensor(payload, torch.uint8)
        check_bools(spec.name, flags)
        return flags.view(torch.bool).view(spec.shape)
    return _tensor(payload, dtype).view(spec.shape)


def check_bools(name: str, flags: Tensor) -> None:
    """BadShape unless so many bytes, one at least, are bools. Other threads run meanwhile, however many there are."""
    if int(flags.max()) > 1:
        raise bad_shape(name, "a bool is neither 0 nor 1")


def _tensor(payload: Buffer | Bytes, dtype: torch.dtype) -> Tensor:
    """The payload as a vector, copied only if misaligned for `dtype` (a slice of a larger frame)."""
    values = torch.frombuffer(payload, dtype=dtype)
    return values.clone() if values.data_ptr() % dtype.itemsize else values


def _fastest(action: Callable[[], _T]) -> tuple[float, _T]:
    """The shortest time of a few trials, and the result."""
    times: list[float] = []
    while True:
        started = time.perf_counter()
        result = action()
        times.append(time.perf_counter() - started)
        if len(times) == _COST_TRIALS:
            return min(times), result


def negotiate(wanted: str, offered: Sequence[str]) -> Codec:
    """The codec `wanted` if the peer offers its words (see SUPPORTED); ConfigError if not.

    Lossless steps that the peer lacks are left out; the base is never replaced.
    """
    codec = Codec.parse(wanted)
    needed = dict.fromkeys(("raw", codec.base))  # labels always travel raw
    if missing := [word for word in needed if word not in offered]:
        has = ", ".join(offered) or "nothing"
        raise ConfigError(
            f"codec {wanted!r} needs {', '.join(missing)}, the peer offers {has}: "
            "choose a codec made of what it offers, or update the peer"
        )
    lz4 = codec.lz4 and "lz4" in offered
    keep_shuffle = codec.shuffle and "shuffle" in offered and lz4 == codec.lz4  # shuffling only serves lz4
    return Codec(base=codec.base, shuffle=keep_shuffle, lz4=lz4)
