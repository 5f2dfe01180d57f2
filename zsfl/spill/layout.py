"""What a spill looks like: a safetensors file that anybody can open.

Tensors are named `grad/NAME` (sums of per-sample gradients) and `buffer/NAME` (buffers as the step left them).
The metadata says whose contribution it is, and carries a CRC-32 over itself and the bytes of every tensor. The
stored bytes are the message: they travel as they are and are verified wherever they arrive.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Annotated, Any, cast

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from zsfl.errors import SpillCorrupt
from zsfl.ids import Cid, PartName, Version

MAX_HEADER_BYTES = 1 << 20
"""Of the safetensors header: some thousands of tensors."""


class SpillMeta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose contribution a spill holds."""

    cid: Annotated[Cid, msgspec.Meta(max_length=64)]
    part: PartName
    version: Version
    n: float
    """Weight sum of the batch: what the averaged gradient is divided by."""
    samples: int
    loss_sum: float | None
    """Sum of the loss over the batch, times its weight; None from a party that does not see the loss."""
    client: str
    node: str
    """Name of the node that wrote it."""


def encode(meta: SpillMeta, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The bytes of one spill."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    about = msgspec.json.encode(meta).decode()
    crc = _checksum(about, {name: _raw(tensor) for name, tensor in stored.items()})
    return save(stored, metadata={"zsfl": about, "crc32": f"{crc:08x}"})


def decode(data: bytes | bytearray | memoryview) -> tuple[SpillMeta, dict[str, torch.Tensor]]:
    """Meta and tensors of the spill in `data`; SpillCorrupt when it is not one, whole and unaltered."""
    try:
        metadata, payloads = _parse(memoryview(data))
        meta = msgspec.json.decode(metadata["zsfl"], type=SpillMeta)
        crc = _checksum(metadata["zsfl"], payloads)
        if f"{crc:08x}" != metadata["crc32"]:
            raise SpillCorrupt(f"spill {meta.cid} of {meta.node}: its bytes do not match their checksum")
        return meta, load(bytes(data))
    except (KeyError, TypeError, ValueError, RecursionError, msgspec.MsgspecError, SafetensorError) as error:
        raise SpillCorrupt(f"not a whole spill: {type(error).__name__}: {error}") from error


def _parse(data: memoryview) -> tuple[dict[str, str], dict[str, memoryview]]:
    """Metadata, and the bytes of each tensor by name."""
    size = int.from_bytes(data[:8], "little")
    if not 2 <= size <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise SpillCorrupt(f"not a whole spill: header of {size} bytes in a file of {len(data)}")
    header = cast("dict[str, Any]", json.loads(bytes(data[8 : 8 + size])))
    metadata = cast("dict[str, str]", header.pop("__metadata__"))
    payload = data[8 + size :]
    slices: dict[str, memoryview] = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= len(payload):
            raise SpillCorrupt(f"not a whole spill: {name} lies outside the file")
        slices[name] = payload[begin:end]
    return metadata, slices


def _checksum(about: str, payloads: Mapping[str, memoryview]) -> int:
    crc = zlib.crc32(about.encode())
    for name in sorted(payloads):
        crc = zlib.crc32(payloads[name], zlib.crc32(name.encode(), crc))
    return crc


def _raw(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
