"""Where the processes of a cluster spend their time: a sampling profiler looks at their stacks from outside."""

from __future__ import annotations

import asyncio
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Stacks = Counter[tuple[str, ...]]
"""How often a thread that ran was seen with this stack, outermost frame first, as `function (file:line)`."""

RATE = 100
"""Looks a second at each process."""
MOST_PROCESSES = 4
"""Of one role; more would slow the machine down, and they do the same."""
_FRAME = re.compile(r"(?P<function>.+) \((?P<file>[^()]*?)(:\d+)?\)")

ROOMS = (
    ("spill", ("zsfl/spill/",)),
    ("data", ("zsfl/client/shard.py", "zsfl/learning/batches.py", "zsfl/learning/pictures.py")),
    (
        "arithmetic",
        ("zsfl/learning/", "zsfl/client/local.py", "zsfl/split_server/body.py", "jobs/", "_changed.py"),
    ),
    ("wire", ("zsfl/wire/", "zsfl/tensors/", "zmq/")),
    ("weights", ("zsfl/weights/",)),
    ("presence", ("zsfl/front.py", "zsfl/peers.py", "zsfl/discovery/", "zeroconf/")),
    ("event loop", ("zsfl/lane.py", "zsfl/latest.py")),
    ("roles", ("zsfl/",)),
)
"""What a frame is counted as by its file: the first that fits."""
REST = "event loop"
WAKING = ("select (selectors.py", "poll (zmq/")
"""Innermost frames of a thread that has just been woken. It is seen waiting for a processor, not using one."""


@dataclass(slots=True)
class Sampling:
    """Profilers at work."""

    folder: tempfile.TemporaryDirectory[str]
    running: list[tuple[str, Path, asyncio.Task[None]]]

    async def stacks(self) -> dict[str, Stacks]:
        """By role, once they are done."""
        found: dict[str, Stacks] = {}
        for role, path, task in self.running:
            await task
            if path.exists():
                found.setdefault(role, Counter()).update(parse(path.read_text(encoding="utf-8").splitlines()))
        self.folder.cleanup()
        return found


def profiler() -> str | None:
    """The py-spy beside this Python, or the one on the path."""
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.exists() else shutil.which("py-spy")


def sample(pids: Mapping[str, Sequence[int]], seconds: float) -> Sampling | None:
    """Begin to look at some processes of each role; None without a profiler."""
    if (program := profiler()) is None:
        return None
    folder = tempfile.TemporaryDirectory(prefix="zsfl-bench-stacks-")
    running: list[tuple[str, Path, asyncio.Task[None]]] = []
    for role, some in pids.items():
        for pid in some[:MOST_PROCESSES]:
            path = Path(folder.name) / str(pid)
            running.append((role, path, asyncio.create_task(_look(program, pid, seconds, path))))
    return Sampling(folder, running)


async def _look(program: str, pid: int, seconds: float, path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(program, "record", "--pid", str(pid), "--duration", str(max(1, round(seconds))), "--rate", str(RATE)),
        *("--format", "raw", "--nonblocking", "--output", str(path)),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(seconds + 20):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def parse(lines: Iterable[str]) -> Stacks:
    """What the profiler wrote, `frame;frame;frame count`, without threads that were only woken."""
    stacks: Stacks = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        if stack and count.isdigit() and not any(frame in stack.rpartition(";")[2] for frame in WAKING):
            stacks[tuple(stack.split(";"))] += int(count)
    return stacks


def room_of(stack: Sequence[str]) -> str:
    """What a stack is counted as: by its innermost frame that is of zsfl, of its job or of ZeroMQ."""
    for frame in reversed(stack):
        found = _FRAME.fullmatch(frame)
        file = found["file"] if found else ""
        for room, parts in ROOMS:
            if any(part in file for part in parts):
                return room
    return REST


def shares(stacks: Stacks) -> dict[str, float]:
    """Share of each room in the time that was seen."""
    rooms: Counter[str] = Counter()
    for stack, count in stacks.items():
        rooms[room_of(stack)] += count
    total = rooms.total() or 1
    return {room: count / total for room, count in rooms.most_common()}


def costs(stacks: Stacks, most: int = 12) -> list[tuple[str, float, float]]:
    """The functions with the largest share of their own: name, that share, and the share with all that they call."""
    own: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for stack, count in stacks.items():
        frames = [re.sub(r":\d+\)$", ")", frame) for frame in stack]
        own[frames[-1]] += count
        for frame in set(frames):
            whole[frame] += count
    total = own.total() or 1
    return [(frame, count / total, whole[frame] / total) for frame, count in own.most_common(most)]
