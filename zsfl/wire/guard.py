"""Who says what to a node, and whether that is for them to say: decisions, without sockets or files."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from threading import Lock

from zsfl.errors import Unauthorised
from zsfl.ids import NodeCard, NodeId, Role
from zsfl.keys.nodes import is_of
from zsfl.keys.trusted import EVERY_ROLE
from zsfl.wire.messages import Evaluated, Hello, Join, Request
from zsfl.wire.permits import MAY_SEND
from zsfl.wire.succession import Follow

MAX_BOUND = 1024
"""Nodes of one key whose roles are remembered; of more the one that was silent for longest is forgotten."""
_NOBODY: frozenset[Role] = frozenset()


def node_of(routing_id: bytes) -> NodeId:
    """Which node a connection says that it is of: `NODE/NUMBER`; empty where it says nothing."""
    node = routing_id.rpartition(b"/")[0].decode(errors="replace")
    return NodeId(node if node.isprintable() else "")


class Guard:
    """Binds nodes to roles, and lets each say what its role may.

    Where keys are used, only the machine that made a node id speaks as that node. May be asked from any thread.
    """

    def __init__(self, name: str, roles_of: Callable[[str], frozenset[Role]] | None = None) -> None:
        """`roles_of` says what the nodes of a key may be; without keys everybody may be anything, one thing each."""
        self._name = name
        self._roles_of = roles_of
        self._roles: dict[str, OrderedDict[NodeId, Role]] = {}
        """Of the nodes of each key, the youngest last: nobody can have those of another key forgotten."""
        self._lock = Lock()

    @property
    def has_keys(self) -> bool:
        """Whether who connects has shown a key."""
        return self._roles_of is not None

    def check(self, routing_id: bytes, key: str, body: Request) -> None:
        """Unauthorised unless this request may come from there."""
        node = node_of(routing_id)
        self._check_id(node, key)
        role = self._role_of(node, key)
        allowed = EVERY_ROLE if self._roles_of is None else self._roles_of(key)
        if not allowed:
            raise Unauthorised(f"{self._name} does not trust the key of this machine any more")
        what = type(body).__name__
        match body:
            case Hello():
                self._introduced(node, key, body.card, allowed)
                role = body.card.role
            case Join() | Follow() | Evaluated() if self._roles_of is not None and body.node != node:
                raise Unauthorised(f"node {node} says {what} for node {body.node!r}")
            case _:
                pass
        senders = MAY_SEND.get(type(body), _NOBODY)
        if not senders & (allowed if role is None else allowed & {role}):
            said = f"a {role}" if role else "a key that is trusted for " + (", ".join(sorted(allowed)))
            raise Unauthorised(
                f"{what} is not for {said} to say to {self._name}, but for: {', '.join(sorted(senders))}"
            )

    def forget(self, keys: Iterable[str]) -> None:
        """These are not trusted any more."""
        with self._lock:
            for key in keys:
                self._roles.pop(key, None)

    def introduce(self, card: NodeCard) -> None:
        """Bind a node that answered for itself, over a connection to its own key; Unauthorised where that cannot be."""
        allowed = EVERY_ROLE if self._roles_of is None else self._roles_of(card.key)
        self._introduced(card.id, card.key, card, allowed)

    def _introduced(self, node: NodeId, key: str, card: NodeCard, allowed: frozenset[Role]) -> None:
        if self._roles_of is None:
            if card.id == node:
                self._bind(node, "", card.role)
            return
        if card.id != node or card.key != key:
            raise Unauthorised(
                f"node {node or 'without an id'} introduces itself as node {card.id} or with another key"
            )
        if card.role not in allowed:
            raise Unauthorised(
                f"{self._name} trusts the machine of {card.name} as {', '.join(sorted(allowed)) or 'nothing'}, and not "
                f"as {card.role}: change that with `zsfl keys trust` on the machine of {self._name}"
            )
        self._bind(node, key, card.role)

    def _check_id(self, node: NodeId, key: str) -> None:
        if self._roles_of is not None and node and not is_of(node, key):
            raise Unauthorised(f"node id {node} is that of another machine")

    def _role_of(self, node: NodeId, key: str) -> Role | None:
        with self._lock:
            nodes = self._roles.get(key)
            if nodes is None or node not in nodes:
                return None
            nodes.move_to_end(node)
            return nodes[node]

    def _bind(self, node: NodeId, key: str, role: Role) -> None:
        """Unauthorised when it has another role already."""
        self._check_id(node, key)
        if not node:
            return
        with self._lock:
            nodes = self._roles.setdefault(key, OrderedDict())
            held = nodes.setdefault(node, role)
            if held is not role:
                raise Unauthorised(f"node {node} was a {held} and says that it is a {role}")
            nodes.move_to_end(node)
            if len(nodes) > MAX_BOUND:
                nodes.popitem(last=False)
