"""Spills and runs that are kept in a bucket, over HTTP: the machine of a split server, or of the aggregator, is deleted
in mid-run, and nothing is lost.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers.exact import Case, Ran, assert_equal, in_process
from helpers.processes import Command, command
from helpers.waiting import HANG_S, eventually

from zsfl.aggregator.audit import audit
from zsfl.reports import Note, RoundReport

if find_spec("s3fs") is None or find_spec("moto") is None:
    pytest.skip("s3fs or moto is not installed: `make test-engines` installs them", allow_module_level=True)

CASE = Case(optimizer="adam", dropout=0.2, rounds=6)
URL = "s3://gradients/lab"
KEPT = "gradients/lab/exact/runs/exact"
SILENT = """
from zsfl.client.driver import StepDriver
from zsfl.member import Member
from zsfl.spill.stored import StoredSpills

_say, _offers, withheld = Member._say_new, StoredSpills.offers, []

def _silent(self):
    \"\"\"Nobody hears of what this server puts in the store once, from version 10 on.\"\"\"
    if self._node.name == "doomed" and not withheld and any(offer.version >= 10 for offer in self._new):
        withheld.extend(self._new)
        print(*(f"SILENT {offer.cid}" for offer in self._new), sep="\\n", flush=True)
        self._new.clear()
    else:
        _say(self)

_make = StepDriver.make

async def _made(self, cid, *args, **settings):
    step = await _make(self, cid, *args, **settings)
    print(f"MADE {cid}", flush=True)
    return step

StepDriver.make = _made
Member._say_new = _silent
StoredSpills.offers = lambda self, run: [offer for offer in _offers(self, run) if offer not in withheld]
"""


class Bucket:
    """A server that speaks S3, with one bucket, where it says."""

    def __init__(self, port: int = 0) -> None:
        self._served = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._served.stderr is not None
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", said := self._served.stderr.readline())):
            assert said, "no S3 server came up"
        self.port = int(found[1])
        # It writes a line for each request, and stands still once nobody reads them.
        self._reading = threading.Thread(target=self._served.stderr.read, daemon=True)
        self._reading.start()

    def end(self) -> None:
        self._served.kill()
        self._reading.join(HANG_S)
        self._served.communicate(timeout=HANG_S)


def files() -> Any:
    return import_module("s3fs").S3FileSystem(skip_instance_cache=True, use_listings_cache=False)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    served = Bucket()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{served.port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    try:
        files().mkdir("gradients")
        yield served
    finally:
        served.end()


Start = Callable[..., Awaitable[Command]]


@asynccontextmanager
async def starting(folder: Path, nodes: dict[str, Command]) -> AsyncIterator[Start]:
    """Starts nodes, each with a folder of its own, which is its machine's disk."""
    told = ("--no-mdns", "--spill", URL, "--patience-s", "60")
    async with AsyncExitStack() as stack:

        async def start(name: str, role: str, *more: str) -> Command:
            place = folder / name
            place.mkdir()
            job = CASE.job_file(place)
            job.write_text(job.read_text() + SILENT)
            nodes[name] = await stack.enter_async_context(
                command("node", role, job, "--name", name, *told, *more, cwd=place)
            )
            return nodes[name]

        yield start


@asynccontextmanager
async def machines(folder: Path) -> AsyncIterator[dict[str, Command]]:
    """An aggregator, clients, and two split servers."""
    nodes: dict[str, Command] = {}
    async with starting(folder, nodes) as start:
        address = await (await start("aggregator", "aggregator")).address()
        await members(start, address, "doomed", "other")
        yield nodes


async def members(start: Start, address: str, *servers: str, clients: str = "clients") -> None:
    """Split servers and clients of an aggregator."""
    for name in servers:
        await start(name, "split-server", "--peer", address)
    await start(clients, "client", "--shards", f"0-{CASE.clients - 1}", "--peer", address)


def rounds_of(node: Command) -> list[RoundReport]:
    return [report for report in node.reports() if isinstance(report, RoundReport)]


async def test_the_machine_of_a_split_server_is_deleted_and_nothing_is_lost(bucket: Bucket, tmp_path: Path) -> None:
    async with machines(tmp_path) as nodes:
        doomed = nodes["doomed"]
        # One is put there and acknowledged, and the version waits for it.
        await eventually(
            lambda: (
                any(line.replace("SILENT", "MADE") in nodes["clients"].out for line in doomed.out if "SILENT" in line)
                or nodes["aggregator"].process.returncode is not None
            )
        )
        assert list((tmp_path / "doomed" / "runs").rglob("*.spills")) == []  # it has no need of a disk
        assert any(path.endswith(".spills") for path in files().find("gradients"))
        doomed.signal(signal.SIGKILL)
        shutil.rmtree(tmp_path / "doomed")
        codes = await asyncio.gather(*(node.ended() for name, node in nodes.items() if name != "doomed"))
    said = {name: node.text for name, node in nodes.items()}
    assert codes == [0, 0, 0], said
    rounds = rounds_of(nodes["aggregator"])
    assert sum(report.peers["aggregator"].get("spills_adopted", 0) for report in rounds) > 0
    notes = [report.message for report in nodes["clients"].reports() if isinstance(report, Note)]
    assert [note for note in notes if note.startswith("driving")] == []  # all of it was there
    ran = Ran(tmp_path / "aggregator" / "runs" / "exact", rounds)
    assert_equal(ran.weights, (await in_process(CASE, tmp_path, run="straight")).weights)
    found = audit(ran.folder)
    assert (found.faults, found.dropped, found.pending, found.counted) == ([], 0, 0, 60)
    assert files().find("gradients") == []


