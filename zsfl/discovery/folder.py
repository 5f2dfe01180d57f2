"""A folder that all nodes share: each leaves a small file there, and reads those of the others.

For machines that share a disk and no multicast. Nothing is relied on that a network disk may not have: no locks, no
notices of changes, no common clock. Files are written aside and renamed; how old one is says the disk's own clock, as
the newest file of this node itself was written by it. Who may write there may write anything: hints, and no more.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Annotated

import msgspec

from zsfl.discovery.announced import Announcement, Recogniser, opaque
from zsfl.discovery.events import Candidate
from zsfl.discovery.slow import Slow
from zsfl.ids import HOST_PATTERN, Address, NodeCard, NodeId

LOOK_S = 1.0
"""Between two looks."""
REFRESH_S = 10.0
"""Between two times that a node writes its file."""
STALE_S = 120.0
"""A file that was not written for so long is nobody's any more; network disks may show it as much as a minute late."""
ANSWER_S = 10.0
"""After which it is said that the disk does not answer; it is waited for all the same."""
LEAVE_S = 1.0
"""What a disk may take to remove the file of a node that leaves."""
MAX_FILES = 4096
"""In the folder, whatever they are; further ones are not looked at."""
MAX_FILE_BYTES = 1024
_NODE_ID = "[0-9a-f]{12}(-[0-9a-f]{16})?"
_FILE = re.compile(rf"({_NODE_ID})\.zsfl")
_ASIDE = re.compile(rf"\.{_NODE_ID}\.zsfl")


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a file says."""

    node: Annotated[str, msgspec.Meta(pattern=rf"^{_NODE_ID}\Z")]
    host: Annotated[str, msgspec.Meta(pattern=rf"^{HOST_PATTERN}\Z")]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    job: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
    """As mDNS announces it."""


def read_entry(data: bytes) -> Announcement | None:
    """What a node's file says; None when it makes no sense."""
    try:
        entry = msgspec.json.decode(data, type=_Entry)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    address = Address(f"{entry.host}:{entry.port}")
    return Announcement(address=address, node_id=NodeId(entry.node), job_hash=entry.job)


class Folder:
    """One node in such a folder, or somebody who only looks."""

    def __init__(self, path: Path, card: NodeCard | None = None, ours: Recogniser | None = None) -> None:
        """Without `ours` it tells of the nodes of any job; without a card it leaves no file."""
        self._path = path
        self._ours = ours
        self._own = path / f"{card.id}.zsfl" if card else None
        self._text = b""
        if card and ours:
            job = opaque(card.id, ours.job, ours.protocol, card.role, card.key)
            entry = _Entry(node=card.id, host=card.host, port=card.control_port, job=job)
            self._text = msgspec.json.encode(entry)
        self._written_s = float("-inf")
        self._seen: dict[str, int] = {}
        """When each file was written that was read, in the folder's nanoseconds."""

    async def follow(self, found: Callable[[Candidate], None], note: Callable[[str, str], None]) -> None:
        """Tell `found` of the others whenever they have written, and `note` once what is in the way."""
        looking, is_told, loop = Slow(self.look), False, asyncio.get_running_loop()
        try:
            while True:
                try:
                    if self._text and loop.time() >= self._written_s + REFRESH_S:
                        self._written_s = loop.time()
                        await Slow(self.write).result(ANSWER_S)
                    for seen in await looking.result(ANSWER_S):
                        if isinstance(candidate := self._candidate(seen), Candidate):
                            found(candidate)
                    is_told = False
                except OSError as error:  # TimeoutError, too
                    if not is_told:
                        why = error.strerror or error
                        note(
                            f"nodes are to meet in the folder {self._path}: {why}; trying again every {LOOK_S:g} s",
                            "warning",
                        )
                    is_told = True
                await asyncio.sleep(LOOK_S)
        finally:
            with suppress(OSError):
                await Slow(self.leave).result(LEAVE_S)

    def _candidate(self, seen: Announcement) -> Candidate | str:
        if self._ours is None:
            return Candidate(seen.address, "folder", None, seen.node_id)
        return self._ours.candidate(seen, "folder")

    def write(self) -> None:
        """Write the file of this node; anew each time, which shows everywhere, and whoever has removed it was wrong."""
        if self._own is None:
            return
        self._path.mkdir(parents=True, exist_ok=True)
        aside = self._own.with_name(f".{self._own.name}")
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(self._text)
        os.utime(aside)  # by the disk's clock, which a cached write may not have asked
        aside.replace(self._own)

    def leave(self) -> None:
        """Remove it."""
        if self._own is not None:
            self._own.unlink(missing_ok=True)

    def look(self) -> list[Announcement]:
        """What the others have written since the last look; what is long nobody's is removed."""
        now_ns = self._own.stat().st_mtime_ns if self._own and self._own.exists() else None
        there: dict[str, int] = {}
        found: list[Announcement] = []
        with os.scandir(self._path) as entries:
            for name in _names(islice(entries, MAX_FILES)):
                path = self._path / name
                with suppress(OSError):  # it has gone meanwhile, or is not for us to read
                    written_ns = path.lstat().st_mtime_ns
                    if now_ns is not None and now_ns - written_ns > STALE_S * 1e9:
                        path.unlink()
                    elif named := _FILE.fullmatch(name):
                        there[name] = written_ns
                        if self._own is not None and name == self._own.name:
                            continue
                        if self._seen.get(name) != written_ns and (seen := _read(path, NodeId(named[1]))):
                            found.append(seen)
        self._seen = there
        return found


def _names(entries: Iterator[os.DirEntry[str]]) -> Iterator[str]:
    """Of what nodes leave, whole or not: whatever else lies there is somebody else's."""
    return (entry.name for entry in entries if _FILE.fullmatch(entry.name) or _ASIDE.fullmatch(entry.name))


def _read(path: Path, node_id: NodeId) -> Announcement | None:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return None
        data = file.read(MAX_FILE_BYTES + 1)
    seen = read_entry(data) if len(data) <= MAX_FILE_BYTES else None
    return seen if seen and seen.node_id == node_id else None
