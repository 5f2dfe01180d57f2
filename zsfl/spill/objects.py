"""A store that nodes share: a bucket, or a folder of a shared file system. Through fsspec, which is loaded only here.

JOB/RUN/NODE/SERIAL-BYTES-SHA256.spills below the store's own place is one object: records as in `zsfl.spill.segments`,
written once, by the node that it is named after. The name says how many bytes there are and what their digest is. So
nothing has to be renamed: what is half written, or was altered, is not what its name says, and no object at all.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar

from zsfl.errors import ConfigError, SpillCorrupt, StoreAway
from zsfl.ids import NodeId, RunId
from zsfl.settings import NodeSettings
from zsfl.spill.segments import SUFFIX
from zsfl.wire.fields import STORED_PATTERN

AT_ONCE = 8
"""Calls of one node that a store may be busy with; others wait."""
DELETED_AT_ONCE = 64
"""By one call, one after the other."""
MOST_LISTED = 1 << 16
"""Objects of one run that are looked at; whatever is beyond them is, once these are gone."""
_NODE = r"[0-9a-f]{12}(?:-[0-9a-f]{16})?"
_OBJECT = re.compile(rf"({_NODE})/({STORED_PATTERN}){re.escape(SUFFIX)}")
_Result = TypeVar("_Result")


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


class ObjectStore:
    """The objects of one job. A call of it takes `deadline_s` at most, off the loop; StoreAway where it fails."""

    def __init__(self, files: Any, root: str, url: str, job: str, deadline_s: float) -> None:
        """`files` is a file system of fsspec, `root` what it calls the place that `url` names."""
        self._files = files
        self._root = f"{root.rstrip('/')}/{job}"
        self.url = url
        self._deadline_s = deadline_s
        self._threads = ThreadPoolExecutor(AT_ONCE, "zsfl-store")
        # Those that are asynchronous inside let go of a call in time, so that its thread is free again; object stores
        # are, and have no folders.
        self._timed: dict[str, float] = {"timeout": deadline_s} if files.async_impl else {}
        self._has_folders = not files.async_impl

    async def named(self, serial: int, data: bytes) -> str:
        """As `name_of`: of much data, a digest takes long. Not in the threads that a store may keep for itself."""
        return await asyncio.to_thread(name_of, serial, data)

    async def put(self, at: Place, data: bytes) -> None:
        """Returns when the object is in place."""
        await self._call("write", self._put, self._path(at), data)

    async def get(self, at: Place) -> bytes | None:
        """Its bytes; None where it is not there, SpillCorrupt where it is not what its name says."""
        data = await self._call("read", self._get, self._path(at), at.size_bytes)
        if data is not None and await self.named(int(at.name[:8]), data) != at.name:
            raise SpillCorrupt(f"{self._path(at)} is not what its name says, or not yet: {len(data)} bytes are there")
        return data

    async def delete(self, places: Iterable[Place]) -> None:
        """Returns when none of these is there."""
        paths = [self._path(at) for at in places]
        for first in range(0, len(paths), DELETED_AT_ONCE):  # each of them takes its time
            await self._call("delete", self._delete, paths[first : first + DELETED_AT_ONCE])

    async def tidy(self, run: RunId, node: NodeId) -> None:
        """Where there are folders, take away those of a node that puts nothing more, as far as they are empty."""
        if self._has_folders:
            folder = f"{self._root}/{run}/{node}"
            await self._call("delete", self._tidy, [folder, folder.rpartition("/")[0], self._root])

    async def found(self, run: RunId) -> list[Place]:
        """What there is of a run, by name; a store whose listings lag may know of more."""
        return await self._call("list", self._found, run)

    def close(self) -> None:
        """What was not begun is not done any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _path(self, at: Place) -> str:
        if not _OBJECT.fullmatch(f"{at.node}/{at.name}{SUFFIX}"):  # nothing else may become a path
            raise SpillCorrupt(f"{at.node}/{at.name} is no object of a store")
        return f"{self._root}/{at.run}/{at.node}/{at.name}{SUFFIX}"

    def _put(self, path: str, data: bytes) -> None:
        if self._has_folders:
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._files.pipe_file(path, data, **self._timed)

    def _get(self, path: str, size_bytes: int) -> bytes | None:
        try:
            # One byte more would say that it is longer; no more than that, however long it is.
            return self._files.cat_file(path, start=0, end=size_bytes + 1, **self._timed)
        except FileNotFoundError:
            return None

    def _delete(self, paths: list[str]) -> None:
        for path in paths:
            try:
                self._files.rm_file(path, **self._timed)
            except FileNotFoundError:
                continue

    def _tidy(self, folders: list[str]) -> None:
        with suppress(Exception):  # the first that is not empty, or not there
            for folder in folders:
                self._files.rmdir(folder)

    def _found(self, run: RunId) -> list[Place]:
        self._files.invalidate_cache()
        folder = f"{self._root}/{run}"
        try:
            paths: list[str] = self._files.find(folder, **self._timed)
        except FileNotFoundError:
            return []
        names = (_OBJECT.fullmatch(path.rpartition(f"/{run}/")[2]) for path in sorted(paths)[:MOST_LISTED])
        return [Place(run, NodeId(name[1]), name[2]) for name in names if name]

    async def _call(self, does: str, call: Callable[..., _Result], *args: Any) -> _Result:
        loop = asyncio.get_running_loop()
        try:
            # A little longer than the store itself is given: its own error says more.
            async with asyncio.timeout(1.1 * self._deadline_s):
                return await loop.run_in_executor(self._threads, partial(call, *args))
        except TimeoutError:
            why = f"no answer within {self._deadline_s:g} s"
        except Exception as error:  # each of fsspec's many has errors of its own
            why = f"{type(error).__name__}: {error}"
        raise StoreAway(
            f"cannot {does} spills in {self.url}: {why}; check that it can be reached from here, and what this node "
            "may do there (its credentials come from fsspec's own configuration, or the environment)"
        )


def store_for(settings: NodeSettings, job: str) -> ObjectStore | None:
    """The store that settings name, of one job; nothing is asked of it yet. None: none is named.

    ConfigError where it cannot be opened.
    """
    if not (url := settings.spill):
        return None
    try:
        from fsspec.core import url_to_fs

        files, root = url_to_fs(url if "://" in url else f"file://{url}", skip_instance_cache=True)
    except ImportError as error:
        raise ConfigError(f"spills cannot go to {url}: {error}; install it with: pip install 'zsfl[store]'") from None
    except Exception as error:  # each file system has errors of its own
        raise ConfigError(f"spills cannot go to {url}: {error}; correct --spill") from None
    return ObjectStore(files, root, url, job, settings.request_s / 2)
