"""A real name server, dnsmasq, for a network of its own."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from helpers.waiting import HANG_S

SEARCH = "/usr/sbin:/usr/bin"
needs_dnsmasq = pytest.mark.skipif(
    not shutil.which("dnsmasq", path=SEARCH), reason="there is no dnsmasq here: install dnsmasq-base"
)


class NameServer:
    """One that knows a single name; it listens at 127.0.0.1, where it runs."""

    def __init__(self, name: str, inside: tuple[str, ...], folder: Path) -> None:
        """`inside` is what to put before a command to run it there."""
        self._name = name
        self._records = folder / "records"
        self._records.write_text("")
        how = ("--no-resolv", "--no-hosts", f"--local=/{name}/", "--listen-address=127.0.0.1", "--bind-interfaces")
        files = (f"--addn-hosts={self._records}", f"--pid-file={folder / 'dnsmasq.pid'}")
        words = [*inside, str(shutil.which("dnsmasq", path=SEARCH)), "--keep-in-foreground", "--user=root"]
        self._process = subprocess.Popen([*words, *how, *files])

    def says(self, *hosts: str) -> None:
        """From now on these are the records."""
        self._records.write_text("".join(f"{host} {self._name}\n" for host in hosts))
        self._process.send_signal(signal.SIGHUP)

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(HANG_S)
