"""Reading published datasets from their own files. Nothing is downloaded."""

from __future__ import annotations

import gzip
import importlib.util
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from zsfl.errors import ConfigError
from zsfl.learning.pictures import Pictures

_DIGITS_TRAIN = 1437
_IDX_MAGIC = {1: 0x801, 3: 0x803}
"""Unsigned bytes in one dimension (labels) and in three (images)."""
_CIFAR_RECORDS = 10_000
_CIFAR_RECORD_BYTES = 1 + 3 * 32 * 32
_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's 8x8 digits: float32 [N, 64] in 0..1 and labels, 1437 to train and 360 held out."""
    # Found and read without importing scikit-learn, which takes a second.
    spec = importlib.util.find_spec("sklearn")
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0]) / "datasets" / "data" / "digits.csv.gz" if folders else None
    if path is None or not path.exists():
        raise ConfigError('the digits come with scikit-learn, which is not installed: pip install "zsfl[demo]"')
    text = _bytes(path).decode("ascii")
    table = torch.from_numpy(np.loadtxt(text.splitlines(), delimiter=",", dtype=np.float32))
    images, labels = table[:, :-1] / 16, table[:, -1].long()
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    train, test = order[:_DIGITS_TRAIN], order[_DIGITS_TRAIN:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def mnist(folder: str | Path | None = None, flat: bool = False) -> tuple[Pictures, Pictures]:
    """MNIST from its four IDX files: normalised float32 [N, 1, 28, 28] (flat: [N, 784]) and labels.

    The files, plain or .gz, are in `folder` (default: the environment's ZSFL_DATA) or in its `mnist`.
    """
    return _idx_dataset(_folders(folder, "mnist"), 0.1307, 0.3081, flat)


def fashion_mnist(folder: str | Path | None = None, flat: bool = False) -> tuple[Pictures, Pictures]:
    """Fashion-MNIST, as `mnist`; the sub-folder is `fashion-mnist`."""
    return _idx_dataset(_folders(folder, "fashion-mnist"), 0.2860, 0.3530, flat)


def cifar10(folder: str | Path | None = None) -> tuple[Pictures, Pictures]:
    """CIFAR-10 from its binary version: normalised float32 [N, 3, 32, 32] and labels.

    The files are in `folder` (default: the environment's ZSFL_DATA) or in its `cifar-10-batches-bin`.
    """
    folders = _folders(folder, "cifar-10-batches-bin")
    parts = [_cifar(_find(folders, f"data_batch_{number}.bin")) for number in range(1, 6)]
    train = torch.cat([pixels for pixels, _ in parts]), torch.cat([labels for _, labels in parts])
    test = _cifar(_find(folders, "test_batch.bin"))
    return Pictures(*train, mean=_CIFAR_MEAN, std=_CIFAR_STD), Pictures(*test, mean=_CIFAR_MEAN, std=_CIFAR_STD)


def _folders(folder: str | Path | None, name: str) -> list[Path]:
    """Where files may lie: the folder itself and its sub-folder `name`."""
    given = folder if folder is not None else os.environ.get("ZSFL_DATA")
    if not given:
        raise ConfigError(f"no folder for {name}: name it, or set the environment variable ZSFL_DATA")
    path = Path(given).expanduser()
    if not path.is_dir():
        raise ConfigError(f"there is no data folder {path.absolute()}: check the path, or set ZSFL_DATA")
    return [path, path / name]


def _find(folders: list[Path], *names: str) -> Path:
    """The first of `names` that is there, in the first folder that has one."""
    places = [folder / name for folder in folders for name in names]
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(str(place) for place in places)
    raise ConfigError(f"a file of the dataset is missing: looked for {looked}; put it at one of these places")


def _bytes(path: Path) -> bytes:
    """The content of a file, unpacked when its name ends in .gz."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} cannot be read: {error}; fetch the file again") from error


def _idx_dataset(folders: list[Path], mean: float, std: float, flat: bool) -> tuple[Pictures, Pictures]:
    """Training and test data of four IDX files with MNIST's names."""

    def half(prefix: str) -> Pictures:
        images_path, labels_path = (
            _find(folders, name, f"{name}.gz")
            for name in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
        )
        images, labels = _idx(images_path, 3), _idx(labels_path, 1)
        if len(images) != len(labels):
            raise ConfigError(
                f"{images_path} has {len(images)} images and {labels_path} has {len(labels)} labels: these "
                "files do not belong together; fetch them again"
            )
        return Pictures(images.unsqueeze(1), labels.long(), mean=[mean], std=[std], flat=flat)

    return half("train"), half("t10k")


def _idx(path: Path, dims: int) -> Tensor:
    """The uint8 array of one IDX file (format: a magic number, each dimension, the bytes; big-endian)."""
    content = _bytes(path)
    header_bytes = 4 * (1 + dims)
    if len(content) < header_bytes:
        raise ConfigError(f"{path} is truncated: {len(content)} bytes, not even its header of {header_bytes}")
    magic, *shape = struct.unpack_from(f">{1 + dims}I", content)
    if magic != _IDX_MAGIC[dims]:
        raise ConfigError(
            f"{path} is no IDX file of {'images' if dims == 3 else 'labels'}: it begins with {magic:#010x} "
            f"instead of {_IDX_MAGIC[dims]:#010x}; fetch the file again"
        )
    _check_size(path, len(content), header_bytes + math.prod(shape))
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header_bytes).reshape(shape)


def _cifar(path: Path) -> tuple[Tensor, Tensor]:
    """uint8 images and labels of one binary CIFAR-10 file: records of a label and three planes of 32x32."""
    content = _bytes(path)
    _check_size(path, len(content), _CIFAR_RECORDS * _CIFAR_RECORD_BYTES)
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, _CIFAR_RECORD_BYTES)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()


def _check_size(path: Path, actual_bytes: int, expected_bytes: int) -> None:
    if actual_bytes != expected_bytes:
        what = "truncated" if actual_bytes < expected_bytes else "too long"
        raise ConfigError(
            f"{path} is {what}: expected {expected_bytes} bytes (unpacked), found {actual_bytes}; fetch the file again"
        )
