"""Every message between nodes, but for what is in `succession`, `enrolment`, `holding`, `examining` and `calling`.

A message is a small header (one of the structs below, in msgpack) and parts (raw tensor or file bytes).
Requests and their replies stand together; what is broadcast stands last.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from zsfl.ids import NodeCard, Role, RunId
from zsfl.tensors.spec import TensorSpec
from zsfl.wire.calling import CallBack
from zsfl.wire.enrolment import Enrol, Enrolled
from zsfl.wire.examining import Condition, Examine
from zsfl.wire.fields import (
    MAX_CLASSES,
    MAX_JOINED,
    MAX_OFFERS,
    MAX_PEERS_EXCHANGED,
    MAX_SETTLED,
    MAX_SHARDS,
    MAX_TENSORS,
    CidText,
    ClassCounts,
    Count,
    Counted,
    Keys,
    Load,
    LongText,
    Message,
    NodeIdText,
    Parts,
    PeerHint,
    PortionName,
    Seconds,
    ShardInfo,
    ShortText,
    SpillOffer,
    VersionNumber,
    Weight,
)  # fmt: skip
from zsfl.wire.holding import Holder, WhoHolds
from zsfl.wire.succession import FetchPiece, Follow, Following, Grant, Granted, Piece

Phase = Literal["waiting", "training", "idle", "finished", "failed"]
"""What the aggregator asks of its peers; see `RunState`."""


# --- control: who is there -------------------------------------------------------------------------------


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """A node introduces itself; answered by Welcome, or refused with the reason."""

    protocol: int
    facts: Annotated[dict[ShortText, ShortText], Meta(max_length=64)]
    """What both must agree on about the job (`Job.facts`)."""
    card: NodeCard
    codecs: Annotated[tuple[ShortText, ...], Meta(max_length=32)]


class Welcome(Message, frozen=True, kw_only=True, tag="welcome"):
    """HELLO agreed."""

    card: NodeCard
    codecs: Annotated[tuple[ShortText, ...], Meta(max_length=32)]
    peers: Annotated[tuple[PeerHint, ...], Meta(max_length=MAX_PEERS_EXCHANGED)]


class Join(Message, frozen=True, kw_only=True, tag="join"):
    """A client tells the aggregator which shards it holds; answered by Ok."""

    node: NodeIdText
    shards: Annotated[tuple[ShardInfo, ...], Meta(max_length=MAX_JOINED)]


class Evaluated(Message, frozen=True, kw_only=True, tag="evaluated"):
    """One shard's held-out test at one version; answered by Ok."""

    node: NodeIdText
    """Who tested it: counted is what the client says that holds the shard."""
    shard: Count
    version: VersionNumber
    samples: Count
    weight: Weight
    """What `loss_sum` is divided by: the samples, unless the loss weighs them."""
    correct: Annotated[float, Meta(ge=0, le=1 << 53)] | None
    loss_sum: float


class Train(Message, frozen=True, kw_only=True, tag="train"):
    """Asks an aggregator on hold to train until so many rounds are done (None: those of its job); answered by Ok."""

    rounds: Annotated[int, Meta(ge=1, le=1 << 31)] | None


class Drain(Message, frozen=True, kw_only=True, tag="drain"):
    """Asks a node to finish what it has in hand and leave; answered by Draining, however often it is asked."""

    node: NodeIdText | None = None
    """Who is meant, where that is known: not whoever has its address by now."""


class Draining(Message, frozen=True, kw_only=True, tag="draining"):
    """The node is about to leave."""

    node: NodeIdText
    name: ShortText
    role: Role
    busy: Count
    """Requests that it has in hand."""
    offered: Count
    """Spills that it holds, which no version has counted yet."""


class Ok(Message, frozen=True, kw_only=True, tag="ok"):
    """Done, nothing to tell."""


class Refusal(Message, frozen=True, kw_only=True, tag="refusal"):
    """The request failed; `kind` names a class of `zsfl.errors`."""

    kind: ShortText
    message: LongText
    retry_after_s: Seconds = 0.0


# --- data: steps ------------------------------------------------------------------------------------------


class Forward(Message, frozen=True, kw_only=True, tag="forward"):
    """Run the body forward at `version`; the graph may be cached for the backward."""

    cid: CidText
    version: VersionNumber
    seed: Count
    input: TensorSpec
    want_grad: bool = True
    """As in Backward."""
    reply_codec: ShortText = "raw"
    """How the tensor of the reply is to be packed: it is the client that knows the link."""
    merged: Count = 0
    """With more than 0, the forward runs on the merged batch of so many steps with this version and k."""


