"""The file that says which machine of a LAN plays which role, for `zsfl up lan.toml`."""

from __future__ import annotations

import ipaddress
import shlex
import tomllib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from zsfl.errors import ConfigError
from zsfl.ids import Role
from zsfl.ranges import ranges, shard_ranges
from zsfl.settings import check_settings

KEYS = "ZSFL_KEYS"
"""The variable that names the folder of a machine's keys, where its settings do not."""
MOST_SHARDS = 1 << 16
"""Of one machine."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,40}$"
OWN = ("host", "port", "name", "shards", "clients", "hold", "resume", "service", "peers")
"""Settings that are said elsewhere: by the file's own words, or the command line."""


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One machine, and what runs there."""

    ssh: str = ""
    """Where the system's ssh is to go, such as anna@192.168.1.20; empty: this machine."""
    host: str = ""
    """Its address on the LAN; without, the one in `ssh`."""
    python: str = "python3"
    """The Python there that has zsfl."""
    folder: str = "zsfl"
    """Where the job goes and the runs are, from the home folder there; of this machine the working directory."""
    env: dict[Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = {}
    """Environment variables of its nodes, such as where the data is."""
    settings: dict[str, Any] = {}
    """Of its nodes, beside those of all."""
    aggregator: bool = False
    standby: bool = False
    split_servers: Annotated[int, Meta(ge=0, le=64)] = 0
    shards: str = ""
    """Those whose data is there, such as "0-3"."""
    client_processes: Annotated[int, Meta(ge=1, le=4096)] | None = None

    @property
    def address(self) -> str:
        """Where the others reach it; empty where that is not said."""
        host = self.ssh.rpartition("@")[2]
        return self.host or (host if _is_ipv4(host) else "")

    @property
    def held(self) -> tuple[int, ...]:
        """Its shards."""
        return tuple(n for a, b in (shard_ranges(self.shards) if self.shards else ()) for n in range(a, b + 1))

    @property
    def roles(self) -> frozenset[Role]:
        """What its nodes are."""
        played = {
            Role.AGGREGATOR: self.aggregator,
            Role.STANDBY: self.standby,
            Role.SPLIT_SERVER: self.split_servers,
            Role.CLIENT: self.shards,
        }
        # Who stands by may aggregate, and who was succeeded stands by.
        both = {Role.AGGREGATOR, Role.STANDBY} if self.aggregator or self.standby else set[Role]()
        return frozenset({role for role, plays in played.items() if plays} | both)


class Lan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of them."""

    job: str
    """The job file, beside this one unless its path says otherwise; sent to all machines."""
    files: tuple[str, ...] = ()
    """What it imports, from the same folder: sent too."""
    ssh: str = "ssh"
    """How ssh is called, options included."""
    settings: dict[str, Any] = {}
    """Of all nodes, by the names of their flags."""
    machines: dict[Annotated[str, Meta(pattern=NAME)], Machine]

    @property
    def shards(self) -> int:
        """How many there are."""
        return sum(len(machine.held) for machine in self.machines.values())

    @property
    def uses_keys(self) -> bool:
        """Whether what travels is encrypted: wherever it leaves a machine, unless the settings say otherwise."""
        addresses = [machine.address or "127.0.0.1" for machine in self.machines.values()]
        leaves = not all(map(_is_loopback, addresses))
        named = any(map(self.keys_of, self.machines)) or any(KEYS in one.env for one in self.machines.values())
        return not self.settings.get("insecure", False) and (leaves or named)

    def keys_of(self, machine: str) -> str:
        """The folder of its keys; empty where that machine says itself which one it is, as for any node there."""
        return str(self.machines[machine].settings.get("keys", self.settings.get("keys", "")))

    def ssh_words(self, machine: Machine) -> list[str]:
        """The command that has the machine run another one, which is to follow as one word."""
        options = ("ConnectTimeout=15", "BatchMode=yes", "ServerAliveInterval=5", "ServerAliveCountMax=3")
        return [*shlex.split(self.ssh), *(word for option in options for word in ("-o", option)), "--", machine.ssh]


def read_lan(path: Path) -> Lan:
    """What the file says; ConfigError names what is wrong with it."""
    try:
        lan = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Lan)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from None
    try:
        _check(lan)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return lan


def _check(lan: Lan) -> None:
    _check_settings(lan.settings, "[settings]")
    try:
        words = shlex.split(lan.ssh)
    except ValueError as error:
        raise ConfigError(f"ssh is {lan.ssh!r}: {error}") from None
    if not words:
        raise ConfigError("ssh is empty: name the command, or leave it out")
    for name in lan.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ConfigError(f"files has {name!r}: name files in the job's folder, or below it")
    for name, machine in lan.machines.items():
        place = f"[machines.{name}]"
        _check_settings(machine.settings, f"[machines.{name}.settings]")
        try:
            many = sum(last - first + 1 for first, last in shard_ranges(machine.shards)) if machine.shards else 0
        except ValueError as error:
            raise ConfigError(f"{place} shards is {machine.shards!r}: expected {error}") from None
        if many > MOST_SHARDS:
            raise ConfigError(f"{place} has {many} shards: use at most {MOST_SHARDS}")
        for what, path in (("folder", machine.folder), ("python", machine.python)):
            if path.startswith("~"):
                raise ConfigError(f"{place} {what} is {path!r}: give the whole path, or one from the home folder there")
        if "\0" in "".join((machine.ssh, machine.folder, machine.python, *machine.env.values())):
            raise ConfigError(f"{place} has a character that no command can have, \\0")
        if not machine.roles:
            raise ConfigError(f"{place} has nothing to do: give it aggregator, standby, split_servers or shards")
        if machine.ssh.startswith("-"):
            raise ConfigError(f"{place} ssh is {machine.ssh!r}: expected USER@HOST, or a name that ssh knows")
        if machine.host and not _is_ipv4(machine.host):
            raise ConfigError(f"{place} host is {machine.host!r}: expected an IPv4 address")
        if not machine.address and (machine.ssh or len(lan.machines) > 1):
            raise ConfigError(f"{place} says not where the others reach it: give its IPv4 address as host")
    local = [name for name, machine in lan.machines.items() if machine.address and _is_loopback(machine.address)]
    if local and len(local) < len(lan.machines):
        address = lan.machines[local[0]].address
        raise ConfigError(f"no other machine reaches {local[0]} at {address}: give its address on the LAN as host")
    _check_roles(lan)


def _check_roles(lan: Lan) -> None:
    aggregators = [name for name, machine in lan.machines.items() if machine.aggregator]
    if len(aggregators) != 1:
        named = f"{', '.join(aggregators)} have" if aggregators else "no machine has"
        raise ConfigError(f"{named} aggregator = true: one machine has to; others may stand by for it, standby = true")
    if not any(machine.split_servers for machine in lan.machines.values()):
        raise ConfigError("no machine has split_servers: give one of them split_servers = 1 at least")
    held = sorted(shard for machine in lan.machines.values() for shard in machine.held)
    if not held:
        raise ConfigError('no machine has shards: say where the data is, as shards = "0-3"')
    if twice := sorted({shard for shard, following in pairwise(held) if shard == following}):
        raise ConfigError(f"shards {ranges(twice)} are on several machines: the data of a shard is on one")
    if missing := sorted(set(range(held[-1])) - set(held)):
        raise ConfigError(f"shards {ranges(missing)} are on no machine: number them from 0 without gaps")


def _check_settings(settings: Mapping[str, Any], place: str) -> None:
    if said := [name for name in OWN if name in settings]:
        raise ConfigError(f"{place} has {said[0]!r}, which is said otherwise: leave it out")
    check_settings(settings, place)


def _is_loopback(address: str) -> bool:
    return ipaddress.IPv4Address(address).is_loopback


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True
