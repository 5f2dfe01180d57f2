"""What a run is in a store: JOB/runs/NAME/ and there, each named by the version that it has to do with,

vVERSION.commit                         a commit record, with the contributions that came since the one before
vVERSION-SERIAL-WRITER-BYTES-SHA.piece  bytes of a file of the run's folder, or of contributions, where those are many
vVERSION-SERIAL-WRITER-BYTES-SHA.mark   which pieces make the files of a checkpoint, and what the run had left by then

A commit is there once, whole or not at all, whoever else would record that version, and says its own digest. All others
are written once, each under a name of its own, which says what their bytes are. So nothing has to be renamed.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from zsfl.errors import StorageError
from zsfl.wire.fields import MAX_SHARDS, Count, VersionNumber
from zsfl.wire.succession import FileName, KeyText

PIECE_BYTES = 8 << 20
INLINE_BYTES = 1 << 20
"""So much of contributions is in the commit itself."""
MOST_BYTES = 64 << 20
"""Of a commit, or a mark."""
HEAD_BYTES = 32
"""Of a commit, which tell it from every other."""
_NAME = re.compile(r"v([0-9]{12})(?:\.(commit)|-([0-9]{8})-([0-9a-f]{8})-([0-9]{1,13})-([0-9a-f]{32})\.(piece|mark))")
PieceName = Annotated[
    str, Meta(pattern=r"^v[0-9]{12}-[0-9]{8}-[0-9a-f]{8}-[0-9]{1,13}-[0-9a-f]{32}\.piece\Z", max_length=100)
]


class Name(NamedTuple):
    """What a name says."""

    version: int
    kind: str
    serial: int
    size_bytes: int
    digest: str


def name_of(version: int, serial: int, writer: str, data: bytes, kind: str) -> str:
    """Of a piece or mark with these bytes, the so-manieth of its writer."""
    return f"v{version:012d}-{serial:08d}-{writer}-{len(data)}-{digest_of(data)}.{kind}"


def digest_of(data: bytes | memoryview) -> str:
    """As a name has it."""
    return hashlib.sha256(data).hexdigest()[:32]


def commit_name(version: int) -> str:
    """Of the record of this version, or of 0: that the run is begun."""
    return f"v{version:012d}.commit"


def parse(name: str) -> Name | None:
    """None where it is not one of these."""
    if not (found := _NAME.fullmatch(name)):
        return None
    return Name(int(found[1]), found[2] or found[7], int(found[3] or 0), int(found[5] or 0), found[6] or "")


class Came(msgspec.Struct, frozen=True, array_like=True):
    """Bytes that a file of the journal became longer by."""

    version: VersionNumber
    """Whose file it is."""
    data: bytes = b""
    pieces: list[PieceName] = []
    """These instead, where they are many."""


class Commit(msgspec.Struct, frozen=True, array_like=True):
    """A version that is recorded."""

    writer: str
    line: bytes
    """Of the ledger; of version 0 none."""
    came: list[Came]


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint, and what else there is of the run."""

    version: VersionNumber
    writer: str
    line: str
    """Digest of the record of this version; empty for the first."""
    epoch: Count
    shared: bool
    origin: Annotated[str, Meta(pattern=r"^([0-9a-f]{12})?\Z")]
    rounds: Count
    holders: Annotated[
        dict[KeyText, Annotated[tuple[Count, ...], Meta(max_length=MAX_SHARDS)]], Meta(max_length=MAX_SHARDS)
    ]
    files: dict[FileName, list[PieceName]]
    """By name, what they are made of, in order."""


def packed(commit: Commit) -> bytes:
    """A commit as it is stored."""
    data = msgspec.msgpack.encode(commit)
    return hashlib.sha256(data).digest() + data


def commit_of(data: bytes, place: str) -> Commit:
    """A commit that was read; `StorageError`, naming its place, where it is none."""
    try:
        if hashlib.sha256(data[HEAD_BYTES:]).digest() == data[:HEAD_BYTES]:
            return msgspec.msgpack.decode(data[HEAD_BYTES:], type=Commit)
        why = "it does not match its digest"
    except msgspec.MsgspecError as error:
        why = str(error)
    raise StorageError(f"{place} is no commit: {why}. Remove it, and what is of later versions, to go on before it")


def mark_of(data: bytes) -> Mark | None:
    """A mark that was read; None where it makes no sense."""
    try:
        return msgspec.json.decode(data, type=Mark)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
