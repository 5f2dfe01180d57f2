"""Starts nodes as actors of Ray."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from zsfl.cluster.forkserver import GRACE_S
from zsfl.cluster.on_ray.actors import NAMESPACE, Directory, Given, Machine, NodeActor
from zsfl.cluster.on_ray.engine import Engine
from zsfl.cluster.spawner import NodeCommand
from zsfl.cluster.talk import Printed, read_told
from zsfl.errors import ConfigError, RunFailed
from zsfl.ids import AGGREGATING, PROTOCOL, Role
from zsfl.keys.secret import keys_folder, own_keys
from zsfl.keys.trusted import trust_as
from zsfl.reports import AnyReport, Exited, Failed, Note
from zsfl.settings import NodeSettings

KILLED = -9
"""Exit code of a node whose process died, however it did: Ray does not say."""
FOLDER = "zsfl"
"""Below the home folder of a machine: what nodes there write."""
AT_ONCE = 4
"""Calls that an actor answers at the same time."""
LOOK_S = 0.2
"""How often to see whether one that is started again is there."""
ELSEWHERE = ("host", "keys", "name", "runs", "port", "shards", "service")
"""Settings that are said for each node, or differ between machines."""


@dataclass(frozen=True, slots=True)
class _Node:
    role: Role
    actor: Any
    keys: str | None
    """Folder of its machine's keys, empty the one that it would use by itself; None: none are used."""


