"""The noise on one client's activations: of its own key, so that no other node can take it off again."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from zsfl.errors import ConfigError, StorageError
from zsfl.ids import Cid, parse_cid
from zsfl.learning.privacy import Protection, normal
from zsfl.words import number_of

KEY_BYTES = 32


def noise_key(path: Path) -> bytes:
    """The key in this file, which is made if it is not there; a restarted client finds it again."""
    try:
        with suppress(FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _make(path)
        key = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot keep the key of the noise in {path}: {error.strerror}; check that disk") from error
    if len(key) != KEY_BYTES:
        raise StorageError(
            f"{path} is no key: {len(key)} bytes instead of {KEY_BYTES}; remove it, to have a new one made"
        )
    return key


def _make(path: Path) -> None:
    """Whole or not at all, and once, whoever else tries."""
    if path.exists():
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(KEY_BYTES))
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)
    finally:
        temporary.unlink()


class Noise:
    """What one client adds. A step that is made again gets the same noise, as long as its activations are the same."""

    def __init__(self, protection: Protection, key: bytes) -> None:
        self._protection = protection
        self._key = key

    def on(self, activations: Tensor, cid: Cid, seed: int, samples: int) -> Tensor:
        """The protected activations of a step of this name, with its seed and so many samples."""
        if not activations.is_floating_point() or activations.shape[:1] != (samples,):
            raise ConfigError(
                f"the job protects activations, and its head gives {activations.dtype} {list(activations.shape)} for "
                f"{number_of(samples, 'sample')}: it must give one row of floating point numbers for each"
            )
        return self._protection.apply(activations, self._stream(activations.detach(), cid, seed))

    def _stream(self, activations: Tensor, cid: Cid, seed: int) -> Callable[[int], Tensor]:
        """Noise of its own for whatever is released: of two releases with the same noise one could take it off."""
        if not self._protection.secret:
            return lambda count: normal(b"%d" % seed, count)
        held = activations.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        content = hashlib.sha256(held.data).digest()
        step = b"%s/%d/" % (parse_cid(cid).run.encode(), seed)  # the same where a window is asked for anew
        key = hmac.digest(self._key, step + content, "sha256")
        return lambda count: normal(key, count)
