"""What commands do when nobody reads what they print any more, as in `zsfl keys list | head -1`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.jobs import write_job
from helpers.waiting import HANG_S, eventually

from zsfl.cluster.leaving import drain
from zsfl.ids import Address
from zsfl.wire.sockets import is_free

COMMANDS = {
    "keys": ("keys", "show", "--keys", "keys"),
    "help": ("--help",),
    "version": ("--version",),
    "demo": ("demo", "--print-job"),
    "invite": ("invite", "--keys", "keys"),
    "serve": ("bench", "--serve"),
    "bench": ("bench", "tiny.py", "--seconds", "0.01"),
    "baseline": ("baseline", "fedavg", "tiny.py", "--rounds", "1"),
}


@contextmanager
def started(*args: str, cwd: Path, err: int = subprocess.PIPE) -> Iterator[subprocess.Popen[bytes]]:
    """A command whose standard output nobody reads, from its first byte on."""
    read, write = os.pipe()
    os.close(read)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "zsfl", *args]
    try:
        with subprocess.Popen(command, cwd=cwd, env=buffered, stdout=write, stderr=err) as one:
            try:
                yield one
            finally:
                one.kill()
    finally:
        os.close(write)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_quietly(name: str, tmp_path: Path) -> None:
    write_job(tmp_path)
    with started(*COMMANDS[name], cwd=tmp_path) as command:
        _, err = command.communicate(timeout=HANG_S)
    assert (command.returncode, err) == (141, b"")


def test_also_when_nobody_reads_its_errors(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        with started("audit", "nowhere", cwd=tmp_path, err=write) as command:
            assert command.wait(HANG_S) == 141
    finally:
        os.close(write)


async def test_a_node_goes_on_when_nobody_watches_any_more(tmp_path: Path) -> None:
    write_job(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with started("node", "split-server", "tiny.py", "--port", str(port), "--no-mdns", cwd=tmp_path) as node:
        await eventually(lambda: node.poll() is not None or not is_free("127.0.0.1", port))
        name = await drain(Address(f"127.0.0.1:{port}"), HANG_S)
        _, err = node.communicate(timeout=HANG_S)
    assert name.startswith("split-server"), err
    assert (node.returncode, err) == (0, b"")
