"""A node whose metrics are served while it is there, where its settings ask for it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from zsfl.reports import AnyReport, Note, Ready
from zsfl.settings import NodeSettings
from zsfl.wire.messages import Beat


@dataclass(frozen=True, slots=True)
class Metered:
    """Who is to be told of the node."""

    tell: Callable[[AnyReport], None]
    beat: Callable[[Beat], None] = lambda _: None
    rest: Callable[[], None] = lambda: None
    """That its run is over, and it only stays."""


@contextmanager
def metered(settings: NodeSettings, report: Callable[[AnyReport], None]) -> Generator[Metered, None, None]:
    """Meanwhile they are served, if they are to be; reports are passed on to `report`."""
    if not settings.metrics:
        yield Metered(report)
        return
    from zsfl.dashboard.metering import NodeMetrics

    metrics = NodeMetrics(settings)
    where = metrics.open()

    def tell(said: AnyReport) -> None:
        metrics.tell(said)
        report(said)
        if isinstance(said, Ready):
            report(Note(node=said.node, message=where))

    try:
        yield Metered(tell, metrics.beat, metrics.rest)
    finally:
        metrics.close()
