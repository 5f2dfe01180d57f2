"""Two machines, as two network namespaces that a cable joins."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
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
    with machines_at("10.99.7.1", "10.99.7.2") as both:
        yield both


@pytest.fixture
def machines_without_multicast() -> Iterator[tuple[Machine, Machine]]:
    """The same on a LAN that passes no multicast, as many Wi-Fis do."""
    with machines_at("10.99.7.1", "10.99.7.2", switched=True) as both:
        yield both


@contextmanager
def machines_at(one: str, other: str, *, switched: bool = False) -> Iterator[tuple[Machine, Machine]]:
    """Two machines with these addresses, joined by a cable or by a switch that passes no multicast."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need iproute2 (the command ip)")
    tag = uuid4().hex[:6]
    left, right = Machine(f"zsfl-{tag}-a", one), Machine(f"zsfl-{tag}-b", other)
    switch = f"zsfl-{tag}-s"
    try:
        try:
            for namespace in (left.namespace, right.namespace, *([switch] if switched else [])):
                _ip("netns", "add", namespace)
            if switched:
                _ip("-n", switch, "link", "add", "name", "sw0", "type", "bridge")
                _ip("-n", switch, "link", "set", "sw0", "up")
                for machine, link in ((left, f"a{tag}"), (right, f"b{tag}")):
                    _cable(machine.namespace, link, switch, f"p{link}")
                    _ip("-n", switch, "link", "set", f"p{link}", "master", "sw0", "up")
                    _ip("-n", switch, "link", "set", f"p{link}", "type", "bridge_slave", "mcast_flood", "off")
            else:
                _cable(left.namespace, f"a{tag}", right.namespace, f"b{tag}")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        for machine, link in ((left, f"a{tag}"), (right, f"b{tag}")):
            _ip("-n", machine.namespace, "link", "set", "lo", "up")
            _ip("-n", machine.namespace, "addr", "add", f"{machine.host}/24", "dev", link)
            _ip("-n", machine.namespace, "link", "set", link, "up")
        yield left, right
    finally:
        for namespace in (left.namespace, right.namespace, switch):
            subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)


@contextmanager
def machine_that_asks(server: str) -> Iterator[Machine]:
    """One machine that only its own loopback belongs to, whose names are looked up at this name server."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need iproute2 (the command ip)")
    machine = Machine(f"zsfl-{uuid4().hex[:6]}", "127.0.0.1")
    settings = Path("/etc/netns") / machine.namespace
    try:
        try:
            _ip("netns", "add", machine.namespace)
            settings.mkdir(parents=True)
        except (subprocess.CalledProcessError, OSError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        (settings / "resolv.conf").write_text(f"nameserver {server}\noptions timeout:1 attempts:1\n")
        _ip("-n", machine.namespace, "link", "set", "lo", "up")
        yield machine
    finally:
        subprocess.run(["ip", "netns", "delete", machine.namespace], check=False, capture_output=True)
        shutil.rmtree(settings, ignore_errors=True)


def _cable(one: str, link: str, other: str, end: str) -> None:
    _ip("link", "add", link, "netns", one, "type", "veth", "peer", "name", end, "netns", other)


@contextmanager
def dropped(machine: Machine, port: int) -> Iterator[None]:
    """A firewall drops what comes from a port of this machine: its peers hear nothing at all of it."""
    rule = ("ipproto", "tcp", "sport", str(port), "blackhole")
    try:
        _ip("-n", machine.namespace, "rule", "add", *rule)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this system has no rules for ports: {error.stderr.strip()}")
    try:
        yield
    finally:
        _ip("-n", machine.namespace, "rule", "del", *rule)