class Infer(Message, frozen=True, kw_only=True, tag="infer"):
    """Run the body forward in evaluation mode; nothing is kept. Answered by Output."""

    shard: Count
    """Whose input it is: where a job has several cuts, that says which body is meant."""
    version: VersionNumber
    input: TensorSpec
    reply_codec: ShortText = "raw"
    """As in Forward."""


class Output(Message, frozen=True, kw_only=True, tag="output"):
    """Activations of the body."""

    output: TensorSpec
    load: Load


class Backward(Message, frozen=True, kw_only=True, tag="backward"):
    """Run the body backward and spill its contribution; parts: gradient, then the input if `input` is given.

    Without the input, a server that no longer holds the forward answers InputNeeded.
    """

    cid: CidText
    version: VersionNumber
    seed: Count
    n: Weight
    """Weight sum of the batch (its sample count, unless the loss weighs samples)."""
    samples: Count
    grad: TensorSpec
    input: TensorSpec | None
    want_grad: bool
    """Whether the client needs the gradient of the input (not when its head is frozen)."""
    provenance: ShortText
    """Name of the client, for the record."""
    reply_codec: ShortText = "raw"
    """As in Forward."""
    again: bool = False
    """Whether a contribution of this step may be in place already: then this one stands for itself."""
    merged: Count = 0
    """As in Forward."""


class Step(Message, frozen=True, kw_only=True, tag="step"):
    """Label sharing: forward, loss and backward of the body in one; parts: input, then target."""

    cid: CidText
    version: VersionNumber
    seed: Count
    n: Weight
    samples: Count
    input: TensorSpec
    target: TensorSpec
    want_grad: bool
    provenance: ShortText
    reply_codec: ShortText = "raw"
    """As in Forward."""
    again: bool = False
    """As in Backward."""
    merged: Count = 0
    """As in Forward."""
    shift: Annotated[tuple[float, ...], Meta(max_length=MAX_CLASSES)] = ()
    """Added to the logits before the loss, one for each class; empty: nothing."""


class Spilled(Message, frozen=True, kw_only=True, tag="spilled"):
    """The body's contribution is in place on the server's disk; part: the gradient of the input, if wanted."""

    grad: TensorSpec | None
    loss_sum: float | None
    load: Load


# --- data: spills and weights -----------------------------------------------------------------------------


class FetchSpills(Message, frozen=True, kw_only=True, tag="fetch-spills"):
    """Asks a holder for spills; answered by Spills."""

    wanted: Keys


class Spills(Message, frozen=True, kw_only=True, tag="spills"):
    """Stored bytes of those spills asked for that the holder still has, one part each, in this order."""

    found: Keys


class Recheck(Message, frozen=True, kw_only=True, tag="recheck"):
    """Tells a holder what came out damaged, or not at all; answered by Spills without parts, those it has no more."""

    wanted: Keys


class Remake(Message, frozen=True, kw_only=True, tag="remake"):
    """Asks a client to have contributions made again that were acknowledged and are lost; answered by Ok."""

    lost: Parts


class CheckNeed(Message, frozen=True, kw_only=True, tag="check-need"):
    """Asks the aggregator which of these may still count and are not there; answered by Spills, those."""

    parts: Parts


class ReleaseSpills(Message, frozen=True, kw_only=True, tag="release-spills"):
    """Tells a holder that a commit record names these cids; answered by Ok."""

    cids: Annotated[tuple[CidText, ...], Meta(max_length=MAX_OFFERS)]


class FetchWeights(Message, frozen=True, kw_only=True, tag="fetch-weights"):
    """Asks the aggregator for weights, the newest when `version` is None; answered by Weights."""

    portion: PortionName
    version: VersionNumber | None


class Weights(Message, frozen=True, kw_only=True, tag="weights"):
    """One portion of the weights at one version, one part of the message a tensor."""

    portion: PortionName
    version: VersionNumber
    base: VersionNumber | None = None
    """The version whose bits these tensors are to be combined with (XOR); None: they are the weights themselves, as
    they always are when somebody asks."""
    tensors: Annotated[tuple[TensorSpec, ...], Meta(max_length=MAX_TENSORS)]


# --- broadcasts -------------------------------------------------------------------------------------------


