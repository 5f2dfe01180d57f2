"""Which run an aggregator begins or goes on with, and what its folder says of that."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from zsfl.aggregator.run_folder import RunFolder
from zsfl.aggregator.standing import Elected, Standing
from zsfl.aggregator.stored_restore import Stored, look, restore
from zsfl.aggregator.stored_run import StoredRun
from zsfl.errors import ConfigError
from zsfl.learning.job import Job
from zsfl.learning.modes import max_staleness
from zsfl.node import Node
from zsfl.reports import Note
from zsfl.settings import NodeSettings
from zsfl.spill.shared import Shared, opened
from zsfl.words import number_of

NOT_ONCE = (
    "cannot keep two from writing the same: of two aggregators that go on with one run at the same time both may "
    "record a version, so see to it that there is one at most, or use a store that can"
)


class Opening:
    """Has a run's folder and what a store has of the run agree, before somebody aggregates it.

    Where the settings keep it in its folder alone there is nothing to do.
    """

    def __init__(self, settings: NodeSettings, job: Job, load_lines: str) -> None:
        """ConfigError where the settings name no store, or one that cannot be opened; nothing is asked of it yet."""
        self._settings = settings
        self._bound = max_staleness(job.how)
        self._load_lines = load_lines
        self.is_kept = settings.durability == "store"
        """Whether a store has the run, too."""
        if self.is_kept and not settings.spill:
            raise ConfigError("durability is store, and no store is named: name one with --spill")
        self._there: Stored | None = None
        """What the store had of the run when it was looked last: with that the folder agrees."""
        self._place = f"{job.name}/runs/{settings.run or job.name}"

    def _open(self) -> Shared:
        files, root = opened(self._settings)
        url, deadline_s = self._settings.spill, self._settings.request_s / 2
        return Shared(files, f"{root}/{self._place}", url, deadline_s, "the run")

    async def begin_or_go_on(self, folder: RunFolder) -> Sequence[Note]:
        """Have in the folder what the store has, where a run may begin there or be gone on with; what to say of it.

        ConfigError where it may not, or where there is nothing to resume.
        """
        if not self.is_kept:
            return ()
        store, settings, notes = self._open(), self._settings, list[tuple[str, str]]()
        try:
            if not await store.creates_once():
                notes.append((f"{store.url} {NOT_ONCE}", "warning"))
            there = self._there = await look(store)
            if there is None and folder.is_new and settings.resume and not settings.service:
                raise ConfigError(f"there is no run {folder.path} to resume, nor one of that name in {store.url}")
            if not (settings.resume or settings.service or (there is None and folder.is_new)):
                where = folder.path if there is None else store.url
                raise ConfigError(
                    f"a run {folder.path.name} is in {where} already: go on with it by --resume, or give this one "
                    "another name with --run"
                )
            if there is not None and (came := await self._restore(store, there, folder)):
                notes.append((came, "info"))
                folder.is_new = False
        finally:
            store.close()
        return [Note(node=settings.name, message=message, level=level) for message, level in notes]

    async def stored(
        self, node: Node, folder: RunFolder, elected: Elected | None
    ) -> tuple[StoredRun | None, Elected | None]:
        """The run in the store, for whoever aggregates it from now on; one who stood by gets first what it lacks."""
        if not self.is_kept:
            return None, elected
        store = self._open()
        if elected is not None and (there := await node.until_written(lambda: look(store))) is not None:
            if came := await node.until_written(lambda: self._restore(store, there, folder)):
                node.note(came)
            self._there, elected = there, dataclasses.replace(elected, is_behind=elected.known > there.version)
        return StoredRun(store, node, folder.path, self._bound, self._there), elected

    async def _restore(self, store: Shared, there: Stored, folder: RunFolder) -> str:
        return await restore(store, there, folder.path, self._bound, lambda: folder.write_loader(self._load_lines))


def done(folder: RunFolder, settings: NodeSettings, job: Job) -> str | None:
    """That nothing is left to do in this folder, for people; None when there is."""
    finished, wanted = folder.finished(), settings.rounds or Standing.of(folder.path).rounds or job.rounds
    if finished is None or settings.hold or not (finished.early or finished.rounds >= wanted):
        return None
    return (
        f"the run in {folder.path} is finished, with {number_of(finished.rounds, 'round')}: nothing is left to do. Ask "
        "for more with --rounds, or name another run with --run"
    )


def describe(job: Job, settings: NodeSettings, facts: Mapping[str, str]) -> dict[str, object]:
    """What a run was started with, for its folder."""
    shown_job: dict[str, object] = dict(facts)
    plain = ("batch_size", "rounds", "shards", "seed", "shuffle", "steps", "local_lr", "evaluate_every", "stop_after")
    shown_job |= {name: getattr(job, name) for name in plain}
    shown_job |= {"optimizer": repr(job.optimizer), "batches": repr(job.batches).strip("'")}
    shown = {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(settings).items()
    }
    versions = {"zsfl": version("zsfl"), "torch": str(torch.__version__), "python": platform.python_version()}
    return {"job": shown_job, "node": shown, "versions": versions}
