"""Machines that ssh reaches: a real sshd in each of two network namespaces."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.namespaces import Machine
from helpers.waiting import POLL_S

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


def _made_key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


@dataclass(frozen=True, slots=True)
class Reached:
    """How ssh is called to get into any of the machines."""

    ssh: str


@contextmanager
def reached(
    machines: tuple[Machine, ...], folder: Path, path: str = "", homes: Mapping[str, Path] | None = None
) -> Iterator[Reached]:
    """An sshd in each machine while the block runs; skips where there is none on this system.

    With `homes`, by address, what it starts has that home and this PATH.
    """
    if not Path(SSHD).exists() or not shutil.which("ssh"):
        pytest.skip("machines that ssh reaches need openssh-server and openssh-client")
    folder.mkdir()
    host, user = _made_key(folder / "host"), _made_key(folder / "user")
    Path("/run/sshd").mkdir(exist_ok=True)  # which sshd wants, and makes only as a service
    config = folder / "ssh.conf"
    config.write_text(
        f"Host *\nIdentityFile {user}\nStrictHostKeyChecking no\nUserKnownHostsFile {folder}/known\nLogLevel ERROR\n"
    )
    running: list[subprocess.Popen[bytes]] = []
    try:
        for machine in machines:
            rules = folder / f"{machine.host}.conf"
            # The shell that sshd starts may set PATH by itself, before the command.
            forced = ""
            if homes:
                homely = f'export PATH="{path}" HOME="{homes[machine.host]}"; cd; eval "$SSH_ORIGINAL_COMMAND"'
                forced = f"ForceCommand {homely}\n"
            rules.write_text(
                f"ListenAddress {machine.host}\nHostKey {host}\nAuthorizedKeysFile {user}.pub\nStrictModes no\n"
                f"UsePAM no\nPidFile none\nPermitRootLogin yes\n" + forced
            )
            log = folder / f"{machine.host}.log"
            running.append(subprocess.Popen([*machine.inside, SSHD, "-D", "-f", str(rules), "-E", str(log)]))
        for machine, sshd in zip(machines, running, strict=True):
            listens = [*machine.inside, "ssh-keyscan", "-T", "5", machine.host]
            while subprocess.run(listens, capture_output=True).returncode:
                assert sshd.poll() is None, (folder / f"{machine.host}.log").read_text()
                time.sleep(POLL_S)
        yield Reached(f"ssh -F {config}")
    finally:
        for sshd in running:
            sshd.terminate()
            sshd.wait(10)
