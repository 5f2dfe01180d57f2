"""Who may send which message: the one table, which every receiver goes by.

What a key may be is for its owner's hosts to say (`zsfl keys trust KEY NAME ROLES`); what a role may say stands here.
"""

from __future__ import annotations

from zsfl.ids import Role
from zsfl.wire import messages as m
from zsfl.wire.calling import CallBack
from zsfl.wire.enrolment import Enrol, Enrolled
from zsfl.wire.examining import Condition, Examine
from zsfl.wire.fields import Message
from zsfl.wire.holding import Holder, WhoHolds
from zsfl.wire.succession import FetchPiece, Follow, Following, Grant, Granted, Piece

_CLIENT = frozenset({Role.CLIENT})
_SERVER = frozenset({Role.SPLIT_SERVER})
_AGGREGATOR = frozenset({Role.AGGREGATOR})
_STANDBY = frozenset({Role.STANDBY})
_OPERATOR = frozenset({Role.OPERATOR})
_MEMBERS = _CLIENT | _SERVER
_NODES = _MEMBERS | _AGGREGATOR | _STANDBY | {Role.OBSERVER}
_NOBODY: frozenset[Role] = frozenset()

MAY_SEND: dict[type[Message], frozenset[Role]] = {
    # Requests, on control sockets.
    m.Hello: _NODES,
    m.Join: _CLIENT,
    m.Evaluated: _CLIENT,
    m.CheckNeed: _MEMBERS,
    WhoHolds: _SERVER,
    m.Train: _OPERATOR,
    m.Drain: _OPERATOR,
    Examine: _OPERATOR | {Role.OBSERVER},
    Grant: _AGGREGATOR | _STANDBY,
    Enrol: _NOBODY,  # to no node: `zsfl invite` takes it, and asks for a secret instead
    # Requests, on data sockets.
    m.Forward: _CLIENT,
    m.Backward: _CLIENT,
    m.Step: _CLIENT,
    m.Infer: _CLIENT,
    m.FetchSpills: _AGGREGATOR,
    m.Recheck: _AGGREGATOR,
    m.Remake: _AGGREGATOR,
    m.ReleaseSpills: _AGGREGATOR,
    m.FetchWeights: _MEMBERS,
    Follow: _STANDBY,
    FetchPiece: _STANDBY,
    # Replies.
    m.Welcome: _NODES,
    m.Draining: _NODES,
    Condition: _NODES,
    m.Ok: _NODES,
    m.Refusal: _NODES,
    m.Output: _SERVER,
    m.Spilled: _SERVER,
    m.Spills: _MEMBERS | _AGGREGATOR,
    m.Weights: _AGGREGATOR,  # broadcast, too
    Granted: _CLIENT,
    Following: _AGGREGATOR,
    Piece: _AGGREGATOR,
    Enrolled: _NOBODY,
    Holder: _AGGREGATOR,
    # Broadcasts.
    m.Beat: _NODES,
    m.Goodbye: _NODES,
    CallBack: _NODES,
    m.Offers: _MEMBERS,
    m.Announcement: _AGGREGATOR,
    m.Committed: _AGGREGATOR,
}

_HEARERS: dict[Role, frozenset[Role]] = {
    Role.AGGREGATOR: _MEMBERS | _AGGREGATOR | _STANDBY,
    Role.STANDBY: _MEMBERS | _AGGREGATOR | _STANDBY,
    Role.CLIENT: _AGGREGATOR | _STANDBY,
    Role.SPLIT_SERVER: _AGGREGATOR | _STANDBY,
}
"""Who may listen to what a node of this role publishes for its run: weights, and offers that carry gradients. Nobody
else needs to: heartbeats have a socket of their own.
"""


def hearers(role: Role) -> frozenset[Role]:
    """Who may listen to the news of a node of this role."""
    return _HEARERS.get(role, _AGGREGATOR)


def may_send(role: Role, kind: type[Message]) -> bool:
    """Whether a node of this role may send messages of this kind; a kind that the table lacks nobody may."""
    return role in MAY_SEND.get(kind, _NOBODY)


def may_say(role: Role, broadcast: Message) -> bool:
    """Whether a node of this role may broadcast this: of a heartbeat, what others go by is not for everybody to say."""
    if isinstance(broadcast, m.Beat):
        said = (
            (broadcast.state, _AGGREGATOR),
            (broadcast.load, _SERVER),
            (broadcast.merging or None, _SERVER),
            (broadcast.offers or None, _MEMBERS),
        )
        if any(what is not None and role not in roles for what, roles in said):
            return False
    return may_send(role, type(broadcast))
