"""A name whose DNS records are the addresses of nodes, as a headless service of Kubernetes has it.

Looked up by the system's own resolver, again and again, for the records change as nodes come and go. A hint only.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable

from zsfl.discovery.events import Candidate
from zsfl.discovery.slow import Slow
from zsfl.ids import Address

LOOK_S = 3.0
"""Between two looks."""
ANSWER_S = 10.0
"""After which it is said that no answer comes; it is waited for all the same."""
MAX_FOUND = 1024
"""Addresses of one name; further ones are left out."""


def addresses_of(place: str) -> list[Address]:
    """Where a name, given as NAME:PORT, has nodes; OSError when it cannot be looked up."""
    name, _, port = place.rpartition(":")
    found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    hosts = dict.fromkeys(ipaddress.IPv4Address(entry[4][0]) for entry in found)
    usable = [host for host in hosts if not (host.is_unspecified or host.is_multicast)]
    return [Address(f"{host}:{port}") for host in usable[:MAX_FOUND]]


async def follow_name(place: str, found: Callable[[Candidate], None], note: Callable[[str, str], None]) -> None:
    """Tell `found` of all of them, every few seconds, and `note` once why not."""
    looking, is_told = Slow(lambda: addresses_of(place)), False
    while True:
        try:
            for address in await looking.result(ANSWER_S):
                found(Candidate(address, "dns"))
            is_told = False
        except (OSError, UnicodeError) as error:  # no answer in time, too; and of what is no name the latter
            if not is_told:
                why = getattr(error, "strerror", None) or error
                note(f"looking up {place.rpartition(':')[0]}: {why}; trying again every {LOOK_S:g} s", "warning")
            is_told = True
        await asyncio.sleep(LOOK_S)
