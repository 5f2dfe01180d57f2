"""Where a run stands on disk: what `--resume` goes on from."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from zsfl.errors import ConfigError, StorageError
from zsfl.ids import RunId, Version
from zsfl.learning.master import Master

_PLACE = "place.json"


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """The point between two rounds that a checkpoint was taken at."""

    run: RunId
    version: Version
    round: int
    """Rounds that are done."""
    samples: dict[int, int]
    """Training samples by shard: another division of the data would make other steps."""
    commit: str
    """Digest of the last commit record: the ledger goes on from it."""


def save(folder: Path, place: Place, master: Master) -> None:
    """Write a checkpoint beside the last one, then drop the last one."""
    new = folder / f"round-{place.round:06d}"
    aside = folder / "partial"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        master.save(aside)
        (aside / _PLACE).write_bytes(msgspec.json.encode(place))
        shutil.rmtree(new, ignore_errors=True)
        aside.rename(new)
        for old in folder.glob("round-*"):
            if old != new:
                shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"cannot write a checkpoint in {folder}: {error.strerror}; make room there") from error


def restore(folder: Path, master: Master) -> Place:
    """Bring `master` to the newest checkpoint; ConfigError when there is none."""
    found = sorted(folder.glob("round-*"))
    if not found:
        raise ConfigError(
            f"there is no checkpoint in {folder}: the run ended before its first round did; start it anew"
        )
    try:
        place = msgspec.json.decode((found[-1] / _PLACE).read_bytes(), type=Place)
    except (OSError, msgspec.MsgspecError) as error:
        raise StorageError(f"{found[-1] / _PLACE} cannot be read: {error}; start the run anew") from error
    master.restore(found[-1])
    return place
