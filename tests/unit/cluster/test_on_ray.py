"""Clusters on Ray, as far as that needs no Ray."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import write_job

from zsfl.cli import main
from zsfl.cluster.on_ray import actors
from zsfl.cluster.on_ray.actors import Directory
from zsfl.cluster.talk import Printed
from zsfl.reports import Exited, Note, Ready, to_line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max", "3"], "--max is for --on ray"),
        (["--address", "auto"], "--address is for --on ray"),
        (["--on", "ray", "--in-process"], "leave out either"),
        (["--on", "ray", "--min", "3", "--max", "2"], "from 3 to 2 split servers, 3 at first, cannot be"),
        (["--on", "ray", "--host", "192.168.1.5"], "--host is not for --on ray: Ray says where machines are"),
        (["--on", "ray", "--standbys", "1"], "--standbys is not for --on ray"),
        (["--on", "ray", "--address", "ray://head:10001"], "ray job submit"),
        (["--on", "ray", "--address", "head"], "expected HOST:PORT"),
        (["--on", "ray"], "pip install 'zsfl[ray]'"),
    ],
)
def test_what_cannot_be_is_refused(
    flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)
    assert main(["up", str(write_job(tmp_path)), *flags]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_file_of_machines_is_not_for_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lan.toml").touch()
    assert main(["up", str(tmp_path / "lan.toml"), "--on", "ray"]) == 2
    assert "says which machines there are" in capsys.readouterr().err


def ready(node: str, role: str, address: str) -> bytes:
    return to_line(Ready(node=node, role=role, address=address, pid=1))


async def test_the_directory_knows_the_newest_addresses_and_who_is_gone() -> None:
    directory = Directory()
    await directory.tell(ready("server", "split-server", "10.0.0.2:1"))
    await directory.tell(ready("client", "client", "10.0.0.3:1"))
    await directory.tell(ready("aggregator", "aggregator", "10.0.0.1:1"))
    await directory.tell(ready("server", "split-server", "10.0.0.4:2"))
    await directory.tell(to_line(Exited(node="client", code=-9)))
    assert await directory.addresses("client") == ("10.0.0.1:1", "10.0.0.4:2")
    assert await directory.addresses("aggregator") == ("10.0.0.4:2",)
    assert len(await directory.told()) == 5
    waiting = asyncio.ensure_future(directory.told())
    await asyncio.sleep(0)
    assert not waiting.done()
    await directory.tell(b"what only the cluster knows")
    assert await waiting == [b"what only the cluster knows"]


async def test_of_what_nobody_reads_the_oldest_for_people_alone_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "MOST_WAITING", 3)
    directory = Directory()
    lines: list[Any] = [Exited(node="a", code=0), Note(message="1"), Printed(node="a", line="2"), Note(message="3")]
    for line in lines:
        await directory.tell(to_line(line))
    assert await directory.told() == [to_line(line) for line in (lines[0], *lines[2:])]
