from __future__ import annotations

import gzip
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from zsfl.errors import ConfigError
from zsfl.learning import datasets
from zsfl.learning.pictures import Pictures

LABELS = np.array([3, 1, 2], dtype=np.uint8)
IMAGES = np.arange(3 * 28 * 28, dtype=np.int64).astype(np.uint8).reshape(3, 28, 28)


def _all(pictures: Pictures) -> tuple[torch.Tensor, ...]:
    """All images and labels, as training would see them."""
    return pictures.take(torch.arange(len(pictures))).tensors


def idx_images(images: np.ndarray = IMAGES) -> bytes:
    return struct.pack(">4I", 0x803, *images.shape) + images.tobytes()


def idx_labels(labels: np.ndarray = LABELS) -> bytes:
    return struct.pack(">2I", 0x801, len(labels)) + labels.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """MNIST in small: the training half plain, the test half packed."""
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_images())
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_labels())
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_images(IMAGES[:2])))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_labels(LABELS[:2])))
    return tmp_path


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    train, test = datasets.digits()
    images = torch.cat([train.tensors[0], test.tensors[0]])
    labels = torch.cat([train.tensors[1], test.tensors[1]])
    assert (len(train), len(test), images.dtype, labels.dtype) == (1437, 360, torch.float32, torch.int64)
    data, target = load_digits(return_X_y=True)
    mine = {(int(y), *(x * 16).int().tolist()) for x, y in zip(images, labels, strict=True)}
    assert mine == {(int(y), *x.astype(int)) for x, y in zip(data, target, strict=True)}
    assert torch.equal(datasets.digits()[0].tensors[0], train.tensors[0])


def test_digits_do_without_importing_scikit_learn() -> None:
    code = "import sys; from zsfl.learning.datasets import digits; digits(); print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_digits_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "zsfl\[demo\]"'):
        datasets.digits()


def test_idx_files_plain_and_packed(folder: Path) -> None:
    train, test = datasets.mnist(folder)
    x, y = _all(train)
    assert y.tolist() == [3, 1, 2]
    assert y.dtype == torch.int64
    expected = (torch.from_numpy(IMAGES).double() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(x, expected.unsqueeze(1).float())
    assert (len(test), _all(datasets.mnist(folder, flat=True)[0])[0].shape) == (2, (3, 784))


@pytest.mark.parametrize(("name", "read"), [("mnist", "mnist"), ("fashion-mnist", "fashion_mnist")])
def test_sub_folder_of_the_environments_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, read: str
) -> None:
    (folder / name).mkdir()
    for file in folder.glob("*ubyte*"):
        file.rename(folder / name / file.name)
    monkeypatch.setenv("ZSFL_DATA", str(folder))
    assert len(getattr(datasets, read)()[0]) == 3


def test_no_folder_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZSFL_DATA", raising=False)
    with pytest.raises(ConfigError, match="ZSFL_DATA"):
        datasets.mnist()


def test_folder_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"no data folder {tmp_path / 'none'}"):
        datasets.mnist(tmp_path / "none")


def test_file_missing_names_every_place_looked_at(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ConfigError, match="missing") as caught:
        datasets.mnist(folder)
    for place in (folder, folder / "mnist"):
        for ending in ("", ".gz"):
            assert f"{place}/t10k-labels-idx1-ubyte{ending}" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (idx_images()[:-5], "truncated: expected 2368 bytes .* found 2363"),
        (idx_images() + b"x", "too long: expected 2368 bytes .* found 2369"),
        (b"\0\0", "truncated: 2 bytes, not even its header of 16"),
        (idx_labels() + bytes(20), "begins with 0x00000801 instead of 0x00000803"),
        (idx_images(IMAGES[:2]), "2 images and .* has 3 labels"),
    ],
)
def test_damaged_files(folder: Path, content: bytes, said: str) -> None:
    (folder / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        datasets.mnist(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[:-9],
        lambda packed: b"no gzip" + packed,
        lambda packed: packed[:40] + b"\xff" * 40 + packed[80:],
    ],
)
def test_corrupt_gzip(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=rf"{path} cannot be read: .*fetch the file again"):
        datasets.mnist(folder)


def test_real_mnist() -> None:
    if not os.environ.get("ZSFL_DATA"):
        pytest.skip("no real MNIST: set ZSFL_DATA to the folder that holds it")
    train, test = datasets.mnist(flat=True)
    assert (len(train), len(test), _all(train)[0].shape[1]) == (60_000, 10_000, 784)
    assert _all(train)[0].mean().abs() < 1e-3
    assert (_all(train)[0].std() - 1).abs() < 1e-3
    assert _all(train)[1].bincount().tolist()[:3] == [5923, 6742, 5958]


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10 in small: two records a file, where a pixel is its plane's number times ten."""
    monkeypatch.setattr(datasets, "_CIFAR_RECORDS", 2)
    inner = tmp_path / "cifar-10-batches-bin"
    inner.mkdir()
    for number, name in enumerate([*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]):
        record = bytes([number]) + bytes(1024) + bytes([10]) * 1024 + bytes([20]) * 1024
        (inner / name).write_bytes(record * 2)
    return tmp_path


def test_cifar10(cifar: Path) -> None:
    train, test = datasets.cifar10(cifar)
    x, y = _all(train)
    assert y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert _all(test)[1].tolist() == [5, 5]
    assert x.shape == (10, 3, 32, 32)
    expected = [(0 - 0.4914) / 0.2470, (10 / 255 - 0.4822) / 0.2435, (20 / 255 - 0.4465) / 0.2616]
    torch.testing.assert_close(x[3, :, 7, 9], torch.tensor(expected))


def test_cifar10_truncated_and_missing(cifar: Path) -> None:
    path = cifar / "cifar-10-batches-bin" / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"data_batch_3.bin is truncated: expected 6146 bytes .* found 6145"):
        datasets.cifar10(cifar)
    path.unlink()
    with pytest.raises(ConfigError, match=f"looked for {cifar}/data_batch_3.bin, {path}"):
        datasets.cifar10(cifar)
