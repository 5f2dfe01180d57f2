"""What each setting of a node may be."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable
from typing import Any

from zsfl.ranges import shard_ranges

BESIDE_RUNS = ("spills", "logs", "noise")
"""Folders that lie among those of the runs."""
CHOICES = {
    "mode": ("exact", "elastic", "async"),
    "durability": ("process", "power", "replica", "store"),
    "takeover": ("majority", "always", "never"),
}
"""Of settings that take one of a few words."""
SYNCED = ("power", "store")
"""Durabilities with which what is in the run's folder outlasts a loss of power."""


def _check_host(host: str) -> None:
    try:
        address = ipaddress.IPv4Address(host)
        usable = not (address.is_unspecified or address.is_multicast)
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("the IPv4 address of one interface, such as 127.0.0.1 or 192.168.1.5")


def is_address(text: str) -> bool:
    """Whether it is `host:port`."""
    found = re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9.-]*):([0-9]{1,5})", text)
    return found is not None and 0 < int(found[1]) < 65536


def _check_peers(peers: tuple[str, ...]) -> None:
    for peer in peers:
        if not is_address(peer):
            raise ValueError(f"host:port with a port from 1 to 65535, such as 192.168.1.5:4100, not {peer!r}")


def _check_names(names: tuple[str, ...]) -> None:
    for name in names:
        if not is_address(name):
            raise ValueError(f"name:port with a port from 1 to 65535, such as nodes.example.org:7700, not {name!r}")


def _check_shards(text: str) -> None:
    if text:
        shard_ranges(text)


def _at_least(low: int, high: float = math.inf) -> Callable[[int | None], None]:
    def check(value: int | None) -> None:
        if value is not None and not low <= value <= high:
            raise ValueError(f"a whole number from {low}" + (f" to {high:.0f}" if high < math.inf else " upwards"))

    return check


def _positive(value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError("a number of seconds above 0")


def _matches(pattern: str, expected: str) -> Callable[[str], None]:
    def check(value: str) -> None:
        if not re.fullmatch(pattern, value):
            raise ValueError(expected)

    return check


def _one_of(*words: str) -> Callable[[str], None]:
    *most, last = (word for word in words if word)
    return _matches("|".join(words), f"{', '.join(most)} or {last}")


CHECKS: dict[str, Callable[[Any], None]] = {
    "host": _check_host,
    "port": _at_least(0, 65535),
    "peers": _check_peers,
    "dns": _check_names,
    # One DNS label, because mDNS announces it; and a file name, because it names the log.
    "name": _matches(r"|[A-Za-z0-9][A-Za-z0-9_-]{0,62}", "up to 63 letters, digits, - and _"),
    "run": _matches(
        rf"|(?!(?i:{'|'.join(BESIDE_RUNS)})\Z)[A-Za-z0-9][A-Za-z0-9._-]{{0,99}}",
        f"up to 100 letters, digits, dots, - and _; not {', '.join(BESIDE_RUNS[:-1])} or {BESIDE_RUNS[-1]}, which are "
        "folders beside the runs",
    ),
    "cluster": _matches(r"|[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "up to 100 letters, digits, dots, - and _"),
    "device": _matches(r"auto|cpu|cuda(:[0-9]{1,3})?", "auto, cpu, cuda or cuda:N"),
    "threads": _at_least(1, 1024),
    "io_threads": _at_least(1, 64),
    "zap_domain": _matches(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "up to 100 letters, digits, dots, - and _"),
    "connections": _at_least(0, 8),
    "slots": _at_least(1, 1 << 20),
    "clients": _at_least(0),
    "start_with": _at_least(0),
    "mode": _one_of("", *CHOICES["mode"]),
    "durability": _one_of(*CHOICES["durability"]),
    "takeover": _one_of(*CHOICES["takeover"]),
    "keep_mib": _at_least(0, 1 << 30),
    # No chained file systems, some of which keep copies; credentials have places of their own, and settings are shown.
    "spill": _matches(
        r"|/[^\s:]*|(?!.*::)(?![^/]*//[^/]*:[^/]*@)[a-z][a-z0-9+.-]*://\S+",
        "a URL such as s3://bucket/folder or file:///folder, without a password: credentials go into fsspec's own "
        "configuration, or the environment",
    ),
    "spill_mib": _at_least(0, 1 << 30),
    "shards": _check_shards,
    "reassign": _check_shards,
    "clients_per_key": _at_least(1),
    "rounds": _at_least(1, 1 << 31),
    "metrics": _matches(r"|((\d+\.){3}\d+:)?\d{1,5}", "a port such as 9464, or HOST:PORT such as 192.168.1.5:9464"),
    "join_s": _positive,
    "patience_s": _positive,
    "request_s": _positive,
    "beat_s": _positive,
    "lost_after_s": _positive,
}
"""By field name; each raises a ValueError that says what was expected."""
