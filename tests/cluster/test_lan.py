"""`zsfl up lan.toml`: nodes on several machines, which the system's ssh reaches, from one command."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
from helpers.jobs import write_job
from helpers.ledger import versions
from helpers.namespaces import Machine, machines
from helpers.pages import address_of, watching
from helpers.processes import MARK, command, finished, marked
from helpers.sshd import reached
from helpers.waiting import eventually

from zsfl.aggregator.audit import audit

__all__ = ["machines"]


class Lan:
    """Two machines with homes of their own, and the file that says what they play."""

    def __init__(self, folder: Path, machines: tuple[Machine, Machine], ssh: str, rounds: int) -> None:
        self.folder, self.here = folder, machines[0]
        self.mark = uuid4().hex
        job = write_job(folder)
        self.file = folder / "lan.toml"
        played = ('aggregator = true\nshards = "0"', 'split_servers = 2\nshards = "1"')
        text = f"job = {json.dumps(job.name)}\nssh = {json.dumps(ssh)}\n[settings]\nrounds = {rounds}\n"
        named = ("settings.keys", "env.ZSFL_KEYS")  # either will do
        for name, machine, roles, keys in zip(("desk", "gpu"), machines, played, named, strict=True):
            text += (
                f"[machines.{name}]\nssh = {json.dumps('root@' + machine.host)}\n{roles}\n"
                f"python = {json.dumps(sys.executable)}\nfolder = {json.dumps(str(folder / name))}\n"
                f"env.{MARK} = {json.dumps(self.mark)}\n"
                f"env.PYTHONPATH = {json.dumps(os.environ.get('PYTHONPATH', ''))}\n"
                f"{keys} = {json.dumps(str(folder / name / 'keys'))}\n"
            )
        self.file.write_text(text)

    def up(self, *flags: str) -> tuple[str, ...]:
        """The command."""
        return ("up", str(self.file), "--keys", str(self.folder / "keys"), *flags)


@pytest.fixture
def lan(tmp_path: Path, machines: tuple[Machine, Machine]) -> Iterator[Lan]:
    with reached(machines, tmp_path / "ssh") as how:
        yield Lan(tmp_path, machines, how.ssh, rounds=3)


async def test_from_nothing_to_a_finished_run_on_two_machines(lan: Lan) -> None:
    async with command(*lan.up(), cwd=lan.folder, prefix=lan.here.inside) as up:
        assert await up.ended() == 0, up.text
    run = audit(next((lan.folder / "desk" / "runs").glob("*/ledger.jsonl")).parent)
    assert (run.faults, run.pending) == ([], 0)
    assert run.versions > 0
    where = f"root@{lan.here.host}:{lan.folder / 'desk'}/runs/"
    assert where in up.text.replace("\n", "")
    assert "INSECURE" not in up.text
    assert marked(lan.mark) == []
    trusted = (lan.folder / "gpu" / "keys" / "trusted").read_text()
    assert " desk aggregator,client,observer,standby\n" in trusted
    assert " operator observer,operator\n" in trusted


async def test_ctrl_c_stops_all_of_it_and_a_lost_machine_ends_what_ran_there(lan: Lan) -> None:
    async with command(*lan.up("--rounds", "100000"), cwd=lan.folder, prefix=lan.here.inside) as up:
        await eventually(lambda: up.process.returncode is not None or "round 2/" in up.text)
        assert marked(lan.mark)
        up.signal(signal.SIGINT)
        assert await up.ended() == 130, up.text
        assert f"and root@{lan.here.host}:{lan.folder / 'desk'}/runs/tiny is kept" in up.text.replace("\n", "")
    assert marked(lan.mark) == []
    async with command(*lan.up("--rounds", "100000", "--resume"), cwd=lan.folder, prefix=lan.here.inside) as up:
        await eventually(lambda: up.process.returncode is not None or "assembled" in up.text)
        for child in psutil.Process(up.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if "gpu" in " ".join(child.cmdline()):
                    child.kill()
        assert await up.ended() == 1
        assert "machine gpu" in up.text
        assert "is lost" in up.text
        await eventually(lambda: not marked(lan.mark))


def with_ssh(folder: Path, script: str, settings: str = "rounds = 1") -> Path:
    """A LAN of this machine alone, which is reached by a command of our own."""
    ssh = folder / "ssh.sh"
    ssh.write_text(f"#!/bin/sh\nfor last; do :; done\n{script}\n")
    ssh.chmod(0o755)
    file = folder / "lan.toml"
    file.write_text(
        f"job = {json.dumps(write_job(folder).name)}\nssh = {json.dumps(str(ssh))}\n"
        f"[settings]\n{settings}\n"
        '[machines.all]\nssh = "me@127.0.0.1"\naggregator = true\nsplit_servers = 1\nshards = "0-1"\n'
        f"python = {json.dumps(sys.executable)}\nfolder = {json.dumps(str(folder / 'all'))}\n"
    )
    return file


async def test_the_page_shows_the_curves_of_a_run_whose_folder_is_elsewhere(tmp_path: Path) -> None:
    file = with_ssh(tmp_path, 'exec sh -c "$last"', "rounds = 100000")
    async with command("up", file, "--dash", cwd=tmp_path) as up, watching(await address_of(up)) as page:
        await page.until(lambda seen: len(seen.rounds) > 2 and seen.live["folder"])
        assert page.rounds[0]["round"] == 1
        assert page.live["folder"] == f"me@127.0.0.1:{tmp_path / 'all'}/runs/tiny"
        assert page.live["title"] == "tiny"
        up.signal(signal.SIGINT)
        assert await up.ended() == 130, up.text


async def test_what_ssh_prints_and_leaves_behind_holds_up_nothing(tmp_path: Path) -> None:
    """A shell there that greets without an end of line, and a connection that is kept for the next one."""
    file = with_ssh(tmp_path, 'sleep 3600 & echo $! > sleeping; printf "Welcome! "; exec sh -c "$last"')
    try:
        async with command("up", file, cwd=tmp_path) as up:
            assert await up.process.wait() == 0, up.text
            psutil.Process(int((tmp_path / "sleeping").read_text())).kill()
    finally:
        with suppress(psutil.Error):
            psutil.Process(int((tmp_path / "sleeping").read_text())).kill()


async def test_an_ssh_that_hangs_is_named_and_ended(tmp_path: Path) -> None:
    file = with_ssh(tmp_path, "trap '' TERM; echo $$ > hanging; while :; do sleep 1; done", "rounds = 1\njoin_s = 2.0")
    async with command("up", file, cwd=tmp_path) as up:
        assert await up.ended() == 1
    assert "not started yet: machine all" in up.text
    assert "multicast" not in up.text
    assert not psutil.pid_exists(int((tmp_path / "hanging").read_text()))


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exec /nowhere/python", " There is no /"),
        ("exec @PYTHON@ -I -S -c 'import zsfl'", "No module named 'zsfl'. zsfl is not installed for"),
        ("exec @PYTHON@ -c 'import zsfl, absent'", "absent is not installed for"),
        ("exec @PYTHON@ -m zsfl.cluster.absent", "No module named zsfl.cluster.absent. Is zsfl "),
        ("echo the disk is on fire >&2; exit 3", "code 3: the disk is on fire. Is zsfl "),
        ("echo no route >&2; exit 255", "code 255: no route. See whether this works: "),
    ],
)
async def test_why_a_machine_cannot_be_used_is_said(tmp_path: Path, script: str, said: str) -> None:
    file = with_ssh(tmp_path, script.replace("@PYTHON@", sys.executable))
    code, up = await finished("up", file, cwd=tmp_path)
    assert code == 1
    assert said in " ".join(up.text.split())


async def test_nodes_go_on_while_nobody_reads_what_they_say(tmp_path: Path) -> None:
    file = with_ssh(tmp_path, 'exec sh -c "$last"', "rounds = 100000")
    job, folder = tmp_path / "tiny.py", tmp_path / "all" / "runs" / "tiny"
    loud = "def loud(y, t):\n    print(('x' * 60_000 + '\\n') * 20)\n    return F.cross_entropy(y, t)\n\n\njob = "
    job.write_text(job.read_text().replace("loss=F.cross_entropy", "loss=loud").replace("job = ", loud))
    async with command("up", file, cwd=tmp_path) as up:
        await eventually(lambda: up.process.returncode is not None or "round 1/" in up.text)
        up.signal(signal.SIGSTOP)
        try:
            before = versions(folder)
            await eventually(lambda: versions(folder) > before + 40)  # each says 2 MB
        finally:
            up.signal(signal.SIGCONT)
        await eventually(lambda: up.process.returncode is not None or "lines of it were dropped" in up.text)
        up.signal(signal.SIGINT)
        assert await up.ended() == 130, up.text
