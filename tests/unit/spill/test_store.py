"""A folder of spills: whole or not there, kept until released."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from zsfl.errors import BadShape, SpillFull, StorageError
from zsfl.ids import Cid, PartName, RunId, Version, step_cid
from zsfl.spill.layout import SpillMeta, decode
from zsfl.spill.store import SpillStore

RUN = RunId("3fa9c1")
TENSORS = {"grad/a": torch.arange(6.0)}


def meta(version: int, shard: int = 0, part: PartName = "body", run: RunId = RUN, n: float = 4.0) -> SpillMeta:
    return SpillMeta(
        cid=step_cid(run, shard, Version(version)),
        part=part,
        version=Version(version),
        n=n,
        samples=4,
        loss_sum=None,
        client="c",
        node="s",
    )


def test_what_was_put_can_be_read_and_is_offered(tmp_path: Path) -> None:
    store = SpillStore(tmp_path / "new" / "folder")
    offer = store.put(meta(2), TENSORS)
    data = store.read((offer.cid, "body"))
    assert data is not None
    assert len(data) == offer.size_bytes
    found, tensors = decode(data)
    assert found == meta(2)
    assert torch.equal(tensors["grad/a"], TENSORS["grad/a"])
    assert store.offers(RUN) == [offer]
    assert store.holds(offer.cid)


def test_offers_are_of_one_run_and_oldest_first(tmp_path: Path) -> None:
    store = SpillStore(tmp_path)
    for version, shard in ((3, 0), (1, 1), (1, 0), (2, 5)):
        store.put(meta(version, shard), TENSORS)
    store.put(meta(1, run=RunId("000000")), TENSORS)
    assert [offer.version for offer in store.offers(RUN)] == [1, 1, 2, 3]
    assert len(store.offers(RunId("000000"))) == 1


def test_a_retried_step_replaces_its_spill(tmp_path: Path) -> None:
    store = SpillStore(tmp_path)
    store.put(meta(1, n=4.0), TENSORS)
    offer = store.put(meta(1, n=5.0), {"grad/a": torch.zeros(100)})
    assert store.offers(RUN) == [offer]
    data = store.read((offer.cid, "body"))
    assert data is not None
    assert decode(data)[0].n == 5.0


def test_only_what_is_named_is_released(tmp_path: Path) -> None:
    store = SpillStore(tmp_path)
    kept = store.put(meta(1, shard=1), TENSORS)
    gone = store.put(meta(1, shard=0), TENSORS)
    store.put(meta(1, shard=0, part="client"), TENSORS)
    (tmp_path / "notes.txt").write_text("mine")
    store.release([gone.cid, step_cid(RUN, 9, Version(9)), Cid("../x")])
    assert store.offers(RUN) == [kept]
    assert not store.holds(gone.cid)
    assert store.read((gone.cid, "body")) is None
    assert {path.name for path in tmp_path.iterdir()} == {f"{kept.cid}.body.safetensors", "notes.txt"}


def test_a_restart_adopts_whole_spills_and_clears_away_halves(tmp_path: Path) -> None:
    offers = [SpillStore(tmp_path).put(meta(version), TENSORS) for version in (1, 2)]
    (tmp_path / f"{step_cid(RUN, 0, Version(3))}.body.tmp").write_bytes(b"half")
    for foreign in ("notes.txt", "x.body.safetensors", f"{offers[0].cid}.tail.safetensors"):
        (tmp_path / foreign).write_bytes(b"")
    (tmp_path / f"{step_cid(RUN, 0, Version(4))}.body.safetensors").mkdir()
    store = SpillStore(tmp_path)
    assert store.offers(RUN) == offers
    assert not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("cid", ["../x", "/etc/passwd", "", "3fa9c1-v00000001-s00000/../../x"])
def test_a_cid_that_is_a_path_never_becomes_a_file(tmp_path: Path, cid: str) -> None:
    folder = tmp_path / "spills"
    store = SpillStore(folder)
    bad = msgspec.structs.replace(meta(1), cid=Cid(cid))
    with pytest.raises(BadShape):
        store.put(bad, TENSORS)
    assert store.read((Cid(cid), "body")) is None
    store.release([Cid(cid)])
    assert list(tmp_path.rglob("*")) == [folder]


def test_a_spill_that_somebody_deleted_is_no_longer_held(tmp_path: Path) -> None:
    store = SpillStore(tmp_path)
    offer = store.put(meta(1), TENSORS)
    (tmp_path / f"{offer.cid}.body.safetensors").unlink()
    assert store.read((offer.cid, "body")) is None
    assert store.offers(RUN) == []


# --- a disk that refuses ---------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="check that it exists and is writable"):
        SpillStore(tmp_path / "file" / "spills")


def test_a_folder_that_vanished_is_said_so_and_nothing_is_held(tmp_path: Path) -> None:
    store = SpillStore(tmp_path / "spills")
    shutil.rmtree(tmp_path / "spills")
    with pytest.raises(StorageError, match=r"cannot write spills in .*spills"):
        store.put(meta(1), TENSORS)
    assert store.offers(RUN) == []


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, SpillFull), (errno.EDQUOT, SpillFull), (errno.EROFS, StorageError)]
)
def test_a_refusal_while_writing_leaves_the_former_spill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[StorageError]
) -> None:
    store = SpillStore(tmp_path)
    offer = store.put(meta(1), TENSORS)
    before = store.read((offer.cid, "body"))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refuse)
        patched.setattr(Path, "unlink", refuse)
        with pytest.raises(kind) as caught:
            store.put(meta(1, n=9.0), TENSORS)
        assert type(caught.value) is kind
    assert store.read((offer.cid, "body")) == before
    assert SpillStore(tmp_path).offers(RUN) == [offer]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for 64 KiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_loses_nothing_that_was_acknowledged(tiny_disk: Path) -> None:
    store = SpillStore(tiny_disk)
    tensors = {"grad/a": torch.zeros(2000)}
    put: list[Cid] = []

    def fill() -> None:
        for version in range(100):
            put.append(store.put(meta(version), tensors).cid)

    with pytest.raises(SpillFull, match=f"no room for another spill in {tiny_disk}: .*free some space"):
        fill()
    assert 3 <= len(put) < 100
    assert [offer.cid for offer in SpillStore(tiny_disk).offers(RUN)] == put
    for cid in put:
        data = store.read((cid, "body"))
        assert data is not None
        decode(data)
    store.release(put[:1])
    store.put(meta(99), tensors)


def test_a_read_only_disk_is_said_so(tiny_disk: Path) -> None:
    store = SpillStore(tiny_disk)
    offer = store.put(meta(1), TENSORS)
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(StorageError, match="Read-only file system; check that it exists and is writable"):
        store.put(meta(2), TENSORS)
    assert store.read((offer.cid, "body")) is not None
    with pytest.raises(StorageError, match="Read-only"):
        store.release([offer.cid])
    assert store.offers(RUN) == [offer] or (tiny_disk / f"{offer.cid}.body.safetensors").exists()


def test_only_one_run_is_kept(tmp_path: Path) -> None:
    store = SpillStore(tmp_path)
    mine = store.put(meta(1), TENSORS)
    store.put(meta(1, run=RunId("000000")), TENSORS)
    SpillStore(tmp_path).put(meta(2, part="client", run=RunId("000001")), TENSORS)
    store = SpillStore(tmp_path)
    assert [store.keep_only(RUN), store.keep_only(RUN)] == [2, 0]
    assert store.offers(RUN) == [mine]
    assert len(list(tmp_path.iterdir())) == 1


# --- a process that is killed ----------------------------------------------------------------------------

WRITER = """
import sys, torch
from pathlib import Path
from zsfl.ids import RunId, Version, step_cid
from zsfl.spill.layout import SpillMeta
from zsfl.spill.store import SpillStore
store = SpillStore(Path(sys.argv[1]))
tensors = {"grad/a": torch.zeros(200_000)}
version = int(sys.argv[2])
while True:
    version += 1
    cid = step_cid(RunId("3fa9c1"), 0, Version(version))
    store.put(SpillMeta(cid=cid, part="body", version=Version(version), n=1.0, samples=1, loss_sum=None,
                        client="c", node="s"), tensors)
    print(version, flush=True)
"""


def test_a_killed_process_leaves_whole_spills_only_and_all_it_acknowledged(tmp_path: Path) -> None:
    acknowledged = 0
    for lines in (1, 7, 20):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(acknowledged)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(lines):
                acknowledged = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            for line in writer.stdout:
                acknowledged = int(line) if line.endswith("\n") else acknowledged
    for path in tmp_path.glob("*.safetensors"):
        decode(path.read_bytes())
    store = SpillStore(tmp_path)
    versions = [offer.version for offer in store.offers(RUN)]
    assert versions[:acknowledged] == list(range(1, acknowledged + 1))
    assert not list(tmp_path.glob("*.tmp"))
