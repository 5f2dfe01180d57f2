"""What a run leaves of each round: model and checkpoint; of one that failed the last good version. In its folder, and
where the settings ask for it in a store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from zsfl.aggregator.progress import Place, Progress
from zsfl.aggregator.roster import Roster
from zsfl.aggregator.run_folder import RunFolder
from zsfl.aggregator.stage import Stage
from zsfl.aggregator.stored_run import StoredRun
from zsfl.aggregator.training import Training
from zsfl.errors import Fenced, StorageError, StoreAway
from zsfl.latest import Latest
from zsfl.node import Node
from zsfl.reports import Failed, RoundReport


class Keeping:
    """Keeps what a run leaves."""

    def __init__(
        self,
        node: Node,
        folder: RunFolder,
        progress: Progress,
        training: Training,
        stage: Stage,
        roster: Latest[Roster],
        stored: StoredRun | None,
    ) -> None:
        self._node = node
        self._folder = folder
        self._progress = progress
        self._training = training
        self._stage = stage
        self._roster = roster
        self._stored = stored
        training.ledger.elsewhere = stored

    async def run(self) -> None:
        """Keep in the store what comes to be in the folder; never ends."""
        if self._stored is not None:
            await self._stored.run()
        await asyncio.Event().wait()

    async def begin(self, *, is_new: bool) -> None:
        """The run begins, or goes on. Nothing of a new one is lost yet, and whoever starts a run is there to hear of
        it, so that a disk which refuses is not waited for.
        """
        if is_new:
            try:
                self.of_round(None)()
            except StorageError as error:
                raise StorageError(f"the run cannot begin: {error} with --runs") from error
        if self._stored is not None:
            await self._stored.settle()

    def of_round(self, report: RoundReport | None) -> Callable[[], None]:
        """Writes model and checkpoint of the round that has just ended, or of what the run begins with; blocking.

        To be called before the next version is made. What else changes until then is taken as it is now.
        """
        training, (_, state) = self._training, self._training.newest
        place = Place(
            run=self._stage.run,
            version=training.version,
            round=training.round,
            facts=self._progress.facts,
            samples=dict(self._roster.value.samples()),
            commit=training.ledger.last,
            memory=training.rules.state(),
            untested=report,
        )

        def keep() -> None:
            if report is not None:
                self._progress.keep_model(state)
            self._progress.save(place)
            if report is not None and self._stored is not None:
                self._stored.checkpointed()

        return keep

    async def end(self) -> None:
        """The run has done what was asked for."""
        if self._stored is not None:
            await self._stored.finish()

    async def fail(self, error: Exception) -> bool:
        """The run failed: keep its last good version, and none after that; whether that can be gone on with."""
        version, state = self._training.newest
        is_kept = version > 0  # the ledger has it, whatever else can be written
        with suppress(StorageError, Fenced):
            self._progress.keep_model(state)
            is_kept = True
            self._progress.keep_to(version)
            self._training.cut_after(version, self._progress.begin_another)
            self._folder.append_metrics(Failed(node=self._node.name, kind=type(error).__name__, message=str(error)))
            self._folder.write_plot()
            if self._stored is not None and not isinstance(error, StoreAway):
                await self._stored.settle()
                await self._stored.finish()
        return is_kept

    def close(self) -> None:
        """Nothing more is kept."""
        self._training.journal.close()
        if self._stored is not None:
            self._stored.close()
