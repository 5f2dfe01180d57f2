"""Where a run stands on disk: what `--resume` goes on from."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

import msgspec
from torch import Tensor

from zsfl.aggregator.run_folder import RunFolder
from zsfl.errors import ConfigError, StorageError
from zsfl.ids import Version
from zsfl.learning.job import Job
from zsfl.learning.master import Master
from zsfl.learning.model import SplitModel

_PLACE = "place.json"


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """The point between two rounds that a checkpoint was taken at."""

    version: Version
    round: int
    """Rounds that are done."""
    facts: dict[str, str]
    """Of the job, without what may change: with other ones, the same versions would be other steps."""
    samples: dict[int, int]
    """Training samples by shard: another division of the data would make other steps."""
    commit: str
    """Digest of the last commit record: the ledger goes on from it."""


class Progress:
    """Keeps how far a run got in its folder. Everything here blocks on the disk."""

    def __init__(self, folder: RunFolder, job: Job, model: SplitModel, master: Master) -> None:
        self._folder = folder
        self._model = model
        self._master = master
        self._facts = {name: fact for name, fact in job.facts(model).items() if name not in ("optimizer", "codec")}

    def keep_model(self, state: Mapping[str, Tensor]) -> None:
        """Replace the run's model by the one with these weights."""
        self._folder.write_model(self._model.merged_state(state), self._model.load_lines())

    def save(self, version: Version, round_: int, samples: Mapping[int, int], commit: str) -> None:
        """Write a checkpoint beside the last one, then drop the last one."""
        place = Place(version=version, round=round_, facts=self._facts, samples=dict(samples), commit=commit)
        folder = self._folder.checkpoint_path
        new = folder / f"round-{round_:06d}"
        aside = folder / "partial"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            self._master.save(aside)
            (aside / _PLACE).write_bytes(msgspec.json.encode(place))
            shutil.rmtree(new, ignore_errors=True)
            aside.rename(new)
            for old in folder.glob("round-*"):
                if old != new:
                    shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise StorageError(f"cannot write a checkpoint in {folder}: {error.strerror}; make room there") from error

    def restore(self) -> Place:
        """Bring the master to the newest checkpoint; ConfigError when there is none, or it is of another job."""
        folder = self._folder.checkpoint_path
        found = sorted(folder.glob("round-*"))
        if not found:
            raise ConfigError(
                f"there is no checkpoint in {folder}: the run ended before its first round did; start it anew"
            )
        try:
            place = msgspec.json.decode((found[-1] / _PLACE).read_bytes(), type=Place)
        except (OSError, msgspec.MsgspecError) as error:
            raise StorageError(f"{found[-1] / _PLACE} cannot be read: {error}; start the run anew") from error
        self._master.restore(found[-1])
        self._check(place.facts)
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
