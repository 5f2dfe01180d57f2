"""A folder where nodes meet: what lies there is read with care, and what is nobody's goes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from helpers.waiting import eventually

from zsfl.discovery import folder as folders
from zsfl.discovery.announced import Recogniser
from zsfl.discovery.events import Candidate
from zsfl.discovery.folder import MAX_FILE_BYTES, STALE_S, Folder
from zsfl.ids import Address, NodeCard, NodeId, Role

OURS = Recogniser("job-under-test", 1)
ONE, TWO, THREE = (NodeId(12 * letter) for letter in "abc")


def card(node_id: NodeId, port: int, role: Role = Role.CLIENT) -> NodeCard:
    return NodeCard(id=node_id, name=f"name-{node_id}", role=role, host="127.0.0.1", control_port=port)


def left(path: Path, node_id: NodeId, port: int, ours: Recogniser = OURS) -> Path:
    """The file of a node that has come."""
    Folder(path, card(node_id, port, Role.SPLIT_SERVER), ours).write()
    return path / f"{node_id}.zsfl"


def aged(file: Path, seconds: float) -> None:
    """As if it had been written then, by the folder's clock."""
    then = file.stat().st_mtime - seconds
    os.utime(file, (then, then))


async def test_nodes_find_one_another_and_leave_nothing_behind(tmp_path: Path) -> None:
    path, found, notes = tmp_path / "made" / "by them", dict[str, set[Candidate]](), list[str]()

    def following(node_id: NodeId, port: int, role: Role) -> asyncio.Task[None]:
        hear: Callable[[Candidate], None] = found.setdefault(node_id, set()).add
        note: Callable[[str, str], None] = lambda said, _: notes.append(said)  # noqa: E731
        return asyncio.create_task(Folder(path, card(node_id, port, role), OURS).follow(hear, note))

    tasks = [following(ONE, 4001, Role.CLIENT), following(TWO, 4002, Role.SPLIT_SERVER)]
    await eventually(lambda: all(found.values()))
    assert found == {
        ONE: {Candidate(Address("127.0.0.1:4002"), "folder", Role.SPLIT_SERVER, TWO)},
        TWO: {Candidate(Address("127.0.0.1:4001"), "folder", Role.CLIENT, ONE)},
    }
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert list(path.iterdir()) == []
    assert notes == []


def test_a_node_is_told_of_again_when_it_has_written_again(tmp_path: Path) -> None:
    looking = Folder(tmp_path, card(ONE, 4001), OURS)
    looking.write()
    file = left(tmp_path, TWO, 4002)
    assert [seen.address for seen in looking.look()] == ["127.0.0.1:4002"]
    assert looking.look() == []
    aged(file, -1)
    assert [seen.address for seen in looking.look()] == ["127.0.0.1:4002"]


def test_what_is_long_nobodys_is_passed_over_and_removed(tmp_path: Path) -> None:
    looking = Folder(tmp_path, card(ONE, 4001), OURS)
    looking.write()
    old, quiet, torn = (left(tmp_path, TWO, 4002), left(tmp_path, THREE, 4003), tmp_path / ".dddddddddddd.zsfl")
    torn.write_bytes(b"{")
    foreign = tmp_path / "my_job.py"
    foreign.write_text("")
    for file in (old, torn, foreign):
        aged(file, STALE_S + 1)
    aged(quiet, STALE_S - 30)
    # It is the folder's clock that counts: this machine may be an hour off.
    assert [seen.node_id for seen in looking.look()] == [THREE]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"{ONE}.zsfl", quiet.name, foreign.name])


def test_who_only_looks_removes_nothing_and_sees_the_nodes_of_all_jobs(tmp_path: Path) -> None:
    aged(left(tmp_path, TWO, 4002, Recogniser("another", 1)), 2 * STALE_S)
    (seen,) = Folder(tmp_path).look()
    assert (seen.address, seen.node_id) == ("127.0.0.1:4002", TWO)
    assert len(list(tmp_path.iterdir())) == 1


GOOD = {"node": TWO, "host": "127.0.0.1", "port": 4002, "job": 32 * "0"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        msgspec.json.encode({**GOOD, "node": THREE}),
        msgspec.json.encode({**GOOD, "host": "example.org"}),
        msgspec.json.encode({**GOOD, "port": 0}),
        msgspec.json.encode({**GOOD, "job": "x"}),
        msgspec.json.encode({**GOOD, "more": 1}),
        msgspec.json.encode(GOOD) + b" " * MAX_FILE_BYTES,
    ],
)
def test_what_makes_no_sense_is_passed_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / f"{TWO}.zsfl").write_bytes(content)
    left(tmp_path, ONE, 4001)
    assert [seen.node_id for seen in Folder(tmp_path).look()] == [ONE]


def test_what_is_no_file_holds_nothing_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"{ONE}.zsfl")
    (tmp_path / f"{TWO}.zsfl").mkdir()
    (tmp_path / "target").write_bytes(msgspec.json.encode({**GOOD, "node": THREE}))
    (tmp_path / f"{THREE}.zsfl").symlink_to(tmp_path / "target")
    assert Folder(tmp_path).look() == []


def test_of_a_flood_of_files_only_so_many_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for node_id, port in ((ONE, 4001), (TWO, 4002), (THREE, 4003)):
        left(tmp_path, node_id, port)
    monkeypatch.setattr(folders, "MAX_FILES", 2)
    assert len(Folder(tmp_path).look()) == 2


async def test_a_folder_that_cannot_be_used_is_told_of_once_and_used_once_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "LOOK_S", 0.01)
    monkeypatch.setattr(folders, "REFRESH_S", 0.0)
    path, found, notes = tmp_path / "meet", list[Candidate](), list[str]()
    path.write_text("a file")
    looking, turns = Folder(path, card(ONE, 4001), OURS), list[int]()
    write = looking.write
    monkeypatch.setattr(looking, "write", lambda: (turns.append(1), write()))
    task = asyncio.create_task(looking.follow(found.append, lambda said, _: notes.append(said)))
    await eventually(lambda: len(turns) > 3)
    assert notes == [f"nodes are to meet in the folder {path}: File exists; trying again every 0.01 s"]
    path.unlink()
    path.mkdir()
    left(path, TWO, 4002)
    await eventually(lambda: found)
    task.cancel()
    await asyncio.wait([task])
    assert len(notes) == 1
