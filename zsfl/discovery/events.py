"""What a peer table can be told, and what it can ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from zsfl.ids import Address, NodeCard, NodeId, Role

Source = Literal["mdns", "dns", "folder", "seed", "exchange", "hello"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A hint that a node of this job listens at `address`: never proof of life or of identity."""

    address: Address
    source: Source
    role: Role | None = None
    node_id: NodeId | None = None
    key: str = ""
    """Of its machine, as far as that is known; tried first."""


@dataclass(frozen=True, slots=True)
class Welcomed:
    """A HELLO agreed on job, protocol and identity; `by` says who sent it.

    `address` is the one dialled when `by` is "me", and `card.address` when it is "them".
    """

    card: NodeCard
    address: Address
    by: Literal["me", "them"]


@dataclass(frozen=True, slots=True)
class Refused:
    """A HELLO with `address` did not agree; not to be tried again when `final`."""

    address: Address
    reason: str
    final: bool


@dataclass(frozen=True, slots=True)
class DialFailed:
    """Nobody answered the HELLO sent to `address`."""

    address: Address


@dataclass(frozen=True, slots=True)
class Heard:
    """A heartbeat, or any other message, of a peer came in."""

    node_id: NodeId


@dataclass(frozen=True, slots=True)
class Left:
    """A peer said goodbye."""

    node_id: NodeId
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True, slots=True)
class Dial:
    """Send HELLO to `address`, and answer with Welcomed by "me", Refused or DialFailed at that address."""

    address: Address


@dataclass(frozen=True, slots=True)
class Joined:
    """This node is a peer from now on."""

    card: NodeCard


@dataclass(frozen=True, slots=True)
class Lost:
    """This node is no longer a peer; `reason` is for people."""

    card: NodeCard
    reason: str


Event = Candidate | Welcomed | Refused | DialFailed | Heard | Left | Tick
Action = Dial | Joined | Lost
