"""Who and what things are called: ids, roles and the card a node shows its peers."""

from __future__ import annotations

import re
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Literal, NamedTuple, NewType

import msgspec

from zsfl.errors import BadShape

NodeId = NewType("NodeId", str)
"""Identity of one start of one node (a restarted node has a new one)."""
Cid = NewType("Cid", str)
"""Identity of one step of one client, chosen by the client, the same however often the step is retried."""
RunId = NewType("RunId", str)
"""Identity of one run, six hex digits, chosen by its aggregator.

A resumed run has a new one where versions were lost: steps that are made again are other steps then, so that nothing
left of before counts.
"""
Version = NewType("Version", int)
"""Names one set of weights; v+1 is v plus one window."""
Address = NewType("Address", str)
"""`host:port` of a node's control socket."""
PublicKey = NewType("PublicKey", str)
"""Of a machine: a CURVE key as Z85, 40 characters."""
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
PORT_PATTERN = "(6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3})"
HOST_PATTERN = rf"{_BYTE}(\.{_BYTE}){{3}}"
"""An IPv4 address. What a peer says is never looked up: that may take long, and holds up all sockets meanwhile."""
SHOWN = r"\x20-\x7e\xa0-\u2027\u202f-\u2065\u206a-\U0010ffff"
"""No control characters, and none that turn the direction of writing: what others say is shown on terminals."""
KEY_PATTERN = r"^[0-9A-Za-z.:+=^!/*?&<>()\[\]{}@%$#-]{40}\Z"

PartName = Literal["body", "client"]
"""Who computed a contribution: the body on a split server, or head and tail on the client."""
SpillKind = Literal["body", "client", "merged"]
"""What a spill holds: a contribution, or the sum of several steps' body contributions."""

Portion = NewType("Portion", str)
"""Which weights nodes of one kind need: `body`, `client`, or where a job has several cuts `client/CUT`."""
BODY = Portion("body")

PROTOCOL = 13
"""Version of the wire protocol; peers that differ refuse one another."""


class Role(StrEnum):
    """What a node does in a job."""

    CLIENT = "client"
    SPLIT_SERVER = "split-server"
    AGGREGATOR = "aggregator"
    STANDBY = "standby"
    OBSERVER = "observer"
    OPERATOR = "operator"
    """Gives orders (`zsfl drain`) and is no node."""


AGGREGATING = frozenset({Role.AGGREGATOR, Role.STANDBY})
"""Roles that record versions, or will once they take over."""


Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class NodeCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a node shows its peers: who it is and where its sockets are.

    All endpoints share `host`; a port of 0 means that the node has no such socket.
    """

    id: Annotated[NodeId, msgspec.Meta(max_length=200, pattern=rf"^[{SHOWN}]*\Z")]
    name: Annotated[str, msgspec.Meta(pattern=rf"^(?=[{SHOWN}]*\Z)[^\[\]]{{1,200}}\Z")]
    """It is shown on terminals; no brackets, which are something else there."""
    role: Role
    host: Annotated[str, msgspec.Meta(pattern=rf"^{HOST_PATTERN}\Z")]
    control_port: Port
    data_port: Port = 0
    pub_port: Port = 0
    news_port: Port = 0
    key: Annotated[str, msgspec.Meta(pattern=rf"^\Z|{KEY_PATTERN}")] = ""
    """Of its machine; empty where it uses no keys."""
    behind_nat: bool = False
    """Whether nobody can dial it: it dials whoever waits for it (`wire/calling.py`)."""

    @property
    def address(self) -> Address:
        """Where the control socket listens, as `host:port`."""
        return Address(f"{self.host}:{self.control_port}")

    @property
    def whereabouts(self) -> str:
        """Where it is, for people."""
        return "behind NAT" if self.behind_nat else self.address

    def endpoint(self, port: int) -> str:
        """The ZeroMQ endpoint of one of this node's ports."""
        return f"tcp://{self.host}:{port}"


class StepId(NamedTuple):
    """What a cid says."""

    run: RunId
    version: Version
    """The version that the step is made at."""
    shard: int
    k: int
    """Counts the steps that one shard makes at one version, from 0."""


# One spelling for each step; \d would match the digits of other scripts too.
_CID = re.compile(r"([0-9a-f]{6})-v([0-9]{8}|[1-9][0-9]{8,15})-s([0-9]{5}|[1-9][0-9]{5,8})-k([0-9]{3}|[1-9][0-9]{3,5})")
CID_PATTERN = rf"^{_CID.pattern}\Z"
"""What a cid looks like, for message schemas."""


def step_cid(run: RunId, shard: int, version: Version, k: int = 0) -> Cid:
    """The cid of the k-th step that `shard` makes at `version`; within a run, cids sort by version, shard and k."""
    return Cid(f"{run}-v{version:08d}-s{shard:05d}-k{k:03d}")


@lru_cache(8192)  # each is looked at several times on its way
def parse_cid(cid: str) -> StepId:
    """What a cid says; BadShape when it is none (it may come from anywhere)."""
    found = _CID.fullmatch(cid)
    if found is None:
        raise BadShape(f"{cid[:64]!r} is not the id of a step; expected the like of 3fa9c1-v00000012-s00003-k000")
    return StepId(RunId(found[1]), Version(int(found[2])), int(found[3]), int(found[4]))
