"""What messages are made of: bounds on everything that has a length, the types of fields, and the base of them all."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec
from msgspec import Meta

from zsfl.ids import (
    CID_PATTERN,
    HOST_PATTERN,
    KEY_PATTERN,
    PORT_PATTERN,
    SHOWN,
    Address,
    Cid,
    NodeId,
    PartName,
    Portion,
    Role,
    SpillKind,
    Version,
)

MAX_PEERS_EXCHANGED = 256
"""Addresses in one peer exchange: enough for a LAN, small enough for a heartbeat."""
MAX_OFFERS = 256
"""Spills in one message: a heartbeat stays small; the rest follows in the next."""
MAX_CARRIED_BYTES = 64 << 10
"""Spills that are longer do not travel with their offer."""
MAX_MEMBERS = 64
"""Steps in one merged spill."""
MAX_SETTLED = 4096
"""Cids in one announcement; there are several where a version settles more."""
MAX_TENSORS = 4000
"""Tensors of one part of the model."""

MAX_CLASSES = 1024
"""Classes that a job may adjust to; counts of more are refused where they are made."""
MAX_SHARDS = 4096
MAX_JOINED = 64
"""Shards in one Join; a client with more says it in several."""

Count = Annotated[int, Meta(ge=0, le=1 << 53)]
MAX_LINE = 600
"""Characters of a LineOfText."""
ShortText = Annotated[str, Meta(max_length=200, pattern=rf"^[{SHOWN}]*\Z")]
LineOfText = Annotated[str, Meta(max_length=MAX_LINE, pattern=rf"^[{SHOWN}]*\Z")]
LongText = Annotated[str, Meta(max_length=4000, pattern=rf"^[{SHOWN}\n\t]*\Z")]
_NOT_SHOWN = re.compile(rf"[^{SHOWN}\n\t]|[\ud800-\udfff]")
MAX_SAID = 2000
"""Characters of an error that travel."""
CidText = Annotated[Cid, Meta(max_length=64, pattern=CID_PATTERN)]
VersionNumber = Annotated[Version, Meta(ge=0, le=1 << 53)]
PortionName = Annotated[Portion, Meta(pattern=r"^(body|client(/[a-z0-9][a-z0-9-]{0,39})?)\Z")]
Samples = Annotated[int, Meta(ge=0, le=1 << 40)]
"""Of one shard; sums over all shards are a `Count`."""
ClassCounts = Annotated[tuple[Count, ...], Meta(max_length=MAX_CLASSES)]
Weight = Annotated[float, Meta(ge=0, le=1e300)]
"""Of a batch; a finite number."""
Counted = Annotated[dict[ShortText, Annotated[float, Meta(ge=0, le=1 << 53)]], Meta(max_length=64)]
"""A node's counters by name. None that a node could have counted is refused, and one that lies drowns no sum."""
NodeIdText = Annotated[NodeId, Meta(max_length=200, pattern=rf"^[{SHOWN}]*\Z")]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]
"""A bound also keeps NaN out, which would compare as neither early nor late."""


def fit_to_say(error: object) -> str:
    """What it says, as LongText: as much of it as travels, without what may not be shown."""
    return _NOT_SHOWN.sub("?", str(error)[:MAX_SAID])


def fit_for_line(text: object) -> str:
    """The same as LineOfText."""
    return fit_to_say(text).replace("\n", " ").replace("\t", " ")[:MAX_LINE]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", forbid_unknown_fields=True):
    """Base of everything that travels."""


Keys = Annotated[tuple[tuple[CidText, SpillKind], ...], Meta(max_length=MAX_OFFERS)]
"""Spills, as they are asked for."""
Parts = Annotated[tuple[tuple[CidText, PartName], ...], Meta(max_length=MAX_OFFERS)]
"""Parts of steps."""


STORED_PATTERN = r"[0-9]{8}-[0-9]{1,13}-[0-9a-f]{32}"
"""What an object in a store is called: its number, how many bytes it has, and the begin of their SHA-256."""


class SpillOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, order=True):
    """One spill that a node holds."""

    cid: CidText
    part: PartName
    version: VersionNumber
    size_bytes: Count
    members: Annotated[tuple[CidText, ...], Meta(max_length=MAX_MEMBERS)] = ()
    """Of a merged spill, all steps whose body parts it sums up, its own cid first."""
    at: Annotated[str, Meta(pattern=rf"^\Z|^{STORED_PATTERN}\Z")] = ""
    """Which of its own objects the node put it in, where its spills go to a store."""

    @property
    def kind(self) -> SpillKind:
        """What it is to be asked for as."""
        return "merged" if self.members else self.part


class PeerHint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a verified peer of the sender listens; to whoever reads it, no more than a hint."""

    id: NodeIdText
    role: Role
    address: Annotated[Address, Meta(pattern=rf"^{HOST_PATTERN}:{PORT_PATTERN}\Z")]
    key: Annotated[str, Meta(pattern=rf"^\Z|{KEY_PATTERN}")] = ""
    """Of its machine; empty where no keys are used."""


class ShardInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many samples a shard has; the samples themselves never leave the client."""

    shard: Count
    train_samples: Samples
    test_samples: Samples
    classes: Annotated[tuple[Samples, ...], Meta(max_length=MAX_CLASSES)] = ()
    """Training samples of each class, where the job's settings need them."""


class Load(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How busy a split server is; travels with every reply and heartbeat."""

    slots: Count
    """Requests it admits at once."""
    busy: Count
    """Requests it holds now, waiting ones included."""
    service_s: Seconds
    """Moving average of the compute time of one request."""
