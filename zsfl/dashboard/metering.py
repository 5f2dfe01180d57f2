"""Serves what Prometheus scrapes, of one node or of a whole cluster on this machine, and whether a node is well."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from prometheus_client import ProcessCollector

from zsfl.dashboard.beside import Beside
from zsfl.dashboard.dash import Dash, Started
from zsfl.dashboard.exposition import CONTENT_TYPE, exposition
from zsfl.dashboard.health import Health
from zsfl.dashboard.history import History
from zsfl.dashboard.http import HttpError, Request
from zsfl.dashboard.serving import HttpServer
from zsfl.dashboard.watch import Watch
from zsfl.keys.secret import keys_folder, own_token
from zsfl.reports import AnyReport
from zsfl.settings import NodeSettings
from zsfl.wire.door import is_loopback
from zsfl.wire.messages import Beat

FRESH_S = 0.5
"""Heartbeats come no more often: so long all scrapers get the same."""
TOKEN_FILE = "metrics-token"  # noqa: S105, a name


class MetricsServer(HttpServer):
    """Answers scrapers."""

    what, flag, path = "metrics", "port with --metrics", "/metrics"
    whose = f"send `Authorization: Bearer TOKEN`; the token is in the file {TOKEN_FILE} beside this machine's keys"

    def __init__(self, render: Callable[[], bytes], probes: Mapping[str, Callable[[], str]] | None = None) -> None:
        """`probes`: of each path whether all is well, or what is not; whoever asks is told."""
        super().__init__()
        self._render = render
        self._probes = probes or {}
        self._body = b""
        self._at_s = float("-inf")

    def _check(self, request: Request) -> None:
        if request.path not in self._probes:
            super()._check(request)

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> None:
        if probe := self._probes.get(request.path):
            if why := probe():
                raise HttpError(503, why)
            return await self._say(writer, 200, b"ok\n", head_only=request.method == "HEAD")
        if request.path != self.path:
            raise HttpError(404, f"what there is here: {', '.join((self.path, *self._probes))}")
        now_s = time.monotonic()
        if now_s >= self._at_s + FRESH_S:
            self._body, self._at_s = self._render(), now_s
        headers = {"Content-Type": CONTENT_TYPE}
        await self._say(writer, 200, self._body, headers, head_only=request.method == "HEAD")


class _Metrics:
    """Where they are served, and for whom."""

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        host, _, port = settings.metrics.rpartition(":")
        self._host, self._port = host or "127.0.0.1", int(port)
        self._token_file: Path | None = None
        self._token = ""
        if not is_loopback(self._host):
            self._token_file = keys_folder(settings.keys) / TOKEN_FILE
            self._token = own_token(self._token_file)
        self._beside = Beside("the metrics", self._serve)
        self.close = self._beside.close

    def open(self) -> str:
        """Serve; what to tell people about it. ConfigError where that cannot be."""
        url = self._beside.open()
        return f"metrics at {url}" + (f", for who sends the token in {self._token_file}" if self._token_file else "")

    async def _serve(self, is_open: Callable[[str], None]) -> None:
        raise NotImplementedError


class ClusterMetrics(_Metrics):
    """Of a cluster that this process has started: what its nodes say to one another, and report."""

    def __init__(self, settings: NodeSettings) -> None:
        super().__init__(settings)
        self._started = Started(settings)
        self._history = History()

    def tell(self, report: AnyReport) -> None:
        """What the nodes report."""
        self._started.take(report)
        self._beside.soon(lambda: self._history.on(report))

    async def _serve(self, is_open: Callable[[str], None]) -> None:
        dash = Dash(self._started.find, self._settings.beat_s, lambda _: None)
        server = MetricsServer(lambda: exposition(dash.seen(), self._history))
        await dash.run(server, self._host, self._port, self._token, is_open)


class NodeMetrics(_Metrics):
    """Of one node: its own heartbeats and reports."""

    def __init__(self, settings: NodeSettings) -> None:
        super().__init__(settings)
        self._watch, self._id = Watch(settings.beat_s), ""
        self._history = History()
        self._process = ProcessCollector(registry=None)
        self._health = Health(asyncio.get_running_loop())

    def beat(self, beat: Beat) -> None:
        """What the node says to its peers."""
        self._health.beat = beat
        self._beside.soon(lambda: self._take(beat))

    def rest(self) -> None:
        """Its run is over, and it stays."""
        self._health.rests = True

    def tell(self, report: AnyReport) -> None:
        """What it reports."""
        self._beside.soon(lambda: self._history.on(report))

    def _take(self, beat: Beat) -> None:
        now_s = time.monotonic()
        if beat.card.id != self._id:  # at first, and when it has another role
            self._watch, self._id = Watch(self._settings.beat_s), beat.card.id
            self._watch.joined(beat.card, now_s)
        self._watch.said(beat, now_s)

    def _render(self) -> bytes:
        return exposition(self._watch.snapshot(time.monotonic()), self._history, self._process)

    async def _serve(self, is_open: Callable[[str], None]) -> None:
        probes = {"/healthz": self._health.not_alive, "/readyz": self._health.not_ready}
        server = MetricsServer(self._render, probes)
        await server.open(self._host, self._port, self._token)
        is_open(server.url)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await server.close()
