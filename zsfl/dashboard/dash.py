"""Looks at a run: what its nodes say and what its folder has, brought together a few times a second, to be served."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import msgspec

from zsfl.dashboard.history import History
from zsfl.dashboard.hub import Hub
from zsfl.dashboard.observer import changed_within, observing
from zsfl.dashboard.runs import SETTINGS
from zsfl.dashboard.serving import HttpServer
from zsfl.dashboard.tail import Tail
from zsfl.dashboard.watch import Snapshot, Watch
from zsfl.errors import ConfigError, ZsflError, root_cause
from zsfl.ids import Role
from zsfl.reports import (
    ADVICE,
    METRICS,
    AnyReport,
    Assembled,
    Exited,
    Failed,
    Finished,
    Note,
    Ready,
    WindowReport,
    readable,
)
from zsfl.settings import NodeSettings

SOON_S = 0.4
"""Between two snapshots at least."""
LATE_S = 1.0
"""Between two snapshots at most."""
LOOK_S = 1.0
"""How often it is looked whether the run is somewhere else by now."""
AGAIN_S = 5.0
"""Until it is tried again to look for the nodes, where that failed."""
MAX_NOTES = 8
MAX_SETTINGS_BYTES = 1 << 20
JOB_FACTS = ("name", "mode", "shards", "batch_size", "optimizer", "loss", "codec", "rounds")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run is found."""

    folder: Path | None
    """On this machine; None where it is not, or not yet."""
    settings: NodeSettings
    facts: Mapping[str, str]
    is_known: bool = True
    """Whether there is anything yet to look for its nodes by."""
    elsewhere: str = ""
    """The folder on another machine, for people."""


class Live(msgspec.Struct, frozen=True, kw_only=True):
    """One snapshot, as the page takes it."""

    title: str
    folder: str
    job: Mapping[str, Any]
    seen: Snapshot
    window: WindowReport | None
    end: Finished | Failed | None
    unread: int
    notes: tuple[str, ...]


