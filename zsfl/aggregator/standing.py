"""What a run folder remembers of who aggregates, and for whom, and how a node comes to."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import msgspec

from zsfl.aggregator.run_folder import STANDING, RunFolder, to_disk
from zsfl.errors import StorageError


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What a run folder remembers of who aggregates."""

    holder: str
    """Identity of this folder."""
    origin: str = ""
    """Of the folder in which the run began."""
    epoch: int = 0
    """The last that it heard of."""
    aim: int = 0
    """The last for whose promises it asked as whoever leads: where it is later, most may have promised it by now."""
    led: bool = False
    """Whether the run was made here in that epoch."""
    shared: bool = False
    """Whether another may have taken over by now: there was one who stood by."""
    rounds: int = 0
    """How many the run was to have, as whoever was followed said; 0: not known."""
    holders: dict[str, tuple[int, ...]] = {}
    """Shards, by the key of the machine that holds them; none where no keys are used."""

    @classmethod
    def of(cls, folder: Path) -> Standing:
        """What was remembered, or a new identity. `StorageError` when it cannot be read."""
        try:
            return msgspec.json.decode((folder / STANDING).read_bytes(), type=cls)
        except FileNotFoundError:
            return cls(holder=secrets.token_hex(6))
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise StorageError(f"{folder / STANDING} cannot be read: {error}; restore it, or start anew") from error

    def keep(self, folder: Path) -> None:
        """Remember it, also over a loss of power: two aggregators of one epoch would make two histories."""
        aside = folder / f".{STANDING}.tmp"
        try:
            with aside.open("wb") as file:
                file.write(msgspec.json.encode(self))
                file.flush()
                os.fsync(file.fileno())
            aside.rename(folder / STANDING)
            to_disk(folder)
        except OSError as error:
            raise StorageError(f"cannot write {folder / STANDING}: {error.strerror}; make room there") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Elected:
    """That this node is to aggregate from now on."""

    is_behind: bool
    """Whether versions were published that it has not: they are made again."""
    known: int = 0
    """The newest version that clients knew of."""
    rounds: int
    """How many rounds the run was to have; 0: not known."""
    has_followed: bool
    """Whether somebody else aggregated since this node was started, and its clients may still be there."""


def what_is_kept(folder: RunFolder) -> str:
    """What becomes of a run whose aggregator was asked to leave, for people."""
    if not folder.commits():
        return "nothing was trained yet"
    again = f"the run is kept in {folder.path}: --run {folder.path.name} --resume goes on from there"
    return again + ", unless one that stands by has taken over" * Standing.of(folder.path).shared
