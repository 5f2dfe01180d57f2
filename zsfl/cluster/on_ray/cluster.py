"""A whole cluster on Ray."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from zsfl.cluster.local import LocalCluster
from zsfl.cluster.on_ray.sources import imported_by
from zsfl.cluster.on_ray.spawner import RaySpawner
from zsfl.cluster.scaling import Scaling
from zsfl.cluster.spawner import Spawner
from zsfl.cluster.spawners import loaded
from zsfl.cluster.ssh import contents
from zsfl.dashboard.observer import observing
from zsfl.dashboard.watch import Watch
from zsfl.errors import ConfigError, ZsflError
from zsfl.ids import Role
from zsfl.keys.secret import keys_folder
from zsfl.reports import AnyReport, Note
from zsfl.settings import NodeSettings, load_settings
from zsfl.words import number_of


class RayCluster(LocalCluster):
    """Clients, split servers and an aggregator as actors of Ray, the aggregator on this machine. Where a process dies
    Ray starts another one, maybe elsewhere, and the node goes on there.
    """

    def __init__(
        self,
        job: str | Path,
        *,
        address: str = "",
        least: int | None = None,
        most: int | None = None,
        split_servers: int | None = None,
        on_report: Callable[[AnyReport], None] | None = None,
        **settings: Any,
    ) -> None:
        """`address` is that of a Ray cluster, or auto; without, one is started on this machine. There are `least` to
        `most` split servers, by how much they have to do, `split_servers` at first; where only those are given, as many
        stay.
        """
        for name, why in (
            ("standbys", "the aggregator is on this machine, and without it the run is over"),
            ("host", "Ray says where machines are"),
            ("mdns", "nodes find each other through Ray"),
        ):
            if settings.pop(name, None):
                raise ConfigError(f"--{name} is not for --on ray: {why}")
        self._least, begin, self._most = _bounds(least, split_servers, most)
        settings["cluster"] = load_settings(settings, os.environ).cluster or secrets.token_hex(4)
        super().__init__(job, split_servers=begin, mdns=False, keep_alive=True, on_report=on_report, **settings)
        # Ray may have to wait for a machine, or to get one.
        self._join_s = self._start_s = self._base.join_s
        self._file = Path(job)
        self._address = address

    def _make_spawner(self) -> Spawner:
        self._shards = self._shards or loaded(self._file).shards
        processes = min(self._shards, self._client_processes or self._shards)
        base = replace(self._base, cluster=str(self._settings["cluster"]))
        self._ray = RaySpawner(
            base,
            self._file.name,
            contents(self._file, imported_by(self._file)),
            self._address,
            base.threads * (processes + self._most),
            self._logs,
        )
        return self._ray

    def _late(self) -> list[str]:
        waiting = self._ray.waiting
        return [f"{name} (Ray has not placed it)" if name in waiting else name for name in super()._late()]

    async def _start_all(self) -> None:
        await super()._start_all()
        if self._least < self._most:
            self._run_errand(self._scale())

    # --- how many split servers -------------------------------------------------------------------------

    async def _scale(self) -> None:
        scaling = Scaling(self._least, self._most)
        facts = {"cluster": str(self._settings["cluster"])}
        async with observing(self._observer(), facts, lambda _: None, lambda: None) as watch:
            while True:
                await asyncio.sleep(self._base.beat_s)
                servers = self._servers()
                if (held := _held(watch, servers)) is None:
                    continue
                now = f"{number_of(held, 'request')} at {number_of(len(servers), 'split server')}"
                match scaling.decide(len(servers), held, time.monotonic()):
                    case "more":
                        self._note(f"{now}: one more is started")
                        await self._one_more()
                    case "fewer":
                        self._note(f"{now}: {servers[-1]} is asked to leave")
                        await self._one_less(servers[-1])
                    case "stay":
                        pass

    def _observer(self) -> NodeSettings:
        leader = self._leader.address
        keys = str(keys_folder(self._base.keys)) if self._ray.uses_keys else ""
        peers = (leader,) if leader else ()
        return replace(self._base, host=self._ray.host, port=0, peers=peers, mdns=False, keys=keys)

    def _servers(self) -> list[str]:
        """Those that there are to be, the newest last."""
        return [
            name
            for name, node in self.nodes.items()
            if node.role is Role.SPLIT_SERVER and node.exit_code is None
        ]  # fmt: skip

    async def _one_more(self) -> None:
        before = set(self.nodes)
        try:
            await self.start_split_server()
        except ZsflError as error:  # the run goes on without
            self._note(f"{error}; does Ray have room for it?", "warning")
            for name in self.nodes.keys() - before:
                await self._ray.stop(name)

    async def _one_less(self, name: str) -> None:
        try:
            await self.stop(name)
        except ZsflError as error:
            self._note(str(error), "warning")

    def _note(self, message: str, level: str = "info") -> None:
        self._ray.reports.put_nowait(Note(node="cluster", message=message, level=level))


def _held(watch: Watch, servers: list[str]) -> int | None:
    """Requests that they hold together; None while one of them has not been heard."""
    busy = {
        node.name: node.busy
        for node in watch.snapshot(time.monotonic()).nodes
        if node.role == Role.SPLIT_SERVER and node.presence == "there"
    }
    held = [busy.get(name) for name in servers]
    return None if None in held else sum(one for one in held if one is not None)


def _bounds(least: int | None, begin: int | None, most: int | None) -> tuple[int, int, int]:
    """The fewest split servers, how many at first, and the most."""
    if least is None and most is None:
        begin = 2 if begin is None else begin
        return begin, begin, begin
    least = 1 if least is None else least
    begin = least if begin is None else begin
    most = max(least, begin) if most is None else most
    if not 1 <= least <= begin <= most:
        raise ConfigError(
            f"from {least} to {most} split servers, {begin} at first, cannot be: --min is 1 or more, and --max, as "
            "--split-servers, no less"
        )
    return least, begin, most
