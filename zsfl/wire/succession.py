"""Messages about who aggregates: promises of clients, and what those who stand by keep of a run."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from zsfl.ids import KEY_PATTERN
from zsfl.wire.fields import MAX_SHARDS, Count, Message, NodeIdText, Seconds, ShortText, VersionNumber

MAX_FILES = 4096
"""Files named in one answer; the rest follows in the next."""
PIECE_BYTES = 4 << 20
"""Of a file, in one answer."""

Holder = Annotated[str, Meta(pattern=r"^[0-9a-f]{12}\Z")]
"""Identity of a run folder."""
Digest = Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")]
"""SHA-256 of a commit record; empty: none."""
FILE_PATTERN = (
    r"^(ledger\.jsonl|metrics\.jsonl|model\.safetensors|best\.safetensors"
    r"|journal/v[0-9]{12}\.spills|checkpoint/round-[0-9]{6}/(place\.json|master\.safetensors))\Z"
)
KeyText = Annotated[str, Meta(pattern=KEY_PATTERN)]
FileName = Annotated[str, Meta(max_length=100, pattern=FILE_PATTERN)]
"""Of a run, below its folder: no other file is ever named, read or written, and none that somebody would run."""


class Grant(Message, frozen=True, kw_only=True, tag="grant"):
    """Asks a client to follow no other aggregator for so long; answered by Granted."""

    holder: Holder
    name: ShortText
    epoch: Count
    """That it leads in, or would."""
    known: Count
    """The last that it led in or followed."""
    version: VersionNumber
    """The newest that it has."""
    lease_s: Seconds


class Granted(Message, frozen=True, kw_only=True, tag="granted"):
    """What a client promised."""

    shards: Annotated[tuple[Count, ...], Meta(max_length=MAX_SHARDS)]
    """Those that it speaks for."""
    refused: ShortText = ""
    """Why it promised nothing; empty: it did."""
    lease_s: Seconds
    """What may be relied on: no longer than it itself keeps off after a restart, when it has forgotten its promises."""
    epoch: Count
    """The highest that it knows."""
    newest: tuple[Count, VersionNumber]
    """Epoch and version, the newest that it knew of before it promised."""


class Follow(Message, frozen=True, kw_only=True, tag="follow"):
    """Asks an aggregator what there is that this standby has not; answered by Following."""

    node: NodeIdText
    version: VersionNumber
    """The newest that it has."""
    ledger_bytes: Count
    last: Digest
    """Of the last record in these."""
    since: VersionNumber
    """Of which version on it may lack contributions."""
    checkpoint: Count | None
    """The newest that it has, by its round."""


class FileInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file as it is now. A ledger and what came for a version only grow, and a checkpoint stays as it is."""

    name: FileName
    size_bytes: Count
    changed_us: Count


class Following(Message, frozen=True, kw_only=True, tag="following"):
    """What a standby is to fetch, in this order."""

    agrees: bool
    """Whether the ledger of the aggregator begins with the records that the standby has: else it is to go back."""
    origin: Annotated[str, Meta(pattern=r"^([0-9a-f]{12})?\Z")] = ""
    """Which run it is, by the folder in which it began."""
    epoch: Count = 0
    """0: no takeover is possible yet."""
    holders: Annotated[
        dict[KeyText, Annotated[tuple[Count, ...], Meta(max_length=MAX_SHARDS)]], Meta(max_length=MAX_SHARDS)
    ] = msgspec.field(default_factory=dict[str, tuple[int, ...]])
    """Shards, by the key of the machine whose client holds them; none where no keys are used."""
    files: Annotated[tuple[FileInfo, ...], Meta(max_length=MAX_FILES)] = ()


class FetchPiece(Message, frozen=True, kw_only=True, tag="fetch-piece"):
    """Asks an aggregator for a piece of a file; answered by Piece."""

    name: FileName
    offset: Count
    size_bytes: Count


class Piece(Message, frozen=True, kw_only=True, tag="piece"):
    """Part: the bytes that are there, which may be fewer than asked for; none where the file is gone."""