class Dash:
    """Looks for a run where `find` says, and serves what is seen; used in the event loop it is made in."""

    def __init__(self, find: Callable[[], Place], beat_s: float, note: Callable[[str], None]) -> None:
        """`find` blocks, and may raise ConfigError; `note` is told what is worth a line of text."""
        self._find = find
        self._beat_s = beat_s
        self._say = note
        """Of its own, as several may look at one run."""
        self._place: Place | None = None
        self._watch = Watch(beat_s)
        self._history = History()
        self.hub = Hub(self._history)
        self._tail: Tail | None = None
        self._job: dict[str, Any] = {}
        self._job_at: int | None = None
        self._notes: deque[str] = deque(maxlen=MAX_NOTES)
        self._news = asyncio.Event()
        self._moved = asyncio.Event()
        self.hub.on_viewer = self._news.set

    async def run(self, server: HttpServer, host: str, port: int, token: str, is_open: Callable[[str], None]) -> None:
        """Look, and serve, until cancelled; `is_open` is called with the address."""
        self._move(await asyncio.to_thread(self._find))
        await server.open(host, port, token)
        is_open(server.url)
        try:
            async with asyncio.TaskGroup() as tasks:
                for work in (self._publish(), self._read(), self._mind_place(), self._look()):
                    tasks.create_task(work)
        except BaseExceptionGroup as group:
            raise root_cause(group) from group
        finally:
            await server.close()

    def seen(self) -> Snapshot:
        """Who is there now."""
        return self._watch.snapshot(time.monotonic())

    def tell(self, report: AnyReport) -> None:
        """What a node told whoever started it, who shows it here; of a run on another machine the curves, too."""
        if self._place is not None and self._place.folder is None:
            self._history.on(report)
            self._news.set()
        match report:
            case Failed():
                what = f"failed: {report.message}"
            case Exited(code=code) if code:
                what = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            case Note(level=level) if level not in ("info", ADVICE):
                what = report.message
            case _:
                return
        self._watch.told(report.node, what, time.monotonic())
        self._news.set()

    # --- where the run is -------------------------------------------------------------------------------

    async def _mind_place(self) -> None:
        """Follow the run when it is started again elsewhere; as long as anybody is there they tell of one another."""
        while True:
            await asyncio.sleep(LOOK_S)
            with suppress(ConfigError):  # what was there is gone: it goes on showing that
                found, place = await asyncio.to_thread(self._find), self._place
                if found != place and (place is None or place.folder is None or self._watch.is_alone):
                    self._move(found)

    def _move(self, to: Place) -> None:
        before, self._place = self._place, to
        if to.folder is not None and (before is None or before.folder != to.folder):
            if before is not None and before.folder is not None:  # another run
                self._watch = Watch(self._beat_s)
            self._history = History()
            self.hub.follow(self._history)
            self._tail = Tail(to.folder / METRICS)
            self._job, self._job_at = {}, None
        self._moved.set()

    async def _look(self) -> None:
        """See who is there."""
        while True:
            self._moved.clear()
            if (place := self._place) is None or not place.is_known:
                await self._moved.wait()
                continue
            try:
                settings = replace(place.settings, port=0)
                async with observing(settings, place.facts, self._note, self._news.set, self._watch):
                    while (self._place.settings, self._place.facts) == (place.settings, place.facts):
                        await self._moved.wait()
                        self._moved.clear()
            except ZsflError as error:
                if isinstance(error, ConfigError) and place.folder is None:
                    raise
                self._note(f"cannot look who is there: {error}")
                await asyncio.sleep(AGAIN_S)

    def _note(self, message: str) -> None:
        if message not in self._notes:
            self._notes.append(message)
            self._say(message)
            self._news.set()

    # --- what its folder has ----------------------------------------------------------------------------

    async def _read(self) -> None:
        while True:
            tail, folder = self._tail, self._place.folder if self._place else None
            more = False
            if tail is not None and folder is not None:
                lines, begins, more = await asyncio.to_thread(tail.read)
                if tail is self._tail:
                    self._take(lines, begins)
                await self._read_job(folder)
            await asyncio.sleep(0.0 if more else SOON_S)

    def _take(self, lines: list[bytes], begins: bool) -> None:
        if begins:
            self._history.begin_again()
        reports = list(readable(lines))
        self._history.unread += len(lines) - len(reports)
        for report in reports:
            self._history.on(report)
        if lines:
            self._news.set()

    async def _read_job(self, folder: Path) -> None:
        job, at = await asyncio.to_thread(_job_in, folder / SETTINGS, self._job_at)
        if at != self._job_at:
            self._job, self._job_at = job, at
            self._news.set()

    # --- what is shown ----------------------------------------------------------------------------------

    async def _publish(self) -> None:
        while True:
            if self.hub.viewers:
                self.hub.publish(self._live())
            else:
                self.hub.forget()
            await asyncio.sleep(SOON_S if self.hub.viewers else 0.0)
            await changed_within(self._news, LATE_S - SOON_S)

    def _live(self) -> Live:
        folder = self._place.folder if self._place else None
        return Live(
            title=_title(self._place) if self._place else "run",
            folder=str(folder) if folder else self._place.elsewhere if self._place else "",
            job=self._job,
            seen=self.seen(),
            window=self._history.window,
            end=self._history.end,
            unread=self._history.unread,
            notes=tuple(self._notes),
        )


def _title(place: Place) -> str:
    named = place.folder or (PurePath(place.elsewhere) if place.elsewhere else None)
    return named.name if named else place.facts.get("name", "run")


def _job_in(path: Path, known: int | None) -> tuple[dict[str, Any], int | None]:
    """What a run's settings say about its job, and when they were written; blocking."""
    try:
        about = path.stat()
        if about.st_mtime_ns == known or about.st_size > MAX_SETTINGS_BYTES:
            return {}, known
        settings = msgspec.json.decode(path.read_bytes(), type=dict[str, dict[str, Any]])
    except (OSError, msgspec.DecodeError):
        return {}, known
    facts = {name: settings.get("job", {}).get(name) for name in JOB_FACTS}
    return {name: fact for name, fact in facts.items() if isinstance(fact, str | int | float)}, about.st_mtime_ns


class Started:
    """Finds a run that this process has started, by what its nodes report."""

    def __init__(self, settings: NodeSettings) -> None:
        self.settings = replace(settings, mdns=False, port=0)
        self._address = ""
        self._folder: Path | None = None
        self._elsewhere = ""

    def take(self, report: AnyReport) -> None:
        """One report more."""
        match report:
            case Ready() if report.role == Role.AGGREGATOR:
                self._address = report.address
            case Assembled() if report.folder:
                is_here = Path(report.folder).is_dir()
                self._folder, self._elsewhere = (Path(report.folder), "") if is_here else (None, report.folder)
            case _:
                pass

    def find(self) -> Place:
        """Where it is by now."""
        peers = (self._address,) if self._address else ()
        settings = replace(self.settings, peers=peers)
        return Place(self._folder, settings, {}, is_known=bool(peers), elsewhere=self._elsewhere)
