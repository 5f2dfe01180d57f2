"""A folder of spills: whole or not there, kept until released."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from helpers.waiting import HANG_S

from zsfl.errors import BadShape, SpillFull, StorageError
from zsfl.ids import Cid, PartName, RunId, Version, parse_cid, step_cid
from zsfl.learning.averaging import StepShare
from zsfl.spill.index import FRESH_BYTES
from zsfl.spill.layout import SpillMeta, decode
from zsfl.spill.segments import MAX_SEGMENT_BYTES, SUFFIX
from zsfl.spill.store import MOST_DAMAGED, SpillStore

RUN = RunId("3fa9c1")
SMALL = {"grad/a": torch.arange(6.0)}
LARGE = {"grad/a": torch.arange(100_000.0)}
both_sizes = pytest.mark.parametrize("tensors", [SMALL, LARGE], ids=["small", "large"])


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


@both_sizes
def test_what_was_put_can_be_read_and_is_offered(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    store = SpillStore(tmp_path / "new" / "folder")
    offer = store.put(meta(2), tensors)
    data = store.read((offer.cid, "body"))
    assert data is not None
    assert len(data) == offer.size_bytes
    found, stored = decode(data)
    assert found == meta(2)
    assert torch.equal(stored["grad/a"], tensors["grad/a"])
    assert store.offers(RUN) == [offer]
    assert store.holds(offer.cid)


def test_offers_are_of_one_run_and_oldest_first(tmp_path: Path) -> None:
    store = SpillStore(tmp_path)
    for version, shard in ((3, 0), (1, 1), (1, 0), (2, 5)):
        store.put(meta(version, shard), SMALL)
    store.put(meta(1, run=RunId("000000")), SMALL)
    assert [offer.version for offer in store.offers(RUN)] == [1, 1, 2, 3]
    assert len(store.offers(RunId("000000"))) == 1


@pytest.mark.parametrize("before", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("after", [SMALL, LARGE], ids=["small", "large"])
def test_a_retried_step_replaces_its_spill(
    tmp_path: Path, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> None:
    store = SpillStore(tmp_path)
    store.put(meta(1, n=4.0), before)
    offer = store.put(meta(1, n=5.0), after)
    for one in (store, SpillStore(tmp_path)):
        assert one.offers(RUN) == [offer]
        data = one.read((offer.cid, "body"))
        assert data is not None
        assert decode(data)[0].n == 5.0
    store.release([offer.cid])
    assert list(tmp_path.iterdir()) == []


@both_sizes
def test_only_what_is_named_is_released(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    store = SpillStore(tmp_path)
    gone = store.put(meta(1, shard=0), tensors)
    store.put(meta(1, shard=0, part="client"), tensors)
    kept = store.put(meta(1, shard=1), tensors)
    (tmp_path / "notes.txt").write_text("mine")
    store.release([gone.cid, step_cid(RUN, 9, Version(9)), Cid("../x")])
    assert store.offers(RUN) == [kept]
    assert not store.holds(gone.cid)
    assert store.read((gone.cid, "body")) is None
    assert store.read((kept.cid, "body")) is not None
    store.release([kept.cid])
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt"}


def test_a_restart_adopts_whole_spills_and_clears_away_halves(tmp_path: Path) -> None:
    offers = [SpillStore(tmp_path).put(meta(version), tensors) for version, tensors in ((1, LARGE), (2, SMALL))]
    (tmp_path / f"{step_cid(RUN, 0, Version(3))}.body.tmp").write_bytes(b"half")
    for foreign in ("notes.txt", "x.body.safetensors", f"{offers[0].cid}.tail.safetensors", f"notes{SUFFIX}"):
        (tmp_path / foreign).write_bytes(b"")
    for folder in (f"{step_cid(RUN, 0, Version(4))}.body.safetensors", f"00000009{SUFFIX}"):
        (tmp_path / folder).mkdir()
    store = SpillStore(tmp_path)
    assert store.offers(RUN) == offers
    assert not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "notes.txt").exists()


# --- segments --------------------------------------------------------------------------------------------


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


def test_small_spills_share_a_file_that_goes_with_the_last_of_them(tmp_path: Path) -> None:
    store = SpillStore(tmp_path)
    offers = store.put_all([(meta(1, shard), SMALL) for shard in range(300)])
    assert len(segments(tmp_path)) == 1
    assert SpillStore(tmp_path).offers(RUN) == offers
    store.release(offer.cid for offer in offers[1:])
    assert len(segments(tmp_path)) == 1
    store.release([offers[0].cid])
    assert segments(tmp_path) == []
    store.put(meta(2), SMALL)
    assert len(segments(tmp_path)) == 1


def test_a_segment_grows_to_a_bound(tmp_path: Path) -> None:
    store, tensors = SpillStore(tmp_path), {"grad/a": torch.zeros(60_000)}
    offers = [store.put(meta(version), tensors) for version in range(40)]
    sizes = [path.stat().st_size for path in segments(tmp_path)]
    assert len(sizes) == 3
    assert all(size <= MAX_SEGMENT_BYTES + offers[0].size_bytes + 16 for size in sizes)
    assert SpillStore(tmp_path).offers(RUN) == offers
    store.release(offer.cid for offer in offers[:20])
    assert len(segments(tmp_path)) == 2
    assert all(store.read((offer.cid, "body")) for offer in offers[20:])


@pytest.mark.parametrize("kept", [0, 5, 16, 17, 100, -1])
def test_a_torn_last_record_is_cut_off(tmp_path: Path, kept: int) -> None:
    store = SpillStore(tmp_path)
    first = store.put(meta(1), SMALL)
    (path,) = segments(tmp_path)
    whole = path.stat().st_size
    store.put(meta(2), SMALL)
    os.truncate(path, whole + kept if kept >= 0 else path.stat().st_size - 1)
    again = SpillStore(tmp_path)
    assert again.offers(RUN) == [first]
    assert path.stat().st_size == whole
    again.put(meta(3), SMALL)
    assert [offer.version for offer in SpillStore(tmp_path).offers(RUN)] == [1, 3]


def test_an_altered_record_is_passed_over(tmp_path: Path) -> None:
    store = SpillStore(tmp_path)
    offers = store.put_all([(meta(version), SMALL) for version in (1, 2, 3)])
    (path,) = segments(tmp_path)
    data = bytearray(path.read_bytes())
    data[16 + offers[0].size_bytes + 16 + offers[1].size_bytes - 1] ^= 1
    path.write_bytes(data)
    assert [offer.version for offer in SpillStore(tmp_path).offers(RUN)] == [1, 3]


def test_a_torn_segment_with_nothing_whole_goes(tmp_path: Path) -> None:
    (tmp_path / f"00000007{SUFFIX}").write_bytes(b"zsfls")
    store = SpillStore(tmp_path)
    assert segments(tmp_path) == []
    store.put(meta(1), SMALL)
    assert [path.name for path in segments(tmp_path)] == [f"00000008{SUFFIX}"]


def test_a_small_spill_is_at_hand_once_after_it_was_put(tmp_path: Path) -> None:
    store = SpillStore(tmp_path)
    small, large = store.put_all([(meta(1), SMALL), (meta(2), LARGE)])
    assert store.fresh((small.cid, "body")) == store.read((small.cid, "body"))
    assert store.fresh((small.cid, "body")) is None
    assert store.fresh((large.cid, "body")) is None
    offers = [store.put(meta(version), {"grad/a": torch.zeros(60_000)}) for version in range(3, 30)]
    fresh = [data for offer in offers if (data := store.fresh((offer.cid, "body")))]
    assert 0 < sum(map(len, fresh)) <= FRESH_BYTES


# --- merged ones -----------------------------------------------------------------------------------------


def merged(version: int, shards: tuple[int, ...]) -> SpillMeta:
    shares = tuple(
        StepShare(cid=step_cid(RUN, shard, Version(version)), n=4.0, samples=4, client="c") for shard in shards
    )
    whole = {"n": 4.0 * len(shards), "samples": 4 * len(shards), "members": shares}
    return msgspec.structs.replace(meta(version, shards[0]), **whole)


@both_sizes
def test_a_merged_spill_is_held_until_all_its_steps_are_settled(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    store = SpillStore(tmp_path)
    offer = store.put(merged(1, (2, 0, 5)), tensors)
    assert [parse_cid(one).shard for one in offer.members] == [2, 0, 5]
    assert SpillStore(tmp_path).offers(RUN) == [offer]
    for number, cid in enumerate(sorted(offer.members)):
        assert store.holds(cid)
        assert store.read((offer.cid, "merged")) is not None
        assert store.read((offer.cid, "body")) is None
        store.release([cid])
        assert not store.holds(cid)
        assert store.offers(RUN) == [offer] * (number < 2)
    assert list(tmp_path.iterdir()) == []


@both_sizes
def test_a_step_alone_is_held_beside_the_merged_one(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    store = SpillStore(tmp_path)
    together, alone = store.put(merged(1, (2, 0)), tensors), store.put(meta(1, 2), tensors)
    for one in (store, SpillStore(tmp_path)):
        assert len(one.offers(RUN)) == 2
        assert one.read((together.cid, "merged")) != one.read((alone.cid, "body"))
    store.release([alone.cid])
    assert store.offers(RUN) == [together]
    assert store.keep_only(RunId("000000")) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cid", ["../x", "/etc/passwd", "", "3fa9c1-v00000001-s00000/../../x"])
def test_a_cid_that_is_a_path_never_becomes_a_file(tmp_path: Path, cid: str) -> None:
    folder = tmp_path / "spills"
    store = SpillStore(folder)
    bad = msgspec.structs.replace(meta(1), cid=Cid(cid))
    with pytest.raises(BadShape):
        store.put(bad, SMALL)
    assert store.read((Cid(cid), "body")) is None
    store.release([Cid(cid)])
    assert list(tmp_path.rglob("*")) == [folder]


def test_a_spill_that_somebody_deleted_is_no_longer_held(tmp_path: Path) -> None:
    store = SpillStore(tmp_path)
    offer = store.put(meta(1), LARGE)
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
        store.put(meta(1), SMALL)
    assert store.offers(RUN) == []


@both_sizes
@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, SpillFull), (errno.EDQUOT, SpillFull), (errno.EROFS, StorageError)]
)
def test_a_refusal_while_writing_leaves_the_former_spill(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[StorageError],
    tensors: dict[str, torch.Tensor],
) -> None:
    store = SpillStore(tmp_path)
    offer = store.put(meta(1), tensors)
    before = store.read((offer.cid, "body"))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refuse)
        patched.setattr(Path, "unlink", refuse)
        patched.setattr(os, "pwritev", refuse)
        with pytest.raises(kind) as caught:
            store.put(meta(1, n=9.0), tensors)
        assert type(caught.value) is kind
    assert store.read((offer.cid, "body")) == before
    assert SpillStore(tmp_path).offers(RUN) == [offer]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for 2 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("numbers", [2000, 70_000], ids=["small", "large"])
def test_a_full_disk_loses_nothing_that_was_acknowledged(tiny_disk: Path, numbers: int) -> None:
    store = SpillStore(tiny_disk)
    tensors = {"grad/a": torch.zeros(numbers)}
    put: list[Cid] = []

    def fill() -> None:
        for version in range(1000):
            put.append(store.put(meta(version), tensors).cid)

    with pytest.raises(SpillFull, match=f"no room for another spill in {tiny_disk}: .*free some space"):
        fill()
    assert 3 <= len(put) < 1000
    assert [offer.cid for offer in SpillStore(tiny_disk).offers(RUN)] == put
    for cid in put:
        data = store.read((cid, "body"))
        assert data is not None
        decode(data)
    store.release(put)
    store.put(meta(1001), tensors)


def test_a_read_only_disk_is_said_so(tiny_disk: Path) -> None:
    store = SpillStore(tiny_disk)
    offer = store.put(meta(1), LARGE)
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(StorageError, match="Read-only file system; check that it exists and is writable"):
        store.put(meta(2), LARGE)
    assert store.read((offer.cid, "body")) is not None
    with pytest.raises(StorageError, match="Read-only"):
        store.release([offer.cid])
    assert store.offers(RUN) == [offer] or (tiny_disk / f"{offer.cid}.body.safetensors").exists()


@both_sizes
def test_what_a_disk_does_not_let_go_of_is_deleted_once_it_does(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SpillStore(tmp_path)
    offers = [store.put(meta(version), tensors) for version in range(3)]

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        with pytest.raises(StorageError, match="Read-only"):
            store.release([offer.cid for offer in offers])
        assert store.offers(RUN) == []
        assert list(tmp_path.iterdir())
        again = store.put(meta(1), tensors)
    store.release([store.put(meta(4), tensors).cid])
    assert store.offers(RUN) == [again]
    assert len(list(tmp_path.iterdir())) == 1
    store.release([again.cid])
    assert list(tmp_path.iterdir()) == []


def test_only_one_run_is_kept(tmp_path: Path) -> None:
    store = SpillStore(tmp_path)
    mine = store.put(meta(1), SMALL)
    store.put(meta(1, run=RunId("000000")), SMALL)
    SpillStore(tmp_path).put(meta(2, part="client", run=RunId("000001")), SMALL)
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
tensors = {"grad/a": torch.zeros(int(sys.argv[3]))}
version = int(sys.argv[2])
while True:
    version += 1
    cid = step_cid(RunId("3fa9c1"), 0, Version(version))
    store.put(SpillMeta(cid=cid, part="body", version=Version(version), n=1.0, samples=1, loss_sum=None,
                        client="c", node="s"), tensors)
    print(version, flush=True)
"""


