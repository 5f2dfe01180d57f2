"""`zsfl doctor` names the cause: real nodes in made situations."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers.disks import small
from helpers.jobs import unhurried, write_job
from helpers.namespaces import Machine, dropped, machines_without_multicast
from helpers.nodes import Nodes
from helpers.processes import command, finished
from helpers.waiting import HANG_S, eventually

import zsfl
from zsfl.cli import main
from zsfl.doctor.judging import findings
from zsfl.doctor.looking import look
from zsfl.doctor.seen import Finding, Torch
from zsfl.ids import Role
from zsfl.keys.machine import machine_id
from zsfl.keys.secret import own_keys
from zsfl.keys.trusted import Trusted, trust
from zsfl.settings import NodeSettings

__all__ = ["machines_without_multicast"]

LATE = "import time\n_now = time.time\ntime.time = lambda: _now() - 60\n"

DOCTOR = """
import asyncio, msgspec, sys
from zsfl.doctor.judging import findings
from zsfl.doctor.looking import look
from zsfl.doctor.seen import Torch
from zsfl.settings import NodeSettings

async def no_torch():
    return Torch(version="2")

host, mdns, *peers = sys.argv[1:]
settings = NodeSettings(host=host, insecure=True, mdns=mdns == "mdns", peers=tuple(peers))
seen = asyncio.run(look(settings, no_torch(), "tiny"))
print(msgspec.json.encode([findings(seen), seen]).decode())
"""
"""What `zsfl doctor tiny` does, without loading PyTorch each time."""
ANNOUNCER = """
import asyncio, sys
from zsfl.discovery.announced import job_hash
from zsfl.discovery.mdns import Mdns
from zsfl.ids import PROTOCOL, NodeCard, NodeId, Role

async def main(host):
    card = NodeCard(id=NodeId("lost"), name="lost", role=Role.CLIENT, host=host, control_port=1)
    async with Mdns(card, job_hash("other", ""), PROTOCOL):
        print("announced", flush=True)
        await asyncio.sleep(3600)

