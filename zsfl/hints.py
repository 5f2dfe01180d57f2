"""What to do about a peer that is gone: where it was, and the command that starts such a node."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from zsfl.ids import Address, NodeCard, Role
from zsfl.settings import NodeSettings
from zsfl.wire.door import is_loopback

AGREED = ("cluster", "clients", "mode")
"""Settings that nodes are no peers without, where one of them has them."""


def how_to_start(
    role: Role, settings: NodeSettings, near: Address, shards: Iterable[int] = (), *, behind_nat: bool = False
) -> str:
    """The command for a node that finds the one with these settings, which is `near`.

    JOB stands for the job file, ADDRESS and KEYS for another machine's address and folder of keys.
    """
    words = ["zsfl", "node", str(role), "JOB"]
    if role is Role.AGGREGATOR:  # one that was there before: it alone has the run
        words.append("--resume")
    if held := ",".join(map(str, sorted(shards))):
        words += ["--shards", held]
    for name in AGREED:
        if value := getattr(settings, name):
            words += [f"--{name}", str(value)]
    if settings.insecure:
        words.append("--insecure")
    is_local = is_loopback(settings.host)
    if settings.keys:
        words += ["--keys", settings.keys if is_local else "KEYS"]
    if not settings.mdns or settings.peers or behind_nat:
        words += ["--no-mdns"] * (not settings.mdns) + ["--peer", near]
    if behind_nat:
        words.append("--behind-nat")
    elif not is_local:
        words += ["--host", "ADDRESS"]
    return shlex.join(words)


def where_it_was(card: NodeCard, host: str) -> str:
    """What to look at, seen from the machine with this address."""
    if card.behind_nat:
        return f"{card.name} ran behind NAT: is its machine on, and does it get through to this one?"
    if is_loopback(card.host) or card.host == host:
        return f"{card.name} ran at {card.address}, on this machine: its log, or its terminal, says how it ended"
    return f"{card.name} ran at {card.address}: is that machine on, and in reach? `zsfl doctor` there finds out more"
