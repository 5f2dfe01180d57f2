"""Where a run stands on disk: what `--resume` goes on from."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from zsfl.aggregator.journal import Journal
from zsfl.aggregator.run_folder import RunFolder, to_disk
from zsfl.errors import ConfigError, StorageError
from zsfl.ids import Version
from zsfl.learning.cuts import Cuts
from zsfl.learning.job import Job
from zsfl.learning.master import Master, saved_state
from zsfl.learning.modes import max_staleness
from zsfl.reports import RoundReport

_PLACE = "place.json"
MOST_KEPT = 32
"""Checkpoints; of more, every other one goes."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """The point between two rounds that a checkpoint was taken at."""

    version: Version
    round: int
    """Rounds that are done."""
    run: str = ""
    """Of whose steps it is; empty where the steps that peers may still hold are no good."""
    facts: dict[str, str]
    """Of the job, without what may change: with other ones, the same versions would be other steps."""
    samples: dict[int, int]
    """Training samples by shard: another division of the data would make other steps."""
    memory: dict[str, Any]
    """What the mode's rules remember: shares of the clients, their speeds."""
    untested: RoundReport | None
    """The report of this round while its held-out test is not over."""
    commit: str
    """Digest of the last commit record: the ledger goes on from it."""


class Progress:
    """Keeps how far a run got in its folder. Everything here blocks on the disk."""

    def __init__(
        self, folder: RunFolder, job: Job, cuts: Cuts, master: Master, journal: Journal, *, syncs: bool = False
    ) -> None:
        """With `syncs` a checkpoint outlasts a loss of power."""
        self._folder = folder
        self._syncs = syncs
        self._journal = journal
        self._bound = max_staleness(job.how)
        self._model = cuts.first
        self._master = master
        self._facts = {name: fact for name, fact in job.facts(cuts).items() if name not in ("optimizer", "codec")}

    def keep_model(self, state: Mapping[str, Tensor]) -> None:
        """Replace the run's model by the one with these weights."""
        self._folder.write_model(self._model.merged_state(state), self._model.load_lines())

    @property
    def facts(self) -> dict[str, str]:
        """Of the job: what a checkpoint must agree with."""
        return self._facts

    def keep_best(self, state: Mapping[str, Tensor]) -> None:
        """Replace the best model by the one with these weights."""
        self._folder.write_best(self._model.merged_state(state))

    def save(self, place: Place) -> None:
        """Write a checkpoint beside the others: which of them are good is known once they are tested."""
        folder = self._folder.checkpoint_path
        new = folder / f"round-{place.round:06d}"
        aside = folder / "partial"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            self._master.save(aside)
            (aside / _PLACE).write_bytes(msgspec.json.encode(place))
            if self._syncs:
                for path in (*aside.iterdir(), aside):
                    to_disk(path)
            shutil.rmtree(new, ignore_errors=True)
            aside.rename(new)
            if self._syncs:
                to_disk(folder)
        except OSError as error:
            what = f"cannot write a checkpoint in {folder}: {error.strerror}"
            raise StorageError(f"{what}; make room there or choose another folder") from error

    def rename_run(self, place: Place, run: str) -> None:
        """From this checkpoint on the run has another id, as what was made after it is lost in part."""
        path = self._folder.checkpoint_path / f"round-{place.round:06d}" / _PLACE
        aside = path.with_suffix(".tmp")
        try:
            aside.write_bytes(msgspec.json.encode(msgspec.structs.replace(place, run=run)))
            aside.rename(path)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}; make room there") from error

    def begin_another(self) -> None:
        """Whoever resumes from the newest checkpoint begins another run, without the steps that peers hold."""
        if found := self._checkpoints():
            self.rename_run(place_of(found[-1]), "")

    def keep_from(self, round_: int, room_bytes: int) -> None:
        """The checkpoint of this round is good, and what is older for audits alone: of that, the newest is kept that
        takes no more than `room_bytes`.
        """
        found = [path for path in self._checkpoints() if _round(path) <= round_]
        if len(found) > MOST_KEPT:  # with the journal, those between are a matter of how long a replay takes
            for path in found[1:-1:2]:
                with suppress(OSError):
                    drop(path)
            found = [found[0], *found[2:-1:2], found[-1]]
        versions, sizes = [place_of(path).version for path in found], self._journal.sizes()
        held = [_size_bytes(path) for path in found[:-1]]
        used = sum(held) + sum(size for version, size in sizes.items() if versions[0] <= version < versions[-1])
        while len(found) > 1 and used > room_bytes:
            used -= held.pop(0) + sum(size for one, size in sizes.items() if versions[0] <= one < versions[1])
            with suppress(OSError):
                drop(found.pop(0))
            versions.pop(0)
        self._journal.drop_before(max(0, versions[0] - self._bound))

    def keep_to(self, version: Version) -> None:
        """Weights after this version were not shown to be any good: drop their checkpoints."""
        for path in self._checkpoints():
            if place_of(path).version > version:
                with suppress(OSError):
                    drop(path)

    def _checkpoints(self) -> list[Path]:
        """Oldest first."""
        return checkpoints(self._folder.checkpoint_path)

    def untested(self, done: Collection[int], last: int) -> list[tuple[RoundReport, Version, dict[str, Tensor]]]:
        """Of rounds up to the `last` that are not `done`, as their test was not: report, and what is to be tested."""
        places = [(place_of(path), path) for path in self._checkpoints()]
        return [
            (place.untested, place.version, saved_state(path))
            for place, path in places
            if place.untested is not None and place.round <= last and place.round not in done
        ]

    def restore(self) -> Place:
        """Bring the master to the newest checkpoint; ConfigError when there is none, or it is of another job."""
        folder = self._folder.checkpoint_path
        found = self._checkpoints()
        if not found:
            raise ConfigError(
                f"there is no checkpoint in {folder}: the run ended before its first round did; start it anew"
            )
        while True:
            try:
                place = place_of(found[-1])
                self._check(place.facts)
                self._master.restore(found[-1])
            except StorageError:
                if len(found) == 1:
                    raise
                found.pop()  # the journal leads from an older one to the same version
            else:
                return place

    def _check(self, before: Mapping[str, str]) -> None:
        """ConfigError, saying what differs, when the run began with other facts."""
        now = self._facts
        differ = [
            f"{name} was {before.get(name)} and is {now.get(name)}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if differ:
            raise ConfigError(f"the job has changed since the run began: {'; '.join(differ)}. Resume it unchanged")


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    # Not by `glob`, which finds nothing where the folder cannot be read.
    found: list[Path] = []
    with suppress(FileNotFoundError, NotADirectoryError):  # whoever writes there says so
        found += folder.iterdir()
    return sorted(path for path in found if path.name.startswith("round-") and path.name[6:].isdecimal())


def drop(checkpoint: Path) -> None:
    """It is there whole, or not at all; what a killed process left of another one goes, too."""
    dropped = checkpoint.with_name("dropped")
    shutil.rmtree(dropped, ignore_errors=True)
    checkpoint.rename(dropped)
    shutil.rmtree(dropped, ignore_errors=True)


def _round(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("round-"))


def _size_bytes(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.iterdir())


def place_of(checkpoint: Path) -> Place:
    """What point a checkpoint was taken at; `StorageError` when that cannot be read."""
    try:
        return msgspec.json.decode((checkpoint / _PLACE).read_bytes(), type=Place)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StorageError(
            f"{checkpoint / _PLACE} cannot be read: {error}; remove that folder, or start anew"
        ) from error
