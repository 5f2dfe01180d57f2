"""What the folders of runs say, without the job and without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from zsfl.errors import ConfigError, StorageError, ZsflError
from zsfl.locks import is_locked
from zsfl.reports import Failed, Finished, RoundReport, Tested, reports_in

SETTINGS, LEDGER = "settings.json", "ledger.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run, as its folder has it."""

    folder: Path
    settings: Mapping[str, Any]
    """As settings.json has them: `job`, `node`, `versions`."""
    rounds: Sequence[RoundReport]
    """That are done; of one that was made again, the last."""
    tests: Sequence[Tested]
    end: Finished | Failed | None
    """How it ended, when it did last."""
    versions: int
    """Commit records."""
    is_on: bool
    """Whether some process works on it."""
    job: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.name

    @property
    def state(self) -> str:
        """In a word."""
        if self.is_on:
            return "running"
        match self.end:
            case Finished():
                return "finished"
            case Failed():
                return "failed"
            case None:
                return "stopped" if self.rounds else "begun"

    @property
    def planned(self) -> int:
        """Rounds that it was to have."""
        stated = self.job.get("rounds")
        return self.rounds[-1].rounds if self.rounds else stated if isinstance(stated, int) else 0

    @property
    def tested(self) -> RoundReport | None:
        """The last round with an accuracy."""
        return next((one for one in reversed(self.rounds) if one.accuracy is not None), None)

    @property
    def accuracy(self) -> float | None:
        """Of the last round that was tested."""
        return self.tested and self.tested.accuracy

    @property
    def without(self) -> frozenset[str]:
        """Clients whose samples are not in all of `accuracy` and `best`."""
        return frozenset(name for one in (self.tested, self.best) if one for name in one.without)

    @property
    def best(self) -> Tested | None:
        """The test with the best accuracy."""
        tested = [one for one in self.tests if one.accuracy is not None]
        return max(tested, key=lambda one: one.accuracy or 0.0, default=None)

    @property
    def seconds(self) -> float:
        """Of training, all rounds together."""
        return sum(one.seconds for one in self.rounds)

    @property
    def bytes_sent(self) -> int:
        """Over all nodes and rounds."""
        return sum(one.bytes_sent for one in self.rounds)

    @property
    def steps(self) -> int:
        """Over all rounds."""
        return sum(one.steps for one in self.rounds)


def read_run(folder: str | Path) -> Run:
    """What a folder says; ConfigError when it is no run's, StorageError when it cannot be read."""
    folder = Path(folder)
    if not (folder / SETTINGS).is_file():
        raise ConfigError(f"{folder} is no folder of a run: name one, such as runs/mnist")
    try:
        settings = json.loads((folder / SETTINGS).read_bytes())
        reports = reports_in(folder)
        versions = (folder / LEDGER).read_bytes().count(b"\n") if (folder / LEDGER).exists() else 0
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read the run in {folder}: {error}") from error
    job = cast("dict[str, Any]", settings).get("job") if isinstance(settings, dict) else None
    if not isinstance(job, dict):
        raise StorageError(f"{folder / SETTINGS} is not as a run writes it")
    rounds = {one.round: one for one in reports if isinstance(one, RoundReport)}
    ends = [one for one in reports if isinstance(one, Finished | Failed)]
    later = bool(reports) and reports[-1] not in ends[-1:]  # it was taken up again
    return Run(
        folder=folder,
        settings=cast("dict[str, Any]", settings),
        rounds=[rounds[number] for number in sorted(rounds)],
        tests=[one for one in reports if isinstance(one, Tested)],
        end=None if later or not ends else ends[-1],
        versions=versions,
        is_on=is_locked(folder),
        job=cast("dict[str, Any]", job),
    )


def all_runs(runs: Path) -> list[Run]:
    """All that can be read, the newest last."""
    folders = [path.parent for path in runs.glob(f"*/{SETTINGS}")]
    found: list[Run] = []
    for folder in sorted(folders, key=lambda folder: (folder / SETTINGS).stat().st_mtime):
        with suppress(ZsflError):
            found.append(read_run(folder))
    return found


def find_run(named: str | None, runs: Path) -> Path:
    """The folder of a run that is named by its folder or its name; with none, of the newest in `runs`."""
    if named is None:
        found = sorted(runs.glob(f"*/{SETTINGS}"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise ConfigError(f"there is no run in {runs}: name the folder of one, such as runs/mnist")
        return found[-1].parent
    for folder in (Path(named), runs / named):
        if any((folder / name).is_file() for name in (SETTINGS, LEDGER)):  # whoever stands by keeps no settings
            return folder
    others = ", ".join(sorted(path.parent.name for path in runs.glob(f"*/{SETTINGS}"))[:20]) or "none"
    raise ConfigError(f"there is no run {named}: {runs} has {others}")
