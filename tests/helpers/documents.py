"""Markdown pages as what a reader would type: their files written, their commands run, on machines of their own."""

from __future__ import annotations

import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from helpers import jobs
from helpers.waiting import HANG_S, POLL_S

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$|^(<!-- all of these end here -->)$", re.MULTILINE | re.DOTALL)

KEEPS_ON = (
    (r"zsfl node \S+", r"\d+\.\d+\.\d+\.\d+:\d+"),
    (r"zsfl invite", r"zsfl join (\S+)"),
    (r"zsfl dash|zsfl (up|demo) .*--dash", r"http://"),
    (r"zsfl top", r"joined"),
    (r"zsfl bench --serve", r":7710"),
    (r"tensorboard", r"http://"),
)
"""Commands that do not end by themselves, and what they say once they are of use to the next one."""
MANY = "100000"
"""Rounds of nodes that go on until somebody ends them."""
UNHURRIED = f"\nimport os\nif os.environ.get('ZSFL_ROUNDS') == {MANY!r}:\n" + textwrap.indent(jobs.UNHURRIED, "    ")
"""Added to jobs, so that nodes which go on while the reader reads leave the processor to others."""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block; of the language `end` it is the mark at which a reader has ended what is still running."""

    language: str
    text: str

    @property
    def file(self) -> str:
        """What it is to be called, when its first line says so."""
        named = re.match(r"# ([\w.-]+\.(?:py|toml|yaml))$", self.text, re.MULTILINE)
        return named[1] if named else ""

    def lines(self) -> Iterator[str]:
        """Commands, without comments; `\\` at the end of a line continues it."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield line if "#" not in line else line[: line.index("#")].strip() or shlex.join(words)


def blocks(page: Path) -> list[Block]:
    """What is fenced in a page, in order."""
    found: list[Block] = []
    for indent, language, text, mark in BLOCK.findall(page.read_text(encoding="utf-8")):
        found.append(Block("end", "") if mark else Block(language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE)))
    return found


class Running:
    """A command in a terminal of its own."""

    def __init__(self, line: str, prefix: Sequence[str], folder: Path, env: dict[str, str]) -> None:
        self.line = line
        self._said: list[str] = []
        ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [*prefix, "bash", "-c", line],
            cwd=folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self._reader = threading.Thread(target=self._read, args=(ours,), daemon=True)
        self._reader.start()

    @property
    def said(self) -> str:
        """All of it so far, without colours."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", "".join(self._said))

    def _read(self, terminal: int) -> None:
        with suppress(OSError):  # what reading a terminal ends with, when nobody writes to it any more
            while said := os.read(terminal, 1 << 16):
                self._said.append(said.decode(errors="replace"))
        self.process.wait()  # to hang up on who has closed its output, and has not ended yet, would kill it
        os.close(terminal)

    def until(self, pattern: str) -> re.Match[str]:
        """What it said, once it did."""
        deadline = time.monotonic() + HANG_S
        while not (found := re.search(pattern, self.said)):
            assert self.process.poll() is None, f"{self.line!r} ended with {self.process.returncode}:\n{self.said}"
            assert time.monotonic() < deadline, f"{self.line!r} never said {pattern!r}:\n{self.said}"
            time.sleep(POLL_S)
        return found

    def end(self) -> int:
        """Its exit code, once it is over; of a Python program that does not end, where it hangs is in what it said."""
        try:
            self.process.wait(HANG_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGABRT)
            self.process.wait(HANG_S)
        self._reader.join(HANG_S)
        return self.process.returncode

    def interrupt(self) -> None:
        """Ctrl-C."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """For the way out of a test."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(HANG_S)


@dataclass
class Reader:
    """Who follows a page: `places` are folders on machines, by address; what names none runs on the first."""

    places: dict[str, tuple[Path, Sequence[str]]]
    env: dict[str, str]
    running: list[Running] = field(default_factory=list)
    token: str = ""

    def write(self, name: str, text: str) -> None:
        """A file, on all machines."""
        is_job = name.endswith(".py") and re.search(r"^job = ", text, re.MULTILINE)
        for folder, _ in self.places.values():
            (folder / name).write_text(text + UNHURRIED * bool(is_job), encoding="utf-8")

    def follow(self, line: str) -> None:
        """Type a command; an assertion says what was wrong with it."""
        place = self._place(line)
        folder, prefix = self.places[place]
        if line.startswith("cd "):
            self.places[place] = (folder / line.removeprefix("cd "), prefix)
            return
        typed = line.replace("TOKEN", self.token)
        env = {**os.environ, **self.env, "HOME": str(folder.parent), "TERM": "xterm", "COLUMNS": "200"}
        if "zsfl node" in line:
            env["ZSFL_ROUNDS"] = MANY
        command = Running(typed, prefix, folder, env)
        self.running.append(command)
        for pattern, ready in KEEPS_ON:
            if re.match(pattern, line):
                found = command.until(ready)
                self.token = found[1] if found.groups() else self.token
                return
        assert command.end() == 0, f"{typed!r} ended with {command.process.returncode}:\n{command.said}"
        self.running.remove(command)

    def end_all(self) -> None:
        """What is still running ends well by Ctrl-C, an aggregator once it has trained."""
        for command in self.running:
            if "zsfl node aggregator" in command.line:
                command.until(r"\d+/\d+ .*%")
        for command in self.running:
            command.interrupt()
        for command in self.running:
            assert command.end() in (0, 130, -signal.SIGINT), (
                f"{command.line!r} ended with {command.process.returncode}:\n{command.said}"
            )
        self.running.clear()

    def _place(self, line: str) -> str:
        addresses = list(self.places)
        if "zsfl join" in line:
            return addresses[-1]
        named = re.search(r"--host (\S+)", line)
        return named[1] if named else addresses[0]


def environment(folder: Path) -> dict[str, str]:
    """Of a shell in which zsfl is installed."""
    return {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ZSFL_ROUNDS": "1",
        "ZSFL_RESULTS": str(folder),
        "MPLBACKEND": "Agg",
        "PYTHONFAULTHANDLER": "1",
    }