class RunState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the run stands, as its aggregator sees it.

    training: every client makes its steps of `window` of `round` at `version`, each once (async: steps at `version`).
    waiting, idle: nothing to do yet. finished, failed: nothing to do any more.
    Meanwhile, whatever the phase, every client tests the version `tested` on its held-out samples.
    """

    run: Annotated[RunId, Meta(pattern=r"^[0-9a-f]{6}\Z")]
    phase: Phase
    version: VersionNumber
    round: Count
    rounds: Count
    window: Count
    windows: Count
    """In this round; in async mode, where `window` counts on for ever, those in which all data is gone through once."""
    epoch: Count = 0
    """Counts takeovers by other aggregators: what is said in an earlier one counts no more."""
    attempt: Count = 0
    """Counts how often the merged batch of this window was asked for before."""
    slices: Annotated[tuple[tuple[Count, Count, Count], ...], Meta(max_length=MAX_SHARDS)] = ()
    """Where the aggregator decides on batch sizes: shard, where in its endless stream these begin, size of each."""
    each: Count = 1
    """Async: how many steps of every client the next version takes at least. Before those nobody waits for it."""
    merger: NodeIdText | None = None
    """The split server that merges the batches of this version, where the job wants them merged."""
    merged: Annotated[tuple[Count, ...], Meta(max_length=MAX_SHARDS)] = ()
    """How many steps are merged, for each k."""
    present_classes: ClassCounts = ()
    """Training samples of each class at the clients that are there, where the job's settings need them."""
    all_classes: ClassCounts = ()
    """The same over all shards that ever joined."""
    tested: VersionNumber | None = None
    serial: Count = 0
    """Counts changes: what is older than what is known came by another way and took longer."""
    evaluation: Count = 0
    """Counts evaluations, so that a client tells a new one from one it has answered."""
    reason: LongText = ""


class Beat(Message, frozen=True, kw_only=True, tag="beat"):
    """Heartbeat: proof of life, and everything a peer may have missed."""

    card: NodeCard
    peers: Annotated[tuple[PeerHint, ...], Meta(max_length=MAX_PEERS_EXCHANGED)]
    counters: Counted
    load: Load | None = None
    offers: Annotated[tuple[SpillOffer, ...], Meta(max_length=MAX_OFFERS)] = ()
    state: RunState | None = None
    merging: Annotated[tuple[CidText, ...], Meta(max_length=MAX_OFFERS)] = ()
    """Steps that wait for the others of their merged batch: whose are missing holds all of them up."""


class Offers(Message, frozen=True, kw_only=True, tag="offers"):
    """Gossip digest: spills that just came into place at this node.

    Parts, if any: the stored bytes of each, so that they need not be asked for; empty for those that are long.
    """

    node: NodeIdText
    offers: Annotated[tuple[SpillOffer, ...], Meta(max_length=MAX_OFFERS)]
    counters: Counted = msgspec.field(default_factory=dict[str, float])
    """Empty where they were told a moment ago."""


class Announcement(Message, frozen=True, kw_only=True, tag="announcement"):
    """The aggregator's new state; after a commit also the cids that the new version settles."""

    node: NodeIdText
    state: RunState
    counted: Annotated[tuple[CidText, ...], Meta(max_length=MAX_SETTLED)] = ()
    dropped: Annotated[tuple[CidText, ...], Meta(max_length=MAX_SETTLED)] = ()


class Committed(Message, frozen=True, kw_only=True, tag="committed"):
    """For those who stand by: a version is recorded, and may wait for them to have it before it is announced."""

    node: NodeIdText
    version: VersionNumber


SAID_GOODBYE = "it said goodbye"
"""Why a peer is gone that left on purpose: nobody waits for it to come back."""


class Goodbye(Message, frozen=True, kw_only=True, tag="goodbye"):
    """The node leaves on purpose."""

    node: NodeIdText
    reason: ShortText


Request = (
    Hello | Join | Evaluated | Train | Drain | CheckNeed | Forward | Infer | Backward | Step | Examine
    | FetchSpills | Recheck | Remake | ReleaseSpills | FetchWeights | Grant | Follow | FetchPiece | Enrol | WhoHolds
)  # fmt: skip
Reply = (
    Welcome | Draining | Ok | Refusal | Output | Spilled | Spills | Weights | Granted | Following | Piece | Enrolled
    | Holder | Condition
)  # fmt: skip
Broadcast = Beat | Offers | Announcement | Committed | Goodbye | Weights | CallBack
AnyMessage = Request | Reply | Broadcast
