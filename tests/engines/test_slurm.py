"""The template for SLURM, under a real SLURM on this machine alone."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.documents import MANY, ROOT, Reader, blocks
from helpers.waiting import HANG_S, POLL_S

from zsfl.aggregator.audit import audit
from zsfl.settings import NodeSettings

TEMPLATE = ROOT / "tools" / "deploy" / "slurm.sbatch"
PAGE, TUTORIAL = ROOT / "docs" / "how-to" / "slurm.md", ROOT / "docs" / "tutorial.md"
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin"
MISSING = [name for name in ("slurmctld", "slurmd", "sbatch", "squeue") if not shutil.which(name, path=SEARCH)]
CONFIG = """
ClusterName=test
SlurmctldHost={name}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
NodeName=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 RealMemory=65536 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A controller, one machine, and the commands that talk to them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        taken = [socket.socket() for _ in range(2)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in taken]
        config = folder / "slurm.conf"
        config.write_text(CONFIG.format(folder=folder, ports=ports, name=socket.gethostname()))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        gpus = [folder / "gpu0", folder / "gpu1"]
        for one in gpus:
            one.touch()
        (folder / "gres.conf").write_text("".join(f"Name=gpu File={one}\n" for one in gpus))
        self.env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{SEARCH}", "SLURM_CONF": str(config)}
        for one in taken:
            one.close()
        self._running = [
            subprocess.Popen(words, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for words in (("slurmctld", "-D", "-i"), ("slurmd", "-D", "-N", "localhost"))
        ]

    def said(self, *words: str, cwd: Path | None = None) -> str:
        """What a command says."""
        done = subprocess.run(words, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=HANG_S)
        return done.stdout if done.returncode == 0 else done.stderr

    def until(self, words: tuple[str, ...], pattern: str) -> str:
        """What a command says, once it is that."""
        deadline = time.monotonic() + HANG_S
        while not re.search(pattern, said := self.said(*words)):
            assert time.monotonic() < deadline, said + self._logs()
            assert all(one.poll() is None for one in self._running), self._logs()
            time.sleep(10 * POLL_S)
        return said

    def _logs(self) -> str:
        return "".join(file.read_text()[-4000:] for file in self._folder.glob("slurm*.log"))

    def close(self) -> None:
        """End it, and what it runs."""
        self.said("scancel", "--user=root", "--signal=KILL", "--full")
        self.said("scancel", "--user=root")  # and what had not begun
        with suppress(AssertionError):
            self.until(("squeue", "--noheader", "--me"), r"\A\Z")
        for one in self._running:
            one.terminate()
        for one in self._running:
            with suppress(subprocess.TimeoutExpired):
                one.wait(HANG_S)
            one.kill()
            one.wait(HANG_S)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    if MISSING:
        pytest.skip(f"there is no {', '.join(MISSING)} here: install slurm-wlm")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs for others, and so has to be root")
    running = Slurm(tmp_path / "slurm")
    try:
        running.until(("sinfo", "--noheader", "--format=%T"), "^idle")
        yield running
    finally:
        running.close()


def followed(slurm: Slurm, script: str, folder: Path, **env: str) -> list[str]:
    """What a reader types, all of it in one shell; the numbers of the arrays that they submit by it."""
    done = subprocess.run(
        ["bash", "-ec", script], cwd=folder, env={**slurm.env, **env}, capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 0, done.stderr
    return re.findall(r"Submitted batch job (\d+)", done.stdout)


def ended(slurm: Slurm, folder: Path, *arrays: str) -> None:
    """All tasks of these arrays end well."""
    slurm.until(("squeue", "--noheader", "--me"), r"\A\Z")
    for array in arrays:
        said = slurm.said("scontrol", "show", "job", array)
        states = re.findall(r"JobState=(\w+)", said)
        assert set(states) == {"COMPLETED"}, said + logs(folder)


def logs(folder: Path) -> str:
    return "\n".join(f"{file.name}:\n{file.read_text()}" for file in sorted(folder.glob("zsfl-*.log")))


def test_the_page_can_be_followed(slurm: Slurm, tmp_path: Path) -> None:
    work = tmp_path / "home" / "work"
    work.mkdir(parents=True)
    (work / "tools").symlink_to(ROOT / "tools")
    reader = Reader({"127.0.0.1": (work, ())}, slurm.env)
    reader.write("my_job.py", next(one.text for one in blocks(TUTORIAL) if one.file == "my_job.py"))
    whole, two = (block.text for block in blocks(PAGE))
    look = re.search("^zsfl top .*$", PAGE.read_text(), re.MULTILINE)
    assert look
    (array,) = followed(slurm, whole, work, ZSFL_ROUNDS=MANY)
    slurm.until(("find", str(work / "meet" / array), "-type", "f"), r"\A/")
    try:
        reader.follow(look[0].replace("ARRAY", array).replace("ADDRESS", "127.0.0.1"))
        reader.running[0].until("round [2-9]")
        reader.running[0].interrupt()
        assert reader.running[0].end() in (0, 130, -signal.SIGINT)
    finally:
        for command in reader.running:
            command.kill()
    # As SLURM does when the time is nearly up.
    slurm.said("scancel", "--batch", "--signal=TERM", array)
    ended(slurm, work, array)
    run = audit(work / "runs" / "my-job")
    assert run.faults == []
    assert run.versions > 0
    arrays = followed(slurm, two, work, ZSFL_RUN="two", ZSFL_ROUNDS="2")
    assert len(arrays) == 2
    ended(slurm, work, *arrays)
    run = audit(work / "runs" / "two")
    assert (run.faults, run.pending) == ([], 0)
    assert run.versions > 0
    assert list((work / "meet" / "one").iterdir()) == []
    assert "encrypted" in logs(work)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"JOB": ""}, "name the job file"),
        ({"SLURM_ARRAY_TASK_COUNT": ""}, "this is for an array"),
        ({"SERVERS": "3"}, "leave one for a client"),
        ({"SLURM_ARRAY_TASK_ID": "4"}, "set TASKS"),
        ({"SLURMD_NODENAME": "nowhere.invalid"}, "nobody knows the address of nowhere.invalid here: set HOST"),
    ],
)
def test_what_does_not_fit_is_said(env: dict[str, str], said: str, tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "1"}
    given = {"JOB": "x.py", "SLURMD_NODENAME": "localhost", "ZSFL": "true", **array, **env}
    done = subprocess.run(["bash", str(TEMPLATE)], env={"PATH": SEARCH, **given}, capture_output=True, text=True)
    assert done.returncode != 0
    assert said in done.stderr


def test_what_the_template_sets_are_settings() -> None:
    names = set(re.findall(r"\bZSFL_([A-Z_]+)", TEMPLATE.read_text())) - {""}
    assert names <= {name.upper() for name in NodeSettings.__dataclass_fields__}
