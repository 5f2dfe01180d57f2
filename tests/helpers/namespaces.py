"""Two machines, as two network namespaces that a cable joins."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import uuid4

import pytest


@dataclass(frozen=True, slots=True)
class Machine:
    """A namespace with one interface."""

    namespace: str
    host: str

    @property
    def inside(self) -> tuple[str, ...]:
        """What to put before a command to run it here."""
        return ("ip", "netns", "exec", self.namespace)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    """Two machines on one LAN, and no way out of it."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need iproute2 (the command ip)")
    tag = uuid4().hex[:6]
    left, right = Machine(f"zsfl-{tag}-a", "10.99.7.1"), Machine(f"zsfl-{tag}-b", "10.99.7.2")
    try:
        try:
            for machine in (left, right):
                _ip("netns", "add", machine.namespace)
            _ip("link", "add", f"a{tag}", "netns", left.namespace, "type", "veth",
                "peer", "name", f"b{tag}", "netns", right.namespace)  # fmt: skip
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        for machine, link in ((left, f"a{tag}"), (right, f"b{tag}")):
            _ip("-n", machine.namespace, "link", "set", "lo", "up")
            _ip("-n", machine.namespace, "addr", "add", f"{machine.host}/24", "dev", link)
            _ip("-n", machine.namespace, "link", "set", link, "up")
        yield left, right
    finally:
        for machine in (left, right):
            subprocess.run(["ip", "netns", "delete", machine.namespace], check=False, capture_output=True)