@pytest.mark.parametrize("numbers", [20_000, 200_000], ids=["small", "large"])
def test_a_killed_process_leaves_whole_spills_only_and_all_it_acknowledged(tmp_path: Path, numbers: int) -> None:
    acknowledged = 0
    for lines in (1, 7, 20):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(acknowledged), str(numbers)]
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
    for offer in store.offers(RUN):
        assert decode(store.read((offer.cid, "body")) or b"")[0].cid == offer.cid
    assert versions[:acknowledged] == list(range(1, acknowledged + 1))
    assert not list(tmp_path.glob("*.tmp"))


def test_what_is_offered_can_be_told_while_the_disk_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SpillStore(tmp_path)
    offer = store.put(meta(2), SMALL)
    writing, go_on = threading.Event(), threading.Event()
    slow = os.pwritev

    def pwritev(*args: Any) -> int:
        writing.set()
        go_on.wait(HANG_S)
        return slow(*args)

    monkeypatch.setattr(os, "pwritev", pwritev)
    writer = threading.Thread(target=store.put, args=(meta(2, 1), SMALL))
    writer.start()
    try:
        assert writing.wait(HANG_S)
        assert store.offers(RUN) == [offer]
    finally:
        go_on.set()
        writer.join(HANG_S)


@pytest.mark.parametrize("numbers", [2000, 70_000], ids=["small", "large"])
def test_no_more_is_put_than_may_be_until_some_is_released(numbers: int, tmp_path: Path) -> None:
    store = SpillStore(tmp_path, limit_bytes=1 << 20)
    tensors = {"grad/a": torch.zeros(numbers)}
    put: list[Cid] = []

    def fill() -> None:
        for version in range(1000):
            put.append(store.put(meta(version), tensors).cid)

    with pytest.raises(SpillFull, match=r"the 1 MiB that it may take are used up .*--spill-mib"):
        fill()
    used = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert used <= 1 << 20 < used + used // len(put)
    store.release(put)
    assert store.put(meta(1001), tensors)
    with pytest.raises(StorageError, match="never has room") as caught:
        store.put(meta(1002), {"grad/a": torch.zeros(1 << 19)})
    assert not isinstance(caught.value, SpillFull), "there is nothing to wait for"


