"""The template for SLURM, under a real SLURM on this machine alone."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.jobs import write_job
from helpers.waiting import HANG_S, POLL_S

from zsfl.aggregator.audit import audit
from zsfl.settings import NodeSettings

TEMPLATE = Path(__file__).resolve().parents[2] / "tools" / "deploy" / "slurm.sbatch"
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
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
NodeName=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 RealMemory=65536 State=UNKNOWN
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
        self.env = {**os.environ, "PATH": SEARCH, "SLURM_CONF": str(config)}
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
        for one in self._running:
            one.terminate()
        for one in self._running:
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


def submitted(slurm: Slurm, folder: Path, *flags: str, **export: str) -> str:
    """The number of the array."""
    given = {"JOB": "tiny.py", "ZSFL": f"{shlex.quote(sys.executable)} -m zsfl", "ZSFL_ROUNDS": "3", **export}
    named = ",".join(["ALL", *(f"{name}={value}" for name, value in given.items())])
    said = slurm.said("sbatch", "--parsable", *flags, f"--export={named}", str(TEMPLATE), cwd=folder)
    assert said.strip().isdigit(), said
    return said.strip()


def logs(folder: Path) -> str:
    return "\n".join(f"{file.name}:\n{file.read_text()}" for file in sorted(folder.glob("zsfl-*.log")))


def test_an_array_of_tasks_finds_itself_and_trains_to_the_end(slurm: Slurm, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    write_job(work)
    array = submitted(slurm, work, "--array=0-3", SERVERS="1")
    slurm.until(("squeue", "--noheader", f"--jobs={array}"), r"^$|Invalid job id")
    said = slurm.said("scontrol", "show", "job", array)
    assert re.findall(r"JobState=(\w+)", said) == ["COMPLETED"] * 4, said + logs(work)
    run = audit(work / "runs" / "tiny")
    assert (run.faults, run.pending) == ([], 0)
    assert run.versions > 0
    assert list((work / "meet" / array).iterdir()) == []
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
