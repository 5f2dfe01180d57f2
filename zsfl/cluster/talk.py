"""What the process that starts nodes on a machine is told, and what it tells beside their reports: JSON lines."""

from __future__ import annotations

from typing import Any

import msgspec

from zsfl.ids import Role
from zsfl.reports import AnyReport, Report, from_line

MAX_LINE_BYTES = 1 << 24


class Order(msgspec.Struct, frozen=True, tag_field="do"):
    """Base of every order."""


class Spawn(Order, frozen=True, tag="spawn"):
    """Fork a node."""

    name: str
    role: Role
    flags: dict[str, Any]
    """Settings by field name."""
    log: str
    """File that takes what it prints; empty: that is told, line by line."""


class Kill(Order, frozen=True, tag="kill"):
    """Send a signal to a node."""

    name: str
    signal: int


class Files(Order, frozen=True, tag="files"):
    """Put these files, by name, where the job is: told before anything else where the command line says so."""

    files: dict[str, bytes]


class Introduce(Order, frozen=True, tag="introduce"):
    """Say who this machine is: answered by Introduced."""

    keys: str | None
    """Folder of its keys, empty the one that it would use by itself; None: none are used."""


class Trust(Order, frozen=True, tag="trust"):
    """Trust these machines from now on."""

    keys: str
    machines: tuple[tuple[str, str, tuple[Role, ...]], ...]
    """Key, name, and what its nodes may be."""


class Describe(Order, frozen=True, tag="describe"):
    """Say what the job has: answered by Described."""


class Introduced(Report, frozen=True, kw_only=True, tag="introduced"):
    """Who a machine is."""

    protocol: int
    version: str
    """Of zsfl."""
    key: str = ""


class Described(Report, frozen=True, kw_only=True, tag="described"):
    """What the job has, or why it cannot be loaded."""

    shards: int = 0
    error: str = ""


class Printed(Report, frozen=True, kw_only=True, tag="printed"):
    """What a node printed, one line or the beginning of a long one."""

    line: str


AnyOrder = Spawn | Kill | Files | Introduce | Trust | Describe

_orders = msgspec.json.Decoder(AnyOrder)
_own = msgspec.json.Decoder(Introduced | Described | Printed)


def read_order(line: bytes) -> AnyOrder:
    """The order in one line."""
    return _orders.decode(line)


def read_told(line: bytes) -> AnyReport | Introduced | Described | Printed:
    """What one line tells; `msgspec.MsgspecError` when it tells nothing."""
    try:
        return _own.decode(line)
    except msgspec.ValidationError:
        return from_line(line)
