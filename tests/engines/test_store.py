"""Spills that go to a bucket, over HTTP: the machine of a split server is deleted in mid-run, and nothing is lost."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
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
SILENT = """
from zsfl.member import Member
from zsfl.spill.stored import StoredSpills

_say, _offers, withheld = Member._say_new, StoredSpills.offers, []

def _silent(self):
    \"\"\"From version 10 on, nobody hears of what this server has put in the store.\"\"\"
    if self._node.name == "doomed" and any(offer.version >= 10 for offer in self._new):
        withheld.extend(self._new)
        self._new.clear()
        print("SILENT", flush=True)
    else:
        _say(self)

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

    def end(self) -> None:
        self._served.kill()
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


@asynccontextmanager
async def machines(folder: Path) -> AsyncIterator[dict[str, Command]]:
    """An aggregator, clients, and two split servers, each with a folder of its own, which is its machine's disk."""
    told = ("--no-mdns", "--spill", URL, "--patience-s", "60")
    nodes: dict[str, Command] = {}
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

        address = await (await start("aggregator", "aggregator")).address()
        peer = ("--peer", address)
        for name in ("doomed", "other"):
            await start(name, "split-server", *peer)
        await start("clients", "client", "--shards", f"0-{CASE.clients - 1}", *peer)
        yield nodes


async def test_the_machine_of_a_split_server_is_deleted_and_nothing_is_lost(bucket: Bucket, tmp_path: Path) -> None:
    async with machines(tmp_path) as nodes:
        doomed = nodes["doomed"]
        await eventually(lambda: "SILENT\n" in doomed.out or nodes["aggregator"].process.returncode is not None)
        assert list((tmp_path / "doomed" / "runs").rglob("*.spills")) == []  # it has no need of a disk
        assert any(path.endswith(".spills") for path in files().find("gradients"))
        doomed.signal(signal.SIGKILL)
        shutil.rmtree(tmp_path / "doomed")
        codes = await asyncio.gather(*(node.ended() for name, node in nodes.items() if name != "doomed"))
    said = {name: node.text for name, node in nodes.items()}
    assert codes == [0, 0, 0], said
    rounds = [report for report in nodes["aggregator"].reports() if isinstance(report, RoundReport)]
    assert sum(report.peers["aggregator"].get("spills_adopted", 0) for report in rounds) > 0
    notes = [report.message for report in nodes["clients"].reports() if isinstance(report, Note)]
    assert [note for note in notes if note.startswith("driving")] == []  # all of it was there
    ran = Ran(tmp_path / "aggregator" / "runs" / "exact", rounds)
    assert_equal(ran.weights, (await in_process(CASE, tmp_path, run="straight")).weights)
    found = audit(ran.folder)
    assert (found.faults, found.dropped, found.pending, found.counted) == ([], 0, 0, 60)
    assert files().find("gradients") == []


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
