"""What a spill looks like: a safetensors file that anybody can open.

Tensors are named `grad/NAME` (sums of per-sample gradients) and `buffer/NAME` (buffers as the step left them).
The metadata says whose contribution it is, and carries a CRC-32 over itself and every tensor. The
stored bytes are the message: they travel as they are and are verified wherever they arrive.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from zsfl.errors import BadShape, SpillCorrupt
from zsfl.ids import Cid, PartName, Version, parse_cid

MAX_HEADER_BYTES = 1 << 20
"""Of the safetensors header: some thousands of tensors."""


class SpillMeta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose contribution a spill holds."""

    cid: Annotated[Cid, msgspec.Meta(max_length=64)]
    part: PartName
    version: Version
    n: Annotated[float, msgspec.Meta(ge=0)]
    """Weight sum of the batch: what the averaged gradient is divided by."""
    samples: Annotated[int, msgspec.Meta(ge=0)]
    loss_sum: float | None
    """Sum of the loss over the batch, times its weight; None from a party that does not see the loss."""
    client: str
    node: str
    """Name of the node that wrote it."""


def encode(meta: SpillMeta, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The bytes of one spill."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = json.dumps(msgspec.to_builtins(meta))  # msgspec's own JSON would make null of a loss that is NaN
    return save(stored, metadata={"zsfl": about, "crc32": _checksum(about, stored)})


def decode(data: bytes | bytearray | memoryview) -> tuple[SpillMeta, dict[str, torch.Tensor]]:
    """Meta and tensors of the spill in `data`; SpillCorrupt when it is not one, whole and unaltered."""
    try:
        metadata = _metadata(memoryview(data))
        tensors = load(bytes(data))
        if _checksum(metadata["zsfl"], tensors) != metadata["crc32"]:
            raise SpillCorrupt("not a whole spill: its bytes do not match their checksum")
        meta = msgspec.convert(json.loads(metadata["zsfl"]), SpillMeta)
        if parse_cid(meta.cid).version != meta.version:
            raise SpillCorrupt(f"step {meta.cid} cannot be of version {meta.version}")
        return meta, tensors
    except (BadShape, AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise SpillCorrupt(f"not a whole spill: {type(error).__name__}: {error}") from error
    except (msgspec.MsgspecError, SafetensorError) as error:
        raise SpillCorrupt(f"not a whole spill: {error}") from error


def _metadata(data: memoryview) -> dict[str, Any]:
    """What the safetensors header says beside the tensors."""
    size = int.from_bytes(data[:8], "little")
    if not 2 <= size <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise SpillCorrupt(f"not a whole spill: header of {size} bytes in a file of {len(data)}")
    return json.loads(bytes(data[8 : 8 + size]))["__metadata__"]


def _checksum(about: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Over the metadata, and name, dtype, shape and bytes of every tensor."""
    crc = zlib.crc32(about.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        if tensor.numel():
            crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
