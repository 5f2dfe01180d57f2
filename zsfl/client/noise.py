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
from zsfl.keys.aside import written_aside
from zsfl.keys.secret import check_private
from zsfl.learning.privacy import Protection, normal
from zsfl.words import number_of

KEY_BYTES = 32


def noise_key(path: Path) -> bytes:
    """The key in this file, which is made if it is not there; a restarted client finds it again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            with written_aside(path, secrets.token_bytes(KEY_BYTES)) as aside, suppress(FileExistsError):
                os.link(aside, path)  # of two at once one wins
        check_private(path, "and so take the noise off again")
        key = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot keep the key of the noise in {path}: {error.strerror}; check that disk") from error
    if len(key) != KEY_BYTES:
        raise StorageError(
            f"{path} is no key: {len(key)} bytes instead of {KEY_BYTES}; remove it, to have a new one made"
        )
    return key


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