def test_what_is_damaged_or_gone_is_set_aside_and_what_is_whole_stays(tmp_path: Path) -> None:
    store = SpillStore(tmp_path)
    cids = [store.put(meta(version), {"grad/a": torch.ones(9)}).cid for version in (1, 2)]
    (segment,) = tmp_path.iterdir()
    data = segment.read_bytes()
    segment.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert [store.set_aside((cid, "body")) for cid in cids] == [False, True]
    assert store.set_aside((cids[1], "body")), "it is gone"
    assert [offer.cid for offer in store.offers(RUN)] == cids[:1]
    assert (tmp_path / f"{cids[1]}.body.damaged").is_file()
    assert [offer.cid for offer in SpillStore(tmp_path).offers(RUN)] == cids[:1]


@both_sizes
def test_of_what_is_damaged_the_newest_is_kept(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    store = SpillStore(tmp_path)
    cids = [store.put(meta(version), tensors).cid for version in range(MOST_DAMAGED + 3)]
    for path in list(tmp_path.iterdir()):
        path.write_bytes(bytes([byte ^ (place > 100) for place, byte in enumerate(path.read_bytes())]))
    for number, cid in enumerate(cids):
        assert store.set_aside((cid, "body"))
        os.utime(tmp_path / f"{cid}.body.damaged", ns=(number, number))
    kept = [f"{cid}.body.damaged" for cid in cids[-MOST_DAMAGED:]]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
