"""Folders that cannot be written to for a while."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing in `folder` can be opened for writing, made or deleted meanwhile: root, who may write everywhere, sees a
    mount that is read-only, and anybody else has no permission.
    """
    if os.geteuid():
        modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*"))}
        for path, mode in modes.items():
            path.chmod(mode & ~0o222)
        try:
            yield
        finally:
            for path, mode in modes.items():
                if path.exists():
                    path.chmod(mode)
        return
    if _run("mount", "--bind", folder, folder):
        pytest.skip("this is root, who may write everywhere, and may not mount a folder read-only here")
    try:
        assert _run("mount", "-o", "remount,bind,ro", folder) == 0
        yield
    finally:
        assert _run("umount", "--lazy", folder) == 0  # lazily, as somebody may be reading there


@contextmanager
def small(folder: Path, size_mib: int) -> Iterator[None]:
    """`folder` is a disk of its own meanwhile, of so many MiB."""
    folder.mkdir()
    if os.geteuid() or _run("mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", folder):
        pytest.skip("no disk can be mounted here: that takes root, and the right to mount")
    try:
        yield
    finally:
        assert _run("umount", "--lazy", folder) == 0


def _run(*command: str | Path) -> int:
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode
