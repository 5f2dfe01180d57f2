"""The metrics of all nodes of a cluster, at one address."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from zsfl.reports import AnyReport, Note
from zsfl.settings import NodeSettings

if TYPE_CHECKING:
    from zsfl.dashboard.metering import ClusterMetrics


class Metered:
    """Serves them from `open` to `close`, where the settings ask for it."""

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._served: ClusterMetrics | None = None

    async def open(self, report: Callable[[AnyReport], None]) -> None:
        """Begin; `report` is told where. ConfigError where that cannot be."""
        if self._settings.metrics:
            from zsfl.dashboard.metering import ClusterMetrics

            self._served = ClusterMetrics(self._settings)
            report(Note(message=await asyncio.to_thread(self._served.open)))

    def tell(self, report: AnyReport) -> None:
        """What the nodes report."""
        if self._served is not None:
            self._served.tell(report)

    async def close(self) -> None:
        """End."""
        if self._served is not None:
            await asyncio.to_thread(self._served.close)
