"""Ids of nodes: random, and where keys are used such that only the machine that a node is on can have them.

12 random hex digits; with a key, also `-` and 16 hex digits of the SHA-256 of those digits and the key. Whoever has the
key can tell that it made the id; nobody else can tell even that two ids are of one machine.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from functools import lru_cache

from zsfl.ids import NodeId


def new_node_id(key: str = "") -> NodeId:
    """Of one start of one node, on the machine with this public key; without one where no keys are used."""
    salt = secrets.token_hex(6)
    return NodeId(f"{salt}-{_mark(salt, key)}" if key else salt)


@lru_cache(4096)  # asked for each request
def is_of(node_id: NodeId, key: str) -> bool:
    """Whether a machine with this key made the id."""
    salt, _, mark = node_id.partition("-")
    return hmac.compare_digest(mark.encode(), _mark(salt, key).encode())


def _mark(salt: str, key: str) -> str:
    return hashlib.sha256(f"{salt}\0{key}".encode()).hexdigest()[:16]