class RaySpawner:
    """Has Ray place each node on some machine, and start it again where its process dies."""

    def __init__(
        self, settings: NodeSettings, job: str, files: Mapping[str, bytes], address: str, cpus: int, logs: Path
    ) -> None:
        """`settings` are those of all nodes; a Ray that is started here gives away so many CPUs."""
        self._settings = settings
        self._job = job
        self._files = files
        self._address = address
        self._cpus = cpus
        self._logs = logs
        self._nodes: dict[str, _Node] = {}
        self._lives: dict[str, asyncio.Task[None]] = {}
        self._met: set[str] = set()
        """Nodes that run, or are about to."""
        self._unwanted: set[str] = set()
        """Nodes that were asked to leave before they ran."""
        self._roles: dict[str, tuple[str, frozenset[Role]]] = {}
        """Of each machine's key, a name for it, and what it plays."""
        self._made = Counter[str]()
        """How many actors each node has had."""
        self._acquainted: dict[str, _Node] = {}
        """Nodes whose machines know of those that are known so far."""
        self._closing = False
        self._own_key = ""
        self._engine: Engine | None = None
        self._directory: Any
        self._listening: asyncio.Task[None] | None = None
        self.reports: asyncio.Queue[AnyReport] = asyncio.Queue()

    # --- life -------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Join the Ray cluster, or start one, and have the directory made."""
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write to {self._logs}: {error.strerror}; choose another --runs") from error
        self._engine = engine = await asyncio.to_thread(Engine.join, self._address, self._cpus)
        try:
            self._directory = engine.ray.remote(Directory).options(
                name=self._name_of("directory"), namespace=NAMESPACE, num_cpus=0, scheduling_strategy=engine.pinned()
            ).remote()  # fmt: skip
        except ValueError:
            raise ConfigError(
                f"there is a cluster {self._settings.cluster} on this Ray already: name another one with --cluster"
            ) from None
        self._listening = asyncio.create_task(self._listen())
        if self.uses_keys:
            self._own_key = own_keys(keys_folder(self._settings.keys)).public
            self._roles[self._own_key] = ("operator", frozenset({Role.OPERATOR, Role.OBSERVER}))
        self._tell_room()

    @property
    def uses_keys(self) -> bool:
        """Whether what travels is encrypted: wherever it may leave this machine, unless the settings say otherwise."""
        return not self._settings.insecure and (not self._joined.is_local or bool(self._settings.keys))

    @property
    def host(self) -> str:
        """The address of this machine, as the others reach it."""
        return self._joined.host

    @property
    def waiting(self) -> set[str]:
        """Nodes that Ray has not placed yet."""
        return self._nodes.keys() - self._met

    @property
    def _joined(self) -> Engine:
        if self._engine is None:
            raise RunFailed("nodes can be started and ended only while the cluster runs")
        return self._engine

    def _tell_room(self) -> None:
        engine = self._joined
        machines = sum(bool(node["Alive"]) for node in engine.ray.nodes())
        has = f"{engine.has('CPU'):g} CPUs, {engine.has('GPU'):g} GPUs on {machines} machine{'s' * (machines != 1)}"
        self._note(f"Ray has {has}; nodes that find no room there wait for it")

    async def _meet(self, name: str, node: _Node) -> str:
        """The address of the machine that it is on, which is made known to the others."""
        machine = await self._once_there(node)
        if machine.protocol != PROTOCOL:
            raise ConfigError(
                f"the machine {machine.host} of Ray has zsfl {machine.version}, which speaks protocol "
                f"{machine.protocol}, and this one speaks {PROTOCOL}: install the same version on both"
            )
        if node.keys is not None:
            await self._introduce(name, node, machine)
        return machine.host

    async def _once_there(self, node: _Node) -> Machine:
        while True:
            with suppress(self._joined.ray.exceptions.ActorUnavailableError):  # it is being started again
                return await node.actor.meet.remote(node.keys)
            await asyncio.sleep(LOOK_S)

    async def _introduce(self, name: str, node: _Node, machine: Machine) -> None:
        """All machines trust each other as what they play. That Ray runs us there is proof enough of who is who."""
        called, before = self._roles.get(machine.key, (f"ray-{machine.host}", frozenset[Role]()))
        plays = AGGREGATING if node.role in AGGREGATING else {node.role}
        self._roles[machine.key] = called, before | plays | {Role.OBSERVER}
        known = [(key, *which) for key, which in self._roles.items()]
        others = [other for other in self._acquainted.values() if self._roles[machine.key][1] != before]
        self._acquainted[name] = node
        own, folder = self._own_key, keys_folder(self._settings.keys)
        for key, other, roles in known:
            if key != own:
                await asyncio.to_thread(trust_as, folder, key, other, roles)
        await node.actor.trust.remote(node.keys, known)
        for other in others:
            with suppress(self._joined.ray.exceptions.RayError):  # what is started again there is told then
                await other.actor.trust.remote(other.keys, known)

    async def _listen(self) -> None:
        try:
            while True:
                for line in await self._directory.told.remote():
                    with suppress(msgspec.MsgspecError):
                        self._heard(read_told(line))
        except self._joined.ray.exceptions.RayError as error:
            if not self._closing:
                said = f"the actor that nodes report to is gone: {_said(error)}"
                self.reports.put_nowait(Failed(node="cluster", kind="RunFailed", message=said))

    def _heard(self, told: Any) -> None:
        match told:
            case Printed():
                with suppress(OSError), (self._logs / f"{told.node}.log").open("a", encoding="utf-8") as log:
                    log.write(f"{told.line}\n")
            case _:
                self.reports.put_nowait(told)

    def _note(self, message: str, level: str = "info") -> None:
        self.reports.put_nowait(Note(node="cluster", message=message, level=level))

    async def close(self) -> None:
        """Ask all to leave, those that record versions first, and let go of Ray."""
        self._closing = True
        if self._engine is None:
            return
        aggregating = [name for name, node in self._nodes.items() if node.role in AGGREGATING]
        for names in (aggregating, [name for name in self._nodes if name not in aggregating]):
            if names:
                asked = [asyncio.ensure_future(self.stop(name)) for name in names]
                await asyncio.wait([*asked, *(self._lives[name] for name in names)], timeout=GRACE_S)
        for node in self._nodes.values():
            self._engine.ray.kill(node.actor)
        for task in self._lives.values():
            task.cancel()
        await asyncio.gather(*self._lives.values(), return_exceptions=True)
        await self._close_directory(self._engine)
        await asyncio.to_thread(self._engine.leave)

    async def _close_directory(self, engine: Engine) -> None:
        if self._listening is None:
            return
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)
        engine.ray.kill(self._directory)

    # --- nodes ------------------------------------------------------------------------------------------

    async def start(self, command: NodeCommand) -> None:
        """Have Ray start it; or have it run once more, where Ray starts its process again."""
        before = self._lives.get(command.name)
        self._lives[command.name] = asyncio.create_task(self._live(command, before), name=command.name)

    async def stop(self, name: str) -> None:
        """Ask a node to drain and leave; one that has not been placed yet is given up."""
        if (node := self._nodes.get(name)) is None:
            return
        if name not in self._met:
            self._unwanted.add(name)
            self._joined.ray.kill(node.actor)
            return
        with suppress(self._joined.ray.exceptions.RayError):
            await node.actor.stop.remote()

    async def kill(self, name: str) -> None:
        """End its process at once, for good."""
        if node := self._nodes.get(name):
            self._joined.ray.kill(node.actor)

    async def _live(self, command: NodeCommand, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        name, errors = command.name, self._joined.ray.exceptions
        node = self._nodes.get(name) or self._make(command)
        try:
            host = await self._meet(name, node)
            self._met.add(name)
            # When it ends by itself it says so, through the directory, after all else.
            await node.actor.run.remote(self._flags(command, node, host), node.keys)
            self._let_go(name, node)
        except errors.ActorUnavailableError:
            self._note(f"the process of {name} died; Ray starts another one", "warning")
            await self._ended(name, KILLED)
        except errors.RayActorError as error:  # it is gone for good
            self._nodes.pop(name, None)
            if name not in self._met and name not in self._unwanted:
                why = (
                    f"Ray cannot start it: {_said(error)}. Is zsfl {version('zsfl')} installed on all machines of Ray?"
                )
                await self._failed(name, "ConfigError", why)
            await self._ended(name, 0 if name in self._unwanted else KILLED)
        except errors.RayTaskError as error:
            await self._failed(name, type(error.cause).__name__, str(error.cause))
            self._let_go(name, node)
            if name not in self._met:
                await self._ended(name, 1)
        except ConfigError as error:
            await self._failed(name, "ConfigError", str(error))
            self._let_go(name, node)
            await self._ended(name, 2)
        finally:
            self._met.discard(name)
            self._acquainted.pop(name, None)
            self._unwanted.discard(name)

    def _let_go(self, name: str, node: _Node) -> None:
        self._nodes.pop(name, None)
        self._joined.ray.kill(node.actor)

    async def _ended(self, name: str, code: int) -> None:
        await self._tell(Exited(node=name, code=code))

    async def _failed(self, name: str, kind: str, message: str) -> None:
        await self._tell(Failed(node=name, kind=kind, message=message))

    async def _tell(self, report: AnyReport) -> None:
        """By the way that nodes' own reports come, after them."""
        with suppress(self._joined.ray.exceptions.RayError):
            await self._directory.tell.remote(msgspec.json.encode(report))

    # --- what a node is given ---------------------------------------------------------------------------

    def _make(self, command: NodeCommand) -> _Node:
        engine, name, role = self._joined, command.name, command.role
        wanted: dict[str, Any] = {"num_cpus": self._settings.threads}
        keys = "" if self.uses_keys else None
        if role in AGGREGATING:  # here, where its folder is to be
            wanted = {"num_cpus": 0, "scheduling_strategy": engine.pinned()}
            keys = str(keys_folder(self._settings.keys).absolute()) if self.uses_keys else None
        elif role is Role.SPLIT_SERVER and engine.has("GPU"):
            wanted = {"num_cpus": 0, "num_gpus": 1}
        given = Given(
            name=name,
            role=role,
            directory=self._name_of("directory"),
            folder=f"{FOLDER}/{self._settings.cluster}",
            job=self._job,
            files=self._files,
            env=_variables(),
        )
        self._made[name] += 1
        many = self._made[name]  # one that was let go may have its name for a moment
        called = self._name_of(f"{name}.{many}" if many > 1 else name)
        options = {"name": called, "namespace": NAMESPACE, "max_restarts": -1}
        actor = engine.ray.remote(NodeActor).options(**options, max_concurrency=AT_ONCE, **wanted)
        self._nodes[name] = node = _Node(role, actor.remote(given), keys)
        return node

    def _flags(self, command: NodeCommand, node: _Node, host: str) -> dict[str, Any]:
        """Settings that are said here hold everywhere, whatever files and variables there are on other machines."""
        said = {name: value for name, value in asdict(self._settings).items() if name not in ELSEWHERE}
        flags = {**said, **command.settings(), "host": host, "keys": "", "insecure": self._settings.insecure}
        if command.role in AGGREGATING:
            flags["runs"] = str(self._settings.runs.absolute())
        elif self._settings.device == "auto" and not (command.role is Role.SPLIT_SERVER and self._joined.has("GPU")):
            flags["device"] = "cpu"  # others were given the GPUs
        return flags

    def _name_of(self, what: str) -> str:
        return f"{self._settings.cluster}/{what}"


def _variables() -> dict[str, str]:
    """What the environment tells jobs, but for settings, which are told otherwise, as some differ between machines."""
    settings = {f"ZSFL_{entry.name.upper()}" for entry in fields(NodeSettings)} | {"ZSFL_CONFIG"}
    return {name: value for name, value in os.environ.items() if name.startswith("ZSFL_") and name not in settings}


def _said(error: Exception) -> str:
    """The end of what Ray says, which has the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]
