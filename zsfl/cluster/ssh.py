"""Starts nodes on the machines of a LAN: on each a fork server, which the system's ssh runs there."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import msgspec

from zsfl.cluster.forkserver import GRACE_S
from zsfl.cluster.lan import Lan, Machine
from zsfl.cluster.processes import ProcessSpawner
from zsfl.cluster.spawner import NodeCommand
from zsfl.cluster.talk import Described, Files, Introduce, Introduced, Printed, Trust, read_told
from zsfl.errors import ConfigError, Unavailable, ZsflError
from zsfl.ids import AGGREGATING, PROTOCOL, Role
from zsfl.keys.secret import keys_folder, own_keys
from zsfl.keys.trusted import trust_as
from zsfl.reports import AnyReport, Exited, Failed, Note

MOST_LAST_WORDS = 5
"""Lines of what ssh and the fork server said last, for an error."""
LAST_WORDS_S = 2.0
"""What the end of ssh, and what it still says then, may take."""
LOOK_S = 0.02
MOST_SENT = 8 << 20
"""Bytes of all files that are sent to a machine."""
LOST = 255
"""Exit code of nodes whose machine is lost: ssh's own."""


class MachineSpawner(ProcessSpawner):
    """Drives the fork server of one machine."""

    _errors = subprocess.PIPE

    def __init__(self, name: str, machine: Machine, lan: Lan, job: Path, logs: Path) -> None:
        """`job` is here; on another machine it has the same name, in the folder there."""
        super().__init__(job, logs)
        self._name = name
        self._machine = machine
        self._lan = lan
        self._last_words: deque[str] = deque(maxlen=MOST_LAST_WORDS)
        self._there: set[str] = set()
        """Nodes that were started and have not ended."""
        self._errors_read: asyncio.Task[None] | None = None
        self._introduction: asyncio.Future[Introduced] | None = None
        self.is_known = False

    def _command(self) -> list[str]:
        here = [*(f"{name}={value}" for name, value in self._machine.env.items())]
        module = ["-m", "zsfl.cluster.forkserver"]
        if not self._machine.ssh:
            return ["env", *here, sys.executable, *module, str(self._job)]
        run = shlex.join(["env", *here, self._machine.python, *module, self._job.name, "--files"])
        folder = shlex.quote(self._machine.folder)
        return [*self._lan.ssh_words(self._machine), f"mkdir -p {folder} && cd {folder} && exec {run}"]

    def _log(self, name: str) -> str:
        return ""  # told line by line, and written here

    async def open(self) -> None:
        """Start the fork server there, and send it the job."""
        try:
            await super().open()
        except OSError as error:
            raise ConfigError(f"{self._called}: {error.filename} cannot be run: {error.strerror}") from None
        if self._server is not None and self._server.stderr is not None:
            self._errors_read = asyncio.create_task(self._read_errors(self._server.stderr))
        if self._machine.ssh:
            await self._order(Files(files=contents(self._job, self._lan.files)))

    @property
    def _called(self) -> str:
        return f"machine {self._name}" + (f" ({self._machine.ssh})" if self._machine.ssh else "")

    async def introduce(self, keys: str | None) -> Introduced:
        """Have it say who it is, with the keys in this folder; ConfigError or Unavailable when it cannot be used."""
        self._introduction = asyncio.get_running_loop().create_future()
        await self._order(Introduce(keys=keys))
        told = await self._introduction
        if told.protocol != PROTOCOL:
            raise ConfigError(
                f"{self._called} has zsfl {told.version}, which speaks protocol {told.protocol}, and this machine "
                f"speaks {PROTOCOL}: install the same version on both"
            )
        self.is_known = True
        return told

    async def trust(self, keys: str, others: Iterable[tuple[str, str, frozenset[Role]]]) -> None:
        """Have it trust others."""
        machines = tuple((key, name, tuple(sorted(roles))) for key, name, roles in others)
        await self._order(Trust(keys=keys, machines=machines))

    async def start(self, command: NodeCommand) -> None:
        """Start a node there."""
        self._there.add(command.name)
        await super().start(command)

    def _heard(self, line: bytes) -> None:
        told = read_told(line)
        if told.node and told.node not in self._there:
            return  # nobody speaks for the nodes of another machine
        match told:
            case Printed():
                self._write(told.node or self._name, told.line)
            case Described():
                pass  # nobody asked
            case Introduced():
                if self._introduction is not None and not self._introduction.done():
                    self._introduction.set_result(told)
            case Failed() if not told.node:
                self._unusable(ConfigError(f"{self._called}: {told.message}"))
            case Note() if not told.node:
                self.reports.put_nowait(msgspec.structs.replace(told, node=self._called))
            case Exited():
                self._there.discard(told.node)
                self.reports.put_nowait(told)
            case _:
                self.reports.put_nowait(told)

    def _unusable(self, error: ZsflError) -> None:
        if self._introduction is None or self._introduction.done():
            self.reports.put_nowait(Failed(node="cluster", kind=type(error).__name__, message=str(error)))
        else:
            self._introduction.set_exception(error)

    def _write(self, name: str, line: str) -> None:
        with suppress(OSError), (self._logs / f"{name}.log").open("a", encoding="utf-8") as log:
            log.write(f"{line}\n")

    async def _read_errors(self, stream: asyncio.StreamReader) -> None:
        with suppress(ValueError):  # a line longer than any of ssh
            async for line in stream:
                text = line.decode(errors="replace").rstrip()
                self._last_words.append(text)
                self._write(self._name, text)

    async def _died(self, server: asyncio.subprocess.Process) -> None:
        """Its nodes count as killed; a run goes on without them where it would go on without any of them."""
        await self._ended(server, LAST_WORDS_S)
        code = server.returncode
        said = "; ".join(self._last_words) or "the connection ended"
        if self._introduction is None or not self._introduction.done():
            what = f"{self._called} cannot be used, code {code}: {said}. {self._advice(code)}"
            return self._unusable(Unavailable(what))
        self.reports.put_nowait(Note(node="cluster", message=f"{self._called} is lost: {said}", level="warning"))
        for name in sorted(self._there):
            self.reports.put_nowait(Exited(node=name, code=LOST))
        self._there.clear()

    def _advice(self, code: int | None) -> str:
        """What to do about a fork server that ended before it said who it is."""
        python = self._machine.python
        if code == LOST:
            return f"See whether this works: {shlex.join([*self._command()[:-1], 'true'])}"
        if code in (126, 127):
            return f"There is no {python} there that can be run: name the Python that has zsfl as python"
        missing = re.search(r"No module named '([\w.]+)'", "\n".join(self._last_words))
        if missing and missing[1] == "zsfl":
            return f"zsfl is not installed for {python} there: install it, or name another Python as python"
        if missing and not missing[1].startswith("zsfl."):
            return f"{missing[1]} is not installed for {python} there: install zsfl there again, with what it needs"
        return f"Is zsfl {version('zsfl')} there, as here? {self._logs / self._name}.log has all that was said"

    async def close(self) -> None:
        """End the fork server there by ending its input: it ends all nodes, and then the connection ends."""
        self._closing = True
        if self._server is None:
            return
        if self._server.stdin is not None:
            self._server.stdin.close()
        await self._ended(self._server, 3 * GRACE_S + 1 if self._there else LAST_WORDS_S)
        if self._reader is not None:
            await asyncio.wait([self._reader], timeout=LAST_WORDS_S)
            self._reader.cancel()

    async def _ended(self, server: asyncio.subprocess.Process, grace_s: float) -> None:
        """Returns when ssh has ended, killed after `grace_s`; what it started may hold its pipes open for ever."""
        for within_s in (grace_s, LAST_WORDS_S):
            with suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    while server.returncode is None:  # noqa: ASYNC110 - `wait` would wait for its pipes, too
                        await asyncio.sleep(LOOK_S)
            if server.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGKILL)
        if self._errors_read is not None:
            await asyncio.wait([self._errors_read], timeout=LAST_WORDS_S)
            self._errors_read.cancel()


