"""A training that goes on for as long as a test looks at it."""

from __future__ import annotations

from collections.abc import Callable

import zsfl


class Rounds:
    """The rounds of a cluster, in order; those that nobody looked at yet wait."""

    def __init__(self, cluster: zsfl.LocalCluster) -> None:
        self._reports = cluster.train(100_000)

    async def until(self, true: Callable[[zsfl.RoundReport], bool]) -> list[zsfl.RoundReport]:
        """The next rounds, up to the first for which it is `true`."""
        reports = [await anext(self._reports)]
        while not true(reports[-1]):
            reports.append(await anext(self._reports))
        return reports

    async def until_with(self, client: str) -> None:
        """Until a round has steps of this client."""
        await self.until(lambda report: client in report.serving)
