"""The spills that are in a store which nodes share.

JOB/RUN/NODE/SERIAL-BYTES-SHA256.spills below the store's own place is one object: records as in `zsfl.spill.segments`,
written once, by the node that it is named after. The name says how many bytes there are and what their digest is. So
nothing has to be renamed: what is half written, or was altered, is not what its name says, and no object at all.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from zsfl.errors import SpillCorrupt
from zsfl.ids import NodeId, RunId
from zsfl.settings import NodeSettings
from zsfl.spill.segments import SUFFIX
from zsfl.spill.shared import Shared, opened
from zsfl.wire.fields import STORED_PATTERN

MOST_LISTED = 1 << 16
"""Objects of one run that are looked at; whatever is beyond them is, once these are gone."""
_NODE = r"[0-9a-f]{12}(?:-[0-9a-f]{16})?"
_OBJECT = re.compile(rf"({_NODE})/({STORED_PATTERN}){re.escape(SUFFIX)}")


class Place(NamedTuple):
    """Where an object is: whose it is, and its name without the ending."""

    run: RunId
    node: NodeId
    """That wrote it."""
    name: str

    @property
    def size_bytes(self) -> int:
        """As its name says."""
        return int(self.name.split("-")[1])


def name_of(serial: int, data: bytes) -> str:
    """Of an object with these bytes, the so-manieth of its node."""
    return f"{serial:08d}-{len(data)}-{hashlib.sha256(data).hexdigest()[:32]}"


class ObjectStore(Shared):
    """The objects of one job."""

    def __init__(self, files: Any, root: str, url: str, job: str, deadline_s: float) -> None:
        """`files` is a file system of fsspec, `root` what it calls the place that `url` names."""
        super().__init__(files, f"{root.rstrip('/')}/{job}", url, deadline_s, "spills")

    async def named(self, serial: int, data: bytes) -> str:
        """As `name_of`: of much data, a digest takes long. Not in the threads that a store may keep for itself."""
        return await asyncio.to_thread(name_of, serial, data)

    async def put(self, at: Place, data: bytes) -> None:
        """Returns when the object is in place."""
        await self._call("write", self._put, self._path(at), data)

    async def get(self, at: Place) -> bytes | None:
        """Its bytes; None where it is not there, SpillCorrupt where it is not what its name says."""
        # One byte more would say that it is longer; no more than that, however long it is.
        data = await self._call("read", self._get, self._path(at), at.size_bytes + 1)
        if data is not None and await self.named(int(at.name[:8]), data) != at.name:
            raise SpillCorrupt(f"{self._path(at)} is not what its name says, or not yet: {len(data)} bytes are there")
        return data

    async def delete(self, places: Iterable[Place]) -> None:
        """Returns when none of these is there."""
        await self._remove([self._path(at) for at in places])

    async def tidy(self, run: RunId, node: NodeId) -> None:
        """Where there are folders, take away those of a node that puts nothing more, as far as they are empty."""
        if self._has_folders:
            folder = f"{self._root}/{run}/{node}"
            await self._call("delete", self._tidy, [folder, folder.rpartition("/")[0], self._root])

    async def tidy_all(self, run: RunId) -> None:
        """The same of all nodes, of which some were ended before they could."""
        if self._has_folders:
            await self._call("delete", self._tidy_below, f"{self._root}/{run}")

    async def found(self, run: RunId) -> list[Place]:
        """What there is of a run, by name; a store whose listings lag may know of more."""
        return await self._call("list", self._found, run)

    def _path(self, at: Place) -> str:
        if not _OBJECT.fullmatch(f"{at.node}/{at.name}{SUFFIX}"):  # nothing else may become a path
            raise SpillCorrupt(f"{at.node}/{at.name} is no object of a store")
        return f"{self._root}/{at.run}/{at.node}/{at.name}{SUFFIX}"

    def _tidy(self, folders: list[str]) -> None:
        with suppress(Exception):  # the first that is not empty, or not there
            for folder in folders:
                self._files.rmdir(folder)

    def _tidy_below(self, folder: str) -> None:
        with suppress(Exception):  # it is not there
            for below in self._files.ls(folder, detail=False):
                self._tidy([below])
            self._tidy([folder, self._root])

    def _found(self, run: RunId) -> list[Place]:
        paths = self._find(f"{self._root}/{run}")
        names = (_OBJECT.fullmatch(path.rpartition(f"/{run}/")[2]) for path in paths[:MOST_LISTED])
        return [Place(run, NodeId(name[1]), name[2]) for name in names if name]


def store_for(settings: NodeSettings, job: str) -> ObjectStore | None:
    """The store that settings name, of one job; nothing is asked of it yet. None: none is named.

    ConfigError where it cannot be opened.
    """
    if not settings.spill:
        return None
    files, root = opened(settings)
    return ObjectStore(files, root, settings.spill, job, settings.request_s / 2)