class LanSpawner:
    """Drives the fork servers of all machines."""

    def __init__(self, lan: Lan, job: Path, logs: Path, places: Mapping[str, str], keys: str) -> None:
        """`places` says by node on which machine it is; `keys` is the folder of the keys of whoever runs this."""
        self._lan = lan
        self._places = places
        self._keys = keys
        self._machines = {name: MachineSpawner(name, machine, lan, job, logs) for name, machine in lan.machines.items()}
        self.reports: asyncio.Queue[AnyReport] = asyncio.Queue()
        for one in self._machines.values():
            one.reports = self.reports

    async def open(self) -> None:
        """Start all fork servers, and have the machines trust one another where keys are used.

        That ssh lets us in everywhere is proof enough of who is who.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                meeting = {name: tasks.create_task(self._met(name)) for name in self._machines}
        except* ZsflError as errors:
            raise _first(errors) from None
        found = {name: task.result().key for name, task in meeting.items()}
        if self._lan.uses_keys:
            await self._introduce_all(found)

    async def _met(self, name: str) -> Introduced:
        await self._machines[name].open()
        return await self._machines[name].introduce(self._lan.keys_of(name) if self._lan.uses_keys else None)

    async def _introduce_all(self, found: Mapping[str, str]) -> None:
        """Of each other they trust what they play in this run, beside what they trusted before."""
        here: str = own_keys(keys_folder(self._keys)).public
        roles: dict[str, frozenset[Role]] = {here: frozenset({Role.OPERATOR, Role.OBSERVER})}
        names: dict[str, str] = {here: "operator"}
        for name, key in found.items():
            roles[key] = roles.get(key, frozenset()) | self._lan.machines[name].roles | {Role.OBSERVER}
            names[key] = name
        others = [(key, names[key], may) for key, may in roles.items()]
        for key, name, may in others:
            if key != here:
                trust_as(keys_folder(self._keys), key, name, may)
        for name, key in found.items():
            await self._machines[name].trust(self._lan.keys_of(name), [one for one in others if one[0] != key])
            await self._machines[name].introduce(self._lan.keys_of(name))  # when it answers that is done

    @property
    def unknown(self) -> list[str]:
        """Machines that have not introduced themselves yet."""
        return [name for name, one in self._machines.items() if not one.is_known]

    async def start(self, command: NodeCommand) -> None:
        """Start one node where it belongs."""
        await self._machines[self._places[command.name]].start(command)

    async def stop(self, name: str) -> None:
        """Ask a node to drain and leave."""
        await self._machines[self._places[name]].stop(name)

    async def kill(self, name: str) -> None:
        """End a node at once."""
        await self._machines[self._places[name]].kill(name)

    async def close(self) -> None:
        """End all nodes, where versions are recorded first."""
        recording = [one for one in self._lan.machines if self._lan.machines[one].roles & AGGREGATING]
        for names in (recording, self._machines.keys() - set(recording)):
            await asyncio.gather(*(self._machines[name].close() for name in names))


def _first(errors: BaseExceptionGroup[ZsflError]) -> ZsflError:
    found = errors.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found


def contents(job: Path, others: Iterable[str]) -> dict[str, bytes]:
    """The job file and what it imports, by name; ConfigError when one cannot be read, or all are too much."""
    try:
        files = {name: (job.parent / name).read_bytes() for name in (job.name, *others)}
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from None
    if sum(map(len, files.values())) > MOST_SENT:
        raise ConfigError(
            f"the job and its files are over {MOST_SENT >> 20} MiB: that is for code; put data on the machines, and "
            "say where it is by env"
        )
    return files
