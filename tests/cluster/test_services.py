"""Nodes that a service manager keeps up: one command line that is right at the first start and at every other."""

from __future__ import annotations

import asyncio
import re
import shlex
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.exact import Case, Ran, assert_equal, in_process, spills_left
from helpers.jobs import write_job
from helpers.nodes import Nodes
from helpers.processes import Command, command
from helpers.waiting import eventually, until

from zsfl.aggregator.standing import Standing
from zsfl.ids import Role
from zsfl.roles import run_node

DEPLOY = Path(__file__).resolve().parents[2] / "tools" / "deploy"
CASE = Case(rounds=3, sizes=(13, 7, 20, 4))
WINDOWS = 4
"""The largest shard has so many batches."""


@asynccontextmanager
async def no_nodes(runs: Path) -> AsyncIterator[Nodes]:
    """Nodes of one run, none of them started yet."""
    nodes = Nodes(CASE.job(), runs)
    try:
        yield nodes
    finally:
        await nodes.close()


async def play(nodes: Nodes, **flags: Any) -> None:
    """As a service: an aggregator, and whoever works for it, until the run or the aggregator ends."""
    address = await nodes.start("aggregator", Role.AGGREGATOR, service=True, **flags)
    await nodes.start("server", Role.SPLIT_SERVER, peers=(address,))
    await nodes.start("clients", Role.CLIENT, shards="0-3", peers=(address,))
    await until(asyncio.wait([nodes.tasks["aggregator"]]))


async def left_at_once(nodes: Nodes, role: Role, name: str, **flags: Any) -> str:
    """What a node says that leaves by itself before it is ready."""
    nodes.notes.clear()
    with pytest.raises(AssertionError, match="has left before it was ready"):
        await nodes.start(name, role, service=True, **flags)
    (note,) = nodes.notes
    return note


async def test_a_service_goes_on_with_its_run_and_leaves_it_alone_once_it_is_finished(tmp_path: Path) -> None:
    straight = await in_process(CASE, tmp_path, run="straight")
    async with no_nodes(tmp_path) as nodes:
        nodes.lost_after_round = 2
        await play(nodes)
        assert nodes.tasks["aggregator"].cancelled()
        for name in ("server", "clients"):
            nodes.tasks[name].cancel()
        await asyncio.wait([nodes.tasks["server"], nodes.tasks["clients"]])
        nodes.lost_after_round = None
        await play(nodes)
        await until(asyncio.gather(*nodes.tasks.values()))
        lines = (tmp_path / "nodes" / "metrics.jsonl").read_bytes()
        note = await left_at_once(nodes, Role.AGGREGATOR, "aggregator")
        assert re.search("is finished, with 3 rounds: nothing is left to do. Ask for more with --rounds", note)
        assert (tmp_path / "nodes" / "metrics.jsonl").read_bytes() == lines
        # It is the rounds that are asked for which are done: of more there are some left.
        assert_equal(Ran(tmp_path / "nodes", []).weights, straight.weights)
        await play(nodes, rounds=4)
        await until(asyncio.gather(*nodes.tasks.values()))
    assert len((tmp_path / "nodes" / "ledger.jsonl").read_bytes().splitlines()) == 4 * WINDOWS
    assert [path.name for path in tmp_path.glob("nodes*")] == ["nodes"]
    assert spills_left(tmp_path) == []


async def test_a_service_that_was_killed_before_its_run_began_begins_it_in_the_same_folder(tmp_path: Path) -> None:
    async with no_nodes(tmp_path) as nodes:
        (tmp_path / "nodes").mkdir()
        # One stood by already, and most clients had agreed to it: but there is nothing yet to take over.
        Standing(holder="0123456789ab", origin="0123456789ab", epoch=1, led=True, shared=True).keep(tmp_path / "nodes")
        await play(nodes)
        await until(asyncio.gather(*nodes.tasks.values()))
    assert [path.name for path in tmp_path.glob("nodes*")] == ["nodes"]
    assert len((tmp_path / "nodes" / "ledger.jsonl").read_bytes().splitlines()) == CASE.rounds * WINDOWS


