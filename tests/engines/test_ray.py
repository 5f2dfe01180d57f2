"""`zsfl up --on ray` on a real Ray cluster of three machines, which are raylets on loopback."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from helpers import raylets
from helpers.documents import ROOT, Reader, blocks, environment
from helpers.exact import Case, assert_equal, in_process
from helpers.jobs import write_job
from helpers.namespaces import Machine, machines
from helpers.processes import MARK, command, marked
from helpers.waiting import HANG_S, eventually
from safetensors.torch import load_file

from zsfl.aggregator.audit import audit
from zsfl.cluster.on_ray.cluster import RayCluster
from zsfl.reports import AnyReport, Note

if find_spec("ray") is None:
    pytest.skip("Ray is not installed: `make test-engines` installs it and runs these", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own

__all__ = ["machines"]

PAGE = ROOT / "docs" / "how-to" / "ray.md"
SLOW = """
import time


class Slow(nn.Module):
    def forward(self, x):
        time.sleep(0.02)
        return x


def slow():
    made = case.model()
    return zsfl.SplitModel(made.head, nn.Sequential(made.body, Slow()), made.tail)


job = dataclasses.replace(case.job(), model=slow)
"""


@pytest.fixture(scope="module")
def ray_at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the Ray cluster: one CPU where the tests run, four on each of the others."""
    os.environ.update(raylets.QUIET)
    mark, home = uuid4().hex, tmp_path_factory.mktemp("home")
    env = {**os.environ, MARK: mark, "HOME": str(home)}
    served = subprocess.Popen(
        [sys.executable, raylets.__file__, "1", "4", "4"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True,
    )  # fmt: skip
    assert served.stdin is not None
    assert served.stdout is not None
    try:
        address = served.stdout.readline().strip()
        assert address, "no Ray cluster came up"
        yield address
    finally:
        served.stdin.close()
        served.stdout.close()
        served.wait(HANG_S)
    asyncio.run(eventually(lambda: not marked(mark)))
    assert not [path for path in (home / "zsfl").rglob("*") if path.is_file()]  # nodes take away what was put there


@pytest.fixture
def ray(ray_at: str) -> Any:
    return import_module("ray")


async def test_a_killed_split_server_is_started_again_by_ray_and_the_result_is_that_of_a_local_run(
    ray_at: str, ray: Any, tmp_path: Path
) -> None:
    case, told = Case(rounds=6), list[AnyReport]()
    cluster = RayCluster(
        case.job_file(tmp_path), address=ray_at, client_processes=1, runs=tmp_path, on_report=told.append, cluster="lab"
    )
    async with cluster:
        server, client = cluster.nodes["split-server-0"], cluster.nodes["client-0-3"]
        machines = {node["NodeID"] for node in ray.nodes()}
        assert len(machines) == 3
        async for report in cluster.train(rounds=3):
            if report.round == 1:
                ray.kill(ray.get_actor("lab/split-server-0", namespace="zsfl"), no_restart=False)
        await cluster.until(lambda: cluster.nodes["split-server-0"].is_there and server.exit_code)
        again = cluster.nodes["split-server-0"]
        assert again.pid != server.pid
        assert again.address != server.address
        assert client is cluster.nodes["client-0-3"]
        serving = [report.serving async for report in cluster.train(rounds=3)]
    assert any("split-server-0" in shares for served in serving for shares in served.values())
    assert [one.message for one in told if isinstance(one, Note) and "another one" in one.message] == [
        "the process of split-server-0 died; Ray starts another one"
    ]
    assert cluster.result is not None
    folder = Path(cluster.result.folder)
    assert folder == tmp_path / "exact"
    run = audit(folder)
    assert (run.faults, run.pending, run.dropped) == ([], 0, 0)
    assert_equal(load_file(folder / "model.safetensors"), (await in_process(case, tmp_path, run="local")).weights)


async def test_a_killed_aggregator_goes_on_from_its_last_commit(ray_at: str, ray: Any, tmp_path: Path) -> None:
    case = Case(rounds=6)
    cluster = RayCluster(case.job_file(tmp_path), address=ray_at, client_processes=1, runs=tmp_path, cluster="lab")
    async with cluster:
        async for report in cluster.train():
            if report.round == 2:
                ray.kill(ray.get_actor("lab/aggregator", namespace="zsfl"), no_restart=False)
    assert cluster.result is not None
    run = audit(Path(cluster.result.folder))
    assert (run.faults, run.pending) == ([], 0)
    weights = load_file(tmp_path / "exact" / "model.safetensors")
    assert_equal(weights, (await in_process(case, tmp_path, run="local")).weights)


async def test_split_servers_are_added_while_there_is_too_much_to_do(ray_at: str, tmp_path: Path) -> None:
    case = Case(sizes=(40,) * 12, mode="async")
    job = case.job_file(tmp_path)
    text = job.read_text().replace("job = ", "import dataclasses, zsfl\nfrom torch import nn\ncase = ")
    job.write_text(text.replace(".job()\n", "\n") + SLOW)
    told = list[AnyReport]()
    cluster = RayCluster(
        job, address=ray_at, least=1, most=3, client_processes=1, runs=tmp_path, rounds=100_000, on_report=told.append
    )
    async with cluster:
        servers, rounds = set[str](), list[int]()
        async for report in cluster.train():
            rounds.append(report.round)
            servers |= {server for shares in report.serving.values() for server in shares}
            if len(servers) == 3:
                break
        assert cluster.killed == []
    assert rounds == list(range(1, len(rounds) + 1))
    added = [one.message for one in told if isinstance(one, Note) and "one more" in one.message]
    assert [message.partition(" at ")[2] for message in added] == [
        "1 split server: one more is started", "2 split servers: one more is started"
    ]  # fmt: skip
    run = audit(tmp_path / "exact")
    assert run.faults == []


@asynccontextmanager
async def joined(machine: Machine, home: Path, mark: str, *flags: str) -> AsyncIterator[tuple[str, ...]]:
    """A machine that is part of a Ray cluster meanwhile; what to put before a command there."""
    home.mkdir()
    own = {MARK: mark, "HOME": str(home), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    own["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"  # not on loopback alone, as other tests here have it
    there = (*machine.inside, "env", *(f"{name}={value}" for name, value in own.items()))
    script = ("-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address", machine.host)
    store = ("--object-store-memory", str(raylets.STORE_BYTES))
    async with command(*flags, *store, cwd=home, prefix=there, run=script) as ray:
        await eventually(lambda: ray.process.returncode is not None or "Ray runtime started" in ray.text)
        assert ray.process.returncode is None, ray.text
        yield there
        ray.signal(signal.SIGTERM)
        await ray.ended()


async def test_what_two_machines_say_is_encrypted_with_nothing_to_be_paired(
    machines: tuple[Machine, Machine], tmp_path: Path
) -> None:
    mark, (here, there) = uuid4().hex, machines
    job = write_job(tmp_path)
    head = ("--head", "--port", "6379", "--num-cpus", "0", "--include-dashboard", "false")
    other = ("--address", f"{here.host}:6379", "--num-cpus", "4")
    async with joined(here, tmp_path / "a", mark, *head) as inside, joined(there, tmp_path / "b", mark, *other):
        run = ("up", str(job), "--on", "ray", "--address", f"{here.host}:6379", "--min", "1", "--max", "2")
        async with command(*run, cwd=tmp_path, prefix=inside) as up:
            assert await up.ended(2 * HANG_S) == 0, up.text
    assert "INSECURE" not in up.text
    run_of = audit(tmp_path / "runs" / "tiny")
    assert (run_of.faults, run_of.pending) == ([], 0)
    assert f" ray-{there.host} client,observer,split-server\n" in (tmp_path / "a/.config/zsfl/trusted").read_text()
    trusted = (tmp_path / "b/.config/zsfl/trusted").read_text()
    assert " operator aggregator,observer,operator,standby\n" in trusted
    await eventually(lambda: not marked(mark))


def test_the_page_can_be_followed(ray_at: str, tmp_path: Path) -> None:
    work = tmp_path / "home" / "work"
    work.mkdir(parents=True)
    mark = uuid4().hex
    own = {MARK: mark, "RAY_ADDRESS": ray_at, **raylets.QUIET}
    reader = Reader({"here": (work, ())}, {**environment(tmp_path), **own})
    tutorial = blocks(ROOT / "docs" / "tutorial.md")
    reader.write("my_job.py", next(block.text for block in tutorial if block.file == "my_job.py"))
    lines = [line for block in blocks(PAGE) if block.language == "sh" for line in block.lines()]
    assert len(lines) == 3
    try:
        for line in lines:
            if not line.startswith("pip "):
                reader.follow(line)
    finally:
        for command in reader.running:
            command.kill()
    asyncio.run(eventually(lambda: not marked(mark)))
