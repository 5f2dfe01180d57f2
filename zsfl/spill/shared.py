"""A folder of a store that nodes share: a bucket, or a folder of a shared file system. Through fsspec, which is loaded
only here.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from zsfl.errors import ConfigError, StoreAway
from zsfl.settings import NodeSettings

AT_ONCE = 8
"""Calls of one node that a store may be busy with; others wait."""
DELETED_AT_ONCE = 64
"""By one call, one after the other."""
ASIDE = ".tmp"
"""What is written before it gets its name."""
_Result = TypeVar("_Result")


class Shared:
    """A call of it takes `deadline_s` at most, off the loop; StoreAway where it fails."""

    def __init__(self, files: Any, root: str, url: str, deadline_s: float, what: str) -> None:
        """`files` is a file system of fsspec, `root` what it calls the place below what `url` names; `what` is there,
        for people.
        """
        from fsspec.implementations.local import LocalFileSystem

        self._files = files
        self._root = root
        self.url = url
        self._what = what
        self._deadline_s = deadline_s
        self._threads = ThreadPoolExecutor(AT_ONCE, "zsfl-store")
        # Those that are asynchronous inside let go of a call in time, so that its thread is free again; object stores
        # are, and have no folders.
        self._timed: dict[str, float] = {"timeout": deadline_s} if files.async_impl else {}
        self._has_folders = not files.async_impl
        self._links = isinstance(files, LocalFileSystem)
        """A file can be given a name that nothing has, and so is whole under it."""

    async def write(self, name: str, data: bytes) -> None:
        """Returns when that is in place, whatever was there."""
        await self._call("write", self._put, f"{self._root}/{name}", data)

    async def create(self, name: str, data: bytes) -> bool:
        """The same where nothing was there; whether it was so."""
        return await self._call("write", self._create, f"{self._root}/{name}", data)

    async def read(self, name: str, size_bytes: int) -> bytes | None:
        """What is there, no more than so many bytes; None: nothing is."""
        return await self._call("read", self._get, f"{self._root}/{name}", size_bytes)

    async def remove(self, names: Iterable[str]) -> None:
        """Returns when none of these is there; they go in this order."""
        await self._remove([f"{self._root}/{name}" for name in names])

    async def names(self) -> list[str]:
        """Of all that is there, in order."""
        found = await self._call("list", self._find, self._root)
        return [path.rpartition("/")[2] for path in found]

    async def creates_once(self) -> bool:
        """Whether of two who create the same only one does."""
        return await self._call("write", self._probe, f"{self._root}/probe-{secrets.token_hex(8)}{ASIDE}")

    def close(self) -> None:
        """What was not begun is not done any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _remove(self, paths: list[str]) -> None:
        for first in range(0, len(paths), DELETED_AT_ONCE):  # each of them takes its time
            await self._call("delete", self._delete, paths[first : first + DELETED_AT_ONCE])

    # --- in a thread ------------------------------------------------------------------------------------

    def _put(self, path: str, data: bytes) -> None:
        if self._has_folders:
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._files.pipe_file(path, data, **self._timed)

    def _create(self, path: str, data: bytes) -> bool:
        if self._links:
            aside = f"{path}.{secrets.token_hex(4)}{ASIDE}"
            self._put(aside, data)
            try:
                self._files.link(aside, path)
            except FileExistsError:
                return False
            finally:
                with suppress(OSError):
                    self._files.rm_file(aside)
            return True
        if self._has_folders:
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        try:
            self._files.pipe_file(path, data, mode="create", **self._timed)
        except FileExistsError:
            return False
        except Exception:  # each store says it in its own way
            if self._get(path, 1) is not None:
                return False
            raise
        return True

    def _probe(self, path: str) -> bool:
        from fsspec import AbstractFileSystem

        # That of all looks first, and then writes.
        is_own = self._files.async_impl or type(self._files).pipe_file is not AbstractFileSystem.pipe_file
        is_safe = self._links or is_own
        try:
            try:
                is_new = self._create(path, b"1")
            except OSError:
                if not self._links:
                    raise
                self._links = is_safe = False  # as on some shared file systems
                is_new = self._create(path, b"1")
            return is_new and not self._create(path, b"2") and is_safe
        finally:
            self._delete([path])
            if self._has_folders:
                with suppress(Exception):  # there may be something in it
                    self._files.rmdir(path.rpartition("/")[0])

    def _get(self, path: str, size_bytes: int) -> bytes | None:
        try:
            return self._files.cat_file(path, start=0, end=size_bytes, **self._timed)
        except FileNotFoundError:
            return None

    def _delete(self, paths: list[str]) -> None:
        for path in paths:
            try:
                self._files.rm_file(path, **self._timed)
            except FileNotFoundError:
                continue

    def _find(self, folder: str) -> list[str]:
        self._files.invalidate_cache()
        try:
            return sorted(self._files.find(folder, **self._timed))
        except FileNotFoundError:
            return []

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
            f"cannot {does} {self._what} in {self.url}: {why}; check that it can be reached from here, and what this "
            "node may do there (its credentials come from fsspec's own configuration, or the environment)"
        )


def opened(settings: NodeSettings) -> tuple[Any, str]:
    """The file system of the store that settings name, and what it calls that place; nothing is asked of it yet.

    ConfigError where it cannot be opened.
    """
    url = settings.spill
    try:
        from fsspec.core import url_to_fs

        files, root = url_to_fs(url if "://" in url else f"file://{url}", skip_instance_cache=True)
    except ImportError as error:
        raise ConfigError(f"spills cannot go to {url}: {error}; install it with: pip install 'zsfl[store]'") from None
    except Exception as error:  # each file system has errors of its own
        raise ConfigError(f"spills cannot go to {url}: {error}; correct --spill") from None
    return files, root.rstrip("/")