async def test_what_a_server_put_there_and_nobody_heard_of_is_taken_from_there(bucket: Bucket, tmp_path: Path) -> None:
    async with machines(tmp_path) as nodes:
        codes = await asyncio.gather(*(node.ended() for node in nodes.values()))
    assert codes == [0, 0, 0, 0], {name: node.text for name, node in nodes.items()}
    assert "SILENT" in nodes["doomed"].text
    assert sum(report.peers["aggregator"].get("spills_adopted", 0) for report in rounds_of(nodes["aggregator"])) > 0
    notes = [report.message for report in nodes["clients"].reports() if isinstance(report, Note)]
    assert [note for note in notes if note.startswith("driving")] == []
    found = audit(tmp_path / "aggregator" / "runs" / "exact")
    assert (found.faults, found.dropped, found.pending, found.counted) == ([], 0, 0, 60)


async def test_a_store_that_is_away_for_a_while_is_waited_for(bucket: Bucket, tmp_path: Path) -> None:
    async with machines(tmp_path) as nodes:
        await eventually(lambda: any(isinstance(report, RoundReport) for report in nodes["aggregator"].reports()))
        bucket.end()
        waiting = "spills wait until the store takes them: cannot write spills in s3://gradients/lab"
        await eventually(lambda: waiting in nodes["clients"].text or waiting in nodes["other"].text)
        again = Bucket(bucket.port)
        try:
            files().mkdir("gradients")
            codes = await asyncio.gather(*(node.ended() for node in nodes.values()))
        finally:
            again.end()
    assert codes == [0, 0, 0, 0], {name: node.text for name, node in nodes.items()}
    found = audit(tmp_path / "aggregator" / "runs" / "exact")
    assert (found.faults, found.dropped, found.pending, found.counted) == ([], 0, 0, 60)


async def test_a_bucket_that_is_not_there_is_told_of(bucket: Bucket, tmp_path: Path) -> None:
    files().rmdir("gradients")
    async with machines(tmp_path) as nodes:
        await eventually(lambda: "The specified bucket does not exist" in nodes["other"].text + nodes["doomed"].text)
        for node in nodes.values():
            node.signal(signal.SIGINT)


async def test_the_machine_of_the_aggregator_is_deleted_and_another_goes_on_from_the_bucket(
    bucket: Bucket, tmp_path: Path
) -> None:
    nodes: dict[str, Command] = {}
    async with starting(tmp_path, nodes) as start:
        first = await start("aggregator", "aggregator", "--durability", "store")
        await members(start, await first.address(), "other")
        await eventually(lambda: len(rounds_of(first)) >= 2 or first.process.returncode is not None)
        first.signal(signal.SIGKILL)
        assert await first.ended() == -signal.SIGKILL
        shutil.rmtree(tmp_path / "aggregator")
        assert "is in s3://gradients/lab already" in await refused(start, "forgetful", "--durability", "store")
        address = await nodes["other"].address()
        heir = await start("heir", "aggregator", "--durability", "store", "--resume", "--peer", address)
        codes = await asyncio.gather(*(nodes[name].ended() for name in ("heir", "other", "clients")))
    assert codes == [0, 0, 0], {name: node.text for name, node in nodes.items()}
    notes = [report.message for report in heir.reports() if isinstance(report, Note)]
    assert any(re.fullmatch(r"version \d+ of the run came from s3://gradients/lab", note) for note in notes), notes
    assert not any("cannot be made again" in note for note in notes), notes
    ran = Ran(tmp_path / "heir" / "runs" / "exact", rounds_of(heir))
    assert_equal(ran.weights, (await in_process(CASE, tmp_path, run="straight")).weights)
    found = audit(ran.folder)
    assert (found.faults, found.dropped, found.pending, found.counted) == ([], 0, 0, 60)
    # What is left is the last version's commit, its checkpoint, and of what that is made.
    left = [str(path).rpartition("/")[2] for path in files().find("gradients")]
    assert all("exact/runs/exact/v" in path for path in files().find("gradients")), left
    assert sorted(name.rpartition(".")[2] for name in left if "piece" not in name) == ["commit", "mark"], left
    assert (tmp_path / "heir" / "runs" / "exact" / "ledger.jsonl").read_bytes() == await ledger_in_bucket(left)


async def refused(start: Start, name: str, *more: str) -> str:
    """What an aggregator says that does not begin."""
    node = await start(name, "aggregator", *more)
    assert await node.ended() == 2, node.text
    return node.text


async def ledger_in_bucket(left: list[str]) -> bytes:
    [mark] = [name for name in left if name.endswith(".mark")]
    there = files()
    pieces = json.loads(there.cat_file(f"{KEPT}/{mark}"))["files"]["ledger.jsonl"]
    return b"".join(there.cat_file(f"{KEPT}/{piece}") for piece in pieces)


async def test_of_two_that_begin_the_same_run_one_refuses(bucket: Bucket, tmp_path: Path) -> None:
    nodes: dict[str, Command] = {}
    async with starting(tmp_path, nodes) as start:
        for one in "ab":  # neither knows of the other, nor do its members
            node = await start(f"aggregator-{one}", "aggregator", "--durability", "store")
            await members(start, await node.address(), f"server-{one}", clients=f"clients-{one}")
        both = [nodes["aggregator-a"], nodes["aggregator-b"]]
        await eventually(lambda: any(node.process.returncode is not None for node in both))
        codes = await asyncio.gather(*(node.ended() for node in both))
    assert sorted(codes) == [0, 2], [node.text for node in both]
    begun, other = both if codes[0] == 0 else both[::-1]
    assert "has begun a run of this name" in other.text or "is in s3://gradients/lab already" in other.text
    found = audit(tmp_path / f"{'aggregator-a' if begun is both[0] else 'aggregator-b'}" / "runs" / "exact")
    assert (found.faults, found.dropped, found.counted) == ([], 0, 60)