async def test_one_that_stands_by_as_a_service_leaves_the_copy_of_a_finished_run_alone(tmp_path: Path) -> None:
    async with no_nodes(tmp_path) as nodes:
        address = await nodes.start("aggregator", Role.AGGREGATOR, service=True)
        await nodes.start("spare", Role.STANDBY, service=True, peers=(address,))
        await nodes.start("server", Role.SPLIT_SERVER, peers=(address,))
        await nodes.start("clients", Role.CLIENT, shards="0-3", peers=(address,))
        await until(asyncio.gather(*nodes.tasks.values()))
        assert "nodes.spare is finished" in await left_at_once(nodes, Role.STANDBY, "spare")


def env_words(env: dict[str, str]) -> tuple[str, ...]:
    return ("env", *(f"{name}={value}" for name, value in env.items()))


async def test_a_service_tells_what_it_does_in_words_and_ends_well_when_it_is_stopped(tmp_path: Path) -> None:
    env = {"ZSFL_SERVICE": "true", "ZSFL_MDNS": "false"}
    args = ("node", "aggregator", write_job(tmp_path))
    async with command(*args, cwd=tmp_path, prefix=env_words(env)) as node:
        await eventually(lambda: node.process.returncode is not None or "waits for" in "".join(node.out))
        node.signal(signal.SIGTERM)
        assert await node.ended() == 0  # so that it stays away
    assert re.fullmatch(r"aggregator-\S+ is ready at 127\.0\.0\.1:\d+, without keys: .*\n", node.out[0]), node.text
    assert not re.search(r"[{\x1b]", node.text)


def test_a_unit_with_a_wrong_setting_says_so_in_words_and_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("SERVICE", "true"), ("PORT", "x")):
        monkeypatch.setenv(f"ZSFL_{name}", value)
    code = run_node(Role.AGGREGATOR, write_job(tmp_path), {})
    assert capsys.readouterr() == ("", "zsfl: ZSFL_PORT is 'x': expected a whole number\n")
    assert f"RestartPreventExitStatus={code}\n" in (DEPLOY / "zsfl@.service").read_text()


def address(node: Command) -> str:
    """Where a service listens, by its own words; empty before it is ready."""
    found = re.search(r"is ready at (\S+), encrypted", "".join(node.out))
    return found[1] if found else ""


async def test_the_services_of_the_compose_file_train_and_their_health_is_seen(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install 'zsfl[test]'")
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    health = re.search(r"--interval.*\n\s+CMD zsfl (.*) >/dev/null\n", (DEPLOY / "Dockerfile").read_text())
    assert health
    write_job(tmp_path).rename(tmp_path / "my_job.py")
    places = {"ZSFL_RUNS": f"{tmp_path}/runs", "ZSFL_KEYS": f"{tmp_path}/keys", "ZSFL_HOST": "127.0.0.1"}
    common = {**places, "ZSFL_ROUNDS": "2", "ZSFL_MDNS": "false"}

    def starting(name: str, peers: str = "", **more: str) -> Any:
        env = {**services[name]["environment"], **common, **more} | ({"ZSFL_PEERS": peers} if peers else {})
        args = shlex.split(services[name]["command"].replace("/job", str(tmp_path)))
        return command(*args, cwd=tmp_path, prefix=env_words(env))

    async with AsyncExitStack() as nodes:
        aggregator = await nodes.enter_async_context(starting("aggregator"))
        await eventually(lambda: aggregator.process.returncode is not None or address(aggregator))
        assert address(aggregator), aggregator.text
        port = address(aggregator).split(":")[1]
        look = shlex.split(health[1].replace("${ZSFL_HOST:-$(hostname)}:$ZSFL_PORT", f"localhost:{port}"))
        async with command(*look, cwd=tmp_path, prefix=env_words(places)) as healthy:
            assert await healthy.ended() == 0, healthy.text
        members = [name for name in services if name != "aggregator"]
        there = f"localhost:{port}"
        others = [await nodes.enter_async_context(starting(name, there)) for name in members[1:]]
        staying = await nodes.enter_async_context(starting(members[0], there, ZSFL_STAY="true"))
        for node in (aggregator, *others):
            assert await node.ended() == 0, node.text
        async with command(*look, "--wait-s", "0.5", cwd=tmp_path, prefix=env_words(places)) as ill:
            assert await ill.ended() == 1, ill.text
        await eventually(lambda: staying.process.returncode is not None or "stays, with nothing to do" in staying.text)
        staying.signal(signal.SIGTERM)
        assert await staying.ended() == 0, staying.text
    assert "finished: 2 rounds" in aggregator.text
    assert (tmp_path / "runs" / "tiny" / "model.safetensors").exists()