asyncio.run(main(sys.argv[1]))
"""
"""A node of another job, as far as it is announced."""


async def no_torch() -> Torch:
    return Torch(version="2")


async def said(job: str, **settings: Any) -> list[Finding]:
    """What the doctor finds from this process, by addresses alone."""
    return findings(await look(NodeSettings(mdns=False, **settings), no_torch(), job))


def of(check: str, found: Sequence[Finding], state: str = "bad") -> list[str]:
    return [finding.what for finding in found if (finding.check, finding.state) == (check, state)]


async def seen_from(machine: Machine, folder: Path, mdns: str, *peers: str) -> tuple[list[Finding], Any]:
    flags = (machine.host, mdns, *peers)
    async with command(*flags, cwd=folder, prefix=machine.inside, run=("-c", DOCTOR)) as doctor:
        assert await doctor.ended() == 0, doctor.text
    found, seen = json.loads(doctor.out[-1])
    return [Finding(**finding) for finding in found], seen


async def test_no_multicast_another_job_a_wrong_clock_and_firewalled_ports(
    tmp_path: Path, machines_without_multicast: tuple[Machine, Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = machines_without_multicast
    job = write_job(tmp_path)
    late = tmp_path / "late"
    late.mkdir()
    (late / "sitecustomize.py").write_text(LATE)

    def node(role: str, machine: Machine, name: str) -> Any:
        place = ("--host", machine.host, "--insecure", "--name", name)
        return command("node", role, job, *place, cwd=tmp_path, prefix=machine.inside)

    async with AsyncExitStack() as stack:
        aggregator = await stack.enter_async_context(node("aggregator", here, "chief"))
        announcing = command(here.host, cwd=tmp_path, prefix=here.inside, run=("-c", ANNOUNCER))
        lost = await stack.enter_async_context(announcing)
        with monkeypatch.context() as changed:
            changed.setenv("PYTHONPATH", os.pathsep.join((str(late), os.environ.get("PYTHONPATH", ""))))
            server = await stack.enter_async_context(node("split-server", there, "gpu"))
        far = await server.address()
        await aggregator.address()
        await eventually(lambda: lost.out)

        found, seen = await seen_from(here, tmp_path, "mdns", far)
        (blocked,) = of("multicast", found)
        assert f"blocked between {here.host} and gpu at {far}" in blocked
        assert of("hearing", found) == ["chief and gpu do not hear each other, though both run"]
        foreign = f"not of job tiny: the node at {here.host}:1 (another job or cluster, by what it announces)"
        assert of("jobs", found, "warn") == [foreign]
        assert of("roles", found) == ["job tiny has no client"]
        assert of("clocks", found, "warn") == ["the clock of gpu is 60 s behind the one here"]
        assert of("ports", found, "good")
        assert of("nodes", found) == []

        port = next(node["card"]["data_port"] for node in seen["nodes"] if node["address"] == far)
        with dropped(there, port):
            found, _ = await seen_from(here, tmp_path, "quiet", far)
        drops = "a firewall drops what goes there"
        assert of("ports", found) == [f"the data port of gpu at {far}, {port}, gives no answer at all: {drops}"]

        empty = f"{there.host}:1"
        with dropped(there, int(far.rpartition(":")[2])):
            found, _ = await seen_from(here, tmp_path, "quiet", far, empty)
        listening, control, _ = of("nodes", found)
        assert listening == f"nobody listens at {empty}"
        assert control == f"the node at {far}: no answer at all from its control port: {drops}"


async def test_a_run_without_split_server_is_told_from_one_in_which_all_is_well(tmp_path: Path) -> None:
    job = unhurried(write_job(tmp_path, rounds=100_000))
    nodes = Nodes(zsfl.load_job(job), tmp_path / "runs")
    strange = Nodes(zsfl.load_job(write_job(tmp_path, name="tinny")), tmp_path / "strange")
    try:
        seed = await nodes.start("aggregator", Role.AGGREGATOR)
        for shard in ("0", "1"):
            await nodes.start(f"client-{shard}", Role.CLIENT, peers=(seed,), shards=shard)
        misnamed = await strange.start("server", Role.SPLIT_SERVER)
        found = await said("tiny", peers=(seed, misnamed))
        assert of("roles", found) == ["job tiny has no split server"]
        assert of("jobs", found, "warn") == [f"not of job tiny: server at {misnamed} (job tinny)"]
        assert of("hearing", found, "good")
        await nodes.start("server", Role.SPLIT_SERVER, peers=(seed,))
        await eventually(lambda: nodes.rounds)
        code, doctor = await finished("doctor", job, "--no-mdns", cwd=tmp_path)  # finds it by the run's folder
        assert (code, doctor.err) == (0, []), doctor.text
        assert doctor.out[-1] == "all is well\n"
        assert "job tiny has 1 aggregator, 1 split server, 2 clients" in doctor.text
        assert "all 16 can be reached from here" in doctor.text
        table = [line.split() for line in doctor.out if line.split()[1:2] == ["client-0"]]
        assert table == [["3", "client-0", "yes", "yes", "·", "-"]]
    finally:
        await nodes.close()
        await strange.close()


async def test_who_does_not_trust_whom(tmp_path: Path) -> None:
    nodes = Nodes(zsfl.load_job(write_job(tmp_path)), tmp_path / "runs")
    here, there = tmp_path / "here", tmp_path / "there"
    mine, theirs = own_keys(here).public, own_keys(there).public
    try:
        address = await nodes.start("aggregator", Role.AGGREGATOR, keys=str(there))
        bare = await nodes.start("server", Role.SPLIT_SERVER)

        async def trust_said(*more: str) -> list[str]:
            return of("trust", await said("tiny", peers=(address, *more), keys=str(here)))

        unknown = f"the node at {address} is on no machine that this one, {machine_id(mine)}, trusts"
        assert await trust_said() == [unknown]
        trust(here, Trusted(key=theirs, name="desk"))
        away = f"the node at {address} is on the machine desk, which does not trust this machine, {machine_id(mine)}"
        assert await trust_said() == [away]
        trust(there, Trusted(key=mine, name="gpu", roles=frozenset({Role.CLIENT})))
        async with asyncio.timeout(HANG_S):  # its file is read again with each heartbeat
            while await trust_said() == [away]:
                pass
        found = await said("tiny", peers=(address,), keys=str(here))
        (forbidden,) = of("trust", found, "warn")
        assert forbidden.startswith(f"the node at {address} does not tell: ")
        assert "Examine is not for a key that is trusted for client to say" in forbidden
        trust(there, Trusted(key=mine, name="gpu"))
        async with asyncio.timeout(HANG_S):
            while of("trust", await said("tiny", peers=(address,), keys=str(here)), "warn"):
                pass
        assert await trust_said() == []
        assert await trust_said(bare) == ["server uses no keys and aggregator does: they refuse one another"]
        found = await said("tiny", peers=(address,))
        assert of("trust", found)[0].startswith(f"the node at {address} uses keys, and this machine has none in ")
    finally:
        await nodes.close()


async def test_a_full_disk_a_broken_job_file_and_a_device_that_is_not_there(tmp_path: Path) -> None:
    runs, job = tmp_path / "runs", tmp_path / "broken.py"
    job.write_text("print('hello')\nraise ValueError('no such data')\n")
    with small(runs, 2):
        (runs / "filling").write_bytes(bytes(3 << 19))
        flags = ("--no-mdns", "--json", "--device", "cuda:99", "--runs", runs)
        code, doctor = await finished("doctor", job, *flags, cwd=tmp_path)
        left = [path.name for path in runs.iterdir()]
    assert (code, left) == (1, ["filling"]), doctor.text
    found = [Finding(**finding) for finding in json.loads("".join(doctor.out))["findings"]]
    assert of("disk", found) == [f"cannot write in {runs}: {os.strerror(errno.ENOSPC)} (0.5 MiB free)"]
    assert of("torch", found)[0].startswith("device cuda:99 is not there: ")
    assert of("job", found)[0].startswith(f"job file {job} cannot be imported: ValueError: no such data")


async def test_what_listens_and_is_no_node_that_answers(tmp_path: Path) -> None:
    async def shut(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    servers = [await asyncio.start_server(handler, "127.0.0.1", 0) for handler in (shut, mute)]
    try:
        stranger, silent = (f"127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers)
        found = of("nodes", await said("", peers=(stranger, silent)))
    finally:
        for server in servers:
            server.close()
    assert sorted(found[:2]) == sorted(
        [
            f"what listens at {stranger} is no zsfl node",
            f"the node at {silent} takes connections and does not answer",
        ]
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("no.py",), "there is no job file"),
        (("--insecure", "--keys", "keys"), "leave out either"),
        (("--host", "nowhere"), "expected the IPv4 address"),
    ],
)
def test_wrong_flags_are_refused(
    flags: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", *flags]) == 2
    assert said in capsys.readouterr().err
