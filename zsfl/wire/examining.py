"""Messages by which somebody who looks after nodes asks one how it is, and whom it hears: `zsfl doctor`."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from zsfl.ids import NodeCard
from zsfl.wire.fields import MAX_PEERS_EXCHANGED, Count, LineOfText, Message, Seconds, ShortText

MAX_TOLD = 16
"""Refusals, and waits, in one answer."""


class Examine(Message, frozen=True, kw_only=True, tag="examine"):
    """Asks a node how it is; answered by Condition."""


class Hearing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A peer of the node that answers."""

    card: NodeCard
    heard_s: Seconds
    """Seconds since it was heard last."""


class Wait(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that the node cannot go on without."""

    what: LineOfText
    seconds: Seconds


class Condition(Message, frozen=True, kw_only=True, tag="condition"):
    """How a node is."""

    card: NodeCard
    protocol: int
    facts: Annotated[dict[ShortText, ShortText], Meta(max_length=64)]
    """As in Hello."""
    clock_s: Annotated[float, Meta(ge=0, le=1e12)]
    """The time of day there, in seconds since 1970."""
    mdns: bool
    """Whether it announces itself by multicast, or tries to."""
    peers: Count
    """How many it has."""
    hears: Annotated[tuple[Hearing, ...], Meta(max_length=MAX_PEERS_EXCHANGED)]
    """As many of them as a message takes, those that serve first."""
    refused: Annotated[dict[ShortText, LineOfText], Meta(max_length=MAX_TOLD)]
    """Why addresses did not become peers."""
    waits: Annotated[tuple[Wait, ...], Meta(max_length=MAX_TOLD)]
    """What it waits for; empty also where it computes, and cannot say."""
    versions: Annotated[dict[ShortText, ShortText], Meta(max_length=16)]
    """Of Python and packages."""
    free_bytes: Count | None
    """Of the disk that it writes to; None where that cannot be told."""
    writable: bool
    """Whether it may write in its folder of runs."""
