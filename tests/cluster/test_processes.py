"""What is left of a cluster's processes when somebody is killed or interrupted: nothing."""

from __future__ import annotations

import os
import pty
import shlex
import signal
import sys
from pathlib import Path

import psutil
import pytest
from helpers.jobs import write_job
from helpers.processes import MARK, command, finished, marked
from helpers.waiting import eventually

import zsfl
from zsfl.dashboard.runs import read_run

NOT_TRAINED = ", before anything was trained"
GO_ON = ", and runs/digits is kept; go on with: zsfl demo --clients 2 --rounds 100000 --run digits --resume"


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Every process that the test starts carries it."""
    monkeypatch.setenv(MARK, str(tmp_path))
    return str(tmp_path)


async def test_a_killed_parent_leaves_no_process(tmp_path: Path, mark: str) -> None:
    job = write_job(tmp_path, rounds=100_000)
    async with command("up", job, cwd=tmp_path) as up:
        await eventually(lambda: "round 2/" in up.text)
        assert len(marked(mark)) == 7  # the command, the fork server, the aggregator, 2 split servers, 2 clients
        up.process.kill()
        await eventually(lambda: not marked(mark))


async def test_a_killed_fork_server_leaves_no_process(tmp_path: Path, mark: str) -> None:
    async def run() -> None:
        async with zsfl.LocalCluster(write_job(tmp_path), runs=tmp_path) as cluster:
            async for report in cluster.train(100_000):
                if report.round == 2:
                    (fork_server,) = psutil.Process().children()
                    fork_server.kill()

    with pytest.raises(zsfl.RunFailed, match=r"the process that starts nodes ended; see .*logs"):
        await run()
    await eventually(lambda: not marked(mark))


@pytest.mark.parametrize("moment", ["fork server", "joined", "round 2/"])
async def test_ctrl_c_at_any_moment(tmp_path: Path, mark: str, moment: str) -> None:
    async with command("demo", "--clients", "2", "--rounds", "100000", cwd=tmp_path) as demo:
        if moment == "fork server":
            await eventually(lambda: len(marked(mark)) > 1)
        else:
            await eventually(lambda: moment in demo.text)
        demo.signal(signal.SIGINT)
        assert await demo.ended() == 130
        kept = (tmp_path / "runs" / "digits").exists()
        ends = (
            {GO_ON} if kept else {NOT_TRAINED, ""} if moment == "fork server" else {NOT_TRAINED}
        )  # "": while it imports
        assert demo.err in [[f"zsfl: interrupted; all nodes have left{end}\n"] for end in ends]
        assert kept or moment != "round 2/"
        assert not kept or moment != "fork server"
    assert not marked(mark)


async def test_what_ctrl_c_says_goes_on_with_the_run(tmp_path: Path) -> None:
    async with command("up", write_job(tmp_path, rounds=100_000), "--run=mine", "--no-mdns", cwd=tmp_path) as up:
        await eventually(lambda: "round 2/" in up.text)
        up.signal(signal.SIGINT)
        assert await up.ended() == 130
    said = up.err[-1].partition("go on with: zsfl ")[2]
    before = read_run(tmp_path / "runs" / "mine")
    words = [word for word in shlex.split(said) if word != "--no-mdns"]
    assert words == ["up", str(tmp_path / "tiny.py"), "--run", "mine", "--resume"]
    code, again = await finished(*words, "--rounds", str(len(before.rounds) + 1), "--in-process", cwd=tmp_path)
    assert code == 0, again.text
    assert len(read_run(tmp_path / "runs" / "mine").rounds) == len(before.rounds) + 1


async def test_ctrl_c_while_it_imports(tmp_path: Path) -> None:
    program = "import os, signal, sys; from zsfl.__main__ import main\n" \
        "class Interrupt:\n" \
        "    def find_spec(self, name, path=None, target=None):\n" \
        "        if name == 'zmq': os.kill(os.getpid(), signal.SIGINT)\n" \
        "sys.meta_path.insert(0, Interrupt()); sys.argv = ['zsfl', 'demo']; sys.exit(main())"  # fmt: skip
    async with command(cwd=tmp_path, run=("-c", program)) as demo:
        assert await demo.ended() == 130
        assert demo.err == ["zsfl: interrupted; all nodes have left\n"]


def test_on_a_terminal(tmp_path: Path, mark: str) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        args = [sys.executable, "-m", "zsfl", "demo", "--clients", "2", "--split-servers", "1", "--rounds", "100000"]
        os.execve(sys.executable, args, {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"})
    shown = b""
    while b"test accuracy" not in shown:
        shown += os.read(terminal, 65536)
    os.write(terminal, b"\x03")  # Ctrl-C, as typed
    while data := _read(terminal):
        shown += data
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    text = shown.decode()
    assert "Traceback" not in text
    again = "--clients 2 --split-servers 1 --rounds 100000 --run digits --resume"
    assert text.rstrip().endswith(f"all nodes have left, and runs/digits is kept; go on with: zsfl demo {again}")
    assert "loading PyTorch and demo.py" in text
    assert "of 4 nodes: " in text
    assert " left" in text
    assert not marked(mark)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed
        return b""
