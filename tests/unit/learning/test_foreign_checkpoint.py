"""A checkpoint that came from elsewhere: whatever it says, it is restored or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fuzz.targets import TARGETS, _master, resealed

from zsfl.errors import StorageError

WRONG: dict[str, Any] = {
    "no description": lambda _: [],
    "no optimizer": lambda told: {**told, "optimizer": 3},
    "no learning rate": lambda told: {**told, "options": {"map": []}},
    "options that are none": lambda told: {**told, "options": 7},
    "a tensor that is not there": lambda told: {**told, "options": {"map": [["lr", {"tensor": 99}]]}},
    "a state that is none": lambda told: {**told, "state": dict.fromkeys(told["state"], 1.5)},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_wrong_description_with_the_right_digest_is_refused(tmp_path: Path, change: Any) -> None:
    for seed in TARGETS["checkpoint"].seeds():
        (tmp_path / "master.safetensors").write_bytes(resealed(seed, change))
        with pytest.raises(StorageError, match="is corrupt"):
            _master().restore(tmp_path)
