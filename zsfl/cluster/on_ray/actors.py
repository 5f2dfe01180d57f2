"""What runs in the processes of Ray: a node each, and the directory in which they find one another."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import io
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from zsfl.cluster.talk import Printed
from zsfl.ids import PROTOCOL, Role
from zsfl.keys.secret import keys_folder, own_keys
from zsfl.keys.trusted import trust_as
from zsfl.reports import Exited, Failed, Following, Met, Note, Ready, Report, Tested, Waiting, WindowReport, from_line
from zsfl.settings import load_settings

NAMESPACE = "zsfl"
"""Of the names of all actors."""
MOST_WAITING = 1 << 16
"""Lines that nobody has asked for yet; of more the oldest of those for people alone are dropped."""
LOOK_S = 0.2
"""How often to see whether Ray is still there."""
MOST_KNOWN = 16
"""Addresses that a node is told."""
_SHOWN = tuple(
    f'{{"event":"{kind.__struct_config__.tag}"'.encode()
    for kind in (Printed, WindowReport, Following, Tested, Waiting, Note, Met)
)


class Directory:
    """An actor that has a name: where each node is by now, and what all of them tell whoever started them."""

    def __init__(self) -> None:
        self._addresses: dict[str, tuple[str, str]] = {}
        """Role and address by name."""
        self._lines: deque[bytes] = deque()
        self._news = asyncio.Event()

    async def tell(self, line: bytes) -> None:
        """One report more, as a line of JSON; returns when it is kept."""
        with contextlib.suppress(msgspec.MsgspecError):  # what only the cluster itself is told
            match from_line(line):
                case Ready(node=node, role=role, address=address):
                    self._addresses[node] = (role, address)
                case Exited(node=node):
                    self._addresses.pop(node, None)
                case _:
                    pass
        if len(self._lines) >= MOST_WAITING and (shown := next(filter(_is_shown, self._lines), None)):
            self._lines.remove(shown)
        self._lines.append(line)
        self._news.set()

    async def told(self) -> list[bytes]:
        """What has been told since this was asked last, once there is something."""
        await self._news.wait()
        self._news.clear()
        lines, self._lines = list(self._lines), deque()
        return lines

    async def addresses(self, but: str) -> tuple[str, ...]:
        """Where the others are, an aggregator first."""
        others = [told for name, told in self._addresses.items() if name != but]
        return tuple(address for _, address in sorted(others, key=lambda told: told[0] != Role.AGGREGATOR))[:MOST_KNOWN]


def _is_shown(line: bytes) -> bool:
    return line.startswith(_SHOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a node's actor is made with, each time that Ray starts it."""

    name: str
    role: Role
    directory: str
    """Name of the actor."""
    folder: str
    """Where it works, below the home folder of its machine."""
    job: str
    files: Mapping[str, bytes]
    """The job's own, and what it imports."""
    env: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where a node's actor is."""

    host: str
    """Its address, as Ray has it."""
    protocol: int
    version: str
    """Of zsfl."""
    key: str
    """Empty where none are used."""


class NodeActor:
    """One node, in a process of its own; when that dies, Ray starts another, which waits until it is told to run."""

    def __init__(self, given: Given) -> None:
        self._directory = _ray().get_actor(given.directory, namespace=NAMESPACE)
        self._given = given
        self._running = False
        self._asked = threading.Event()
        self._ask: Callable[[], None] = lambda: None
        os.environ.update(given.env)
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()

    def meet(self, keys: str | None) -> Machine:
        """Where this is, and who, with the keys in that folder, empty the one that it uses by itself; None: without.

        A node that runs here counts as ended, as for a moment whoever started it could not reach it: so it ends.
        """
        if self._running:
            os._exit(1)
        key = "" if keys is None else own_keys(_folder(keys)).public
        host = str(_ray().util.get_node_ip_address())
        return Machine(host=host, protocol=PROTOCOL, version=version("zsfl"), key=key)

    def trust(self, keys: str, machines: Iterable[tuple[str, str, frozenset[Role]]]) -> None:
        """Trust these, by key, name, and what they may be, from now on."""
        folder = _folder(keys)
        own = own_keys(folder).public
        for key, name, roles in machines:
            if key != own:
                trust_as(folder, key, name, roles)

    def run(self, flags: Mapping[str, Any], keys: str | None) -> int:
        """Run the node until it ends, and its last report is kept; the exit code."""
        self._running, code = True, 1
        given = self._given
        place = Path.home() / given.folder / given.name
        try:
            for name, data in given.files.items():
                file = place / "job" / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
            os.chdir(place)
            others = _ray().get(self._directory.addresses.remote(given.name)) or flags.get("peers")
            used = {} if keys is None else {"keys": str(_folder(keys))}
            code = self._run(place / "job" / given.job, {**flags, "peers": others, **used})
        except OSError as error:
            self._say(
                Failed(node=given.name, kind="StorageError", message=f"cannot write in {place}: {error.strerror}")
            )
        finally:
            _ray().get(self._say(Exited(node=given.name, code=code)))
        if code == 0:
            _tidy(place)
        return code

    def _run(self, job: Path, flags: Mapping[str, Any]) -> int:
        from zsfl.roles import run_node

        printed = _Printed(lambda line: self._say(Printed(node=self._given.name, line=line)))
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return run_node(self._given.role, job, flags, self._say, self._listen)

    def stop(self) -> None:
        """Have the node drain and leave."""
        self._asked.set()
        self._ask()

    def _listen(self, asked: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()

        def ask() -> None:
            with contextlib.suppress(RuntimeError):  # it has ended
                loop.call_soon_threadsafe(asked)

        self._ask = ask
        if self._asked.is_set():
            asked()

    def _say(self, report: Report) -> Any:
        return self._directory.tell.remote(msgspec.json.encode(report))


def _end_with(parent: int) -> None:
    """End this process soon after Ray's own on this machine: by then Ray starts the node again on another one."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)


def _ray() -> Any:
    return importlib.import_module("ray")


class _Printed(io.TextIOBase):
    """What is printed, line by line."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        self._tell = tell
        self._rest = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._tell(line)
        return len(text)


def _folder(keys: str) -> Path:
    """The folder that is named, else the one that variables and settings of this machine name."""
    return keys_folder(load_settings({"keys": keys or None}, os.environ).keys).absolute()


def _tidy(place: Path) -> None:
    """Take away what was put there; spills that still count stay."""
    os.chdir(Path.home())
    shutil.rmtree(place / "job", ignore_errors=True)
    with contextlib.suppress(OSError):  # something is left
        for folder in (place / "runs" / "spills", place / "runs", place, place.parent):
            with contextlib.suppress(FileNotFoundError):
                folder.rmdir()
