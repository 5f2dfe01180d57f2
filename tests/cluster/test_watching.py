"""Whoever looks at a run sees who is there, without the job."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import unhurried, write_job
from helpers.nodes import Nodes
from helpers.processes import finished
from helpers.waiting import eventually, until

import zsfl
from zsfl.ids import Role

PATIENT = ("--wait-s", "60")


async def listed(folder: Path, *flags: str) -> tuple[int, dict[str, Any], str]:
    code, said = await finished("ls", "--json", *flags, cwd=folder)
    return code, json.loads("".join(said.out) or "{}"), "".join(said.err)


async def test_ls_finds_all_nodes_of_the_newest_run_or_of_one_that_is_named(tmp_path: Path) -> None:
    nodes = Nodes(zsfl.load_job(unhurried(write_job(tmp_path, rounds=100_000))), tmp_path / "runs")
    try:
        seed = await nodes.start("aggregator", Role.AGGREGATOR)
        await nodes.start("server", Role.SPLIT_SERVER, peers=(seed,))
        for shard in ("0", "1"):
            await nodes.start(f"client-{shard}", Role.CLIENT, peers=(seed,), shards=shard)
        await eventually(lambda: nodes.rounds)
        everybody = ["aggregator", "server", "client-0", "client-1"]
        for flags in ((), ("runs/nodes",), ("nodes",), ("--peer", seed), ("tiny", "--peer", seed)):
            code, found, said = await listed(tmp_path, "--wait-s", "60", *flags)
            assert (code, [node["name"] for node in found.get("nodes", ())]) == (0, everybody), (flags, said)
            assert found["run"]["phase"] == "training"
        assert all(node["presence"] == "there" for node in found["nodes"])
        code, said = await finished("ls", "--wait-s", "60", cwd=tmp_path)
        text = "".join(said.out)
        assert text.startswith("training: round ")
        assert all(name in text for name in (*everybody, seed))
        code, _, said = await listed(tmp_path, "other", "--peer", seed)
        assert code == 2
        assert re.search("runs another job than observer-[0-9a-f]+: name is tiny there and other here", said), said
        for code, found, said in await asyncio.gather(listed(tmp_path, *PATIENT), listed(tmp_path, *PATIENT)):
            assert (code, [node["name"] for node in found["nodes"]], said) == (0, everybody, "")
    finally:
        await nodes.close()
    code, found, said = await listed(tmp_path, "--wait-s", "0.5")
    assert (code, found["nodes"]) == (1, []), said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "there is no run in runs: name the job whose nodes to look for"),
        (
            ("broken",),
            "runs/broken/address is to say where the run's aggregator is, as host:port, and says 'no\\x00where'",
        ),
        (("job.py",), "job.py is no folder of a run; name one"),
        (("nothing-of-the-sort", "--no-mdns", "--wait-s", "0.1"), "nobody of nothing-of-the-sort answers"),
    ],
)
async def test_ls_says_what_to_name(tmp_path: Path, args: tuple[str, ...], said: str) -> None:
    (tmp_path / "job.py").touch()
    if args == ("broken",):
        (tmp_path / "runs" / "broken").mkdir(parents=True)
        (tmp_path / "runs" / "broken" / "address").write_text("no\0where\n")
    code, printed = await finished("ls", *args, cwd=tmp_path)
    assert code in (1, 2)
    assert said in "".join(printed.err)


async def test_top_draws_who_is_there_until_it_is_interrupted(tmp_path: Path) -> None:
    nodes = Nodes(zsfl.load_job(write_job(tmp_path, rounds=100_000)), tmp_path / "runs")
    ours, theirs = os.openpty()
    try:
        seed = await nodes.start("aggregator", Role.AGGREGATOR)
        await nodes.start("server", Role.SPLIT_SERVER, peers=(seed,))
        await nodes.start("client", Role.CLIENT, peers=(seed,), shards="0,1")
        await eventually(lambda: nodes.rounds)
        shown, loop = bytearray(), asyncio.get_running_loop()
        os.set_blocking(ours, False)
        loop.add_reader(ours, lambda: shown.extend(os.read(ours, 65536)))
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "30"}
        top = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "zsfl", "top", cwd=tmp_path, env=env, stdin=theirs, stdout=theirs, stderr=theirs
        )
        await eventually(lambda: all(name in shown for name in (b"aggregator", b"server", b"client", b"training: ")))
        top.send_signal(signal.SIGINT)
        assert await until(top.wait()) == 0
        loop.remove_reader(ours)
        assert b"Traceback" not in shown
    finally:
        await nodes.close()
        os.close(ours)
        os.close(theirs)
    code, said = await finished("top", cwd=tmp_path)
    assert (code, "draws on a terminal: here, `zsfl ls`" in "".join(said.err)) == (2, True)
