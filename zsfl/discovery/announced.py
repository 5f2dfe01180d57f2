"""What a node shows of itself where others look for it: an address, and hashes that tell its own alone any more."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from zsfl.discovery.events import Candidate, Source
from zsfl.ids import Address, NodeId, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What one well-formed announcement says."""

    address: Address
    node_id: NodeId
    job_hash: str


def job_hash(name: str, cluster: str) -> str:
    """Of a job and its cluster: enough to find their nodes, not their names."""
    return hashlib.sha256(f"{name} {cluster}".encode()).hexdigest()[:16]


def opaque(node_id: NodeId, job: str, protocol: int, role: Role, key: str) -> str:
    """What a node announces of itself besides its address: two hashes, salted by its id.

    The first tells those who know the job that it is theirs, the second those who trust its machine what it is. Nobody
    else can tell even whether two nodes are of one job, as long as its name is not easily guessed.
    """
    return _hash(node_id, job, str(protocol)) + _hash(node_id, job, str(protocol), role, key)


def _hash(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Recogniser:
    """Knows the announcements of one job's nodes."""

    job: str
    """By `job_hash`."""
    protocol: int
    keys: Callable[[], Iterable[str]] = lambda: ("",)
    """Those of the machines whose nodes may be peers; one that is empty stands for no keys."""

    def candidate(self, seen: Announcement, source: Source) -> Candidate | str:
        """What it comes to, or why it can be no peer."""
        if seen.job_hash[:16] != _hash(seen.node_id, self.job, str(self.protocol)):
            return "of another job, --cluster (each `zsfl up` is one of its own) or version of the protocol,"
        for key in self.keys():
            for role in Role:
                if opaque(seen.node_id, self.job, self.protocol, role, key) == seen.job_hash:
                    return Candidate(seen.address, source, role, seen.node_id, key)
        return "of this job, but not of a machine that this one trusts (or without keys, where this one has them),"
