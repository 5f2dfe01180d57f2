"""Who is told what when a node cannot be dialled."""

from __future__ import annotations

from typing import Any, cast

import pytest
from msgspec import structs

from zsfl.calling import Calling
from zsfl.ids import NodeCard, NodeId, Role
from zsfl.wire.calling import Call, CallBack, topic_of
from zsfl.wire.messages import Broadcast

ASKER = NodeCard(id=NodeId("a"), name="asker", role=Role.AGGREGATOR, host="10.0.0.1", control_port=1)
CLIENT = NodeCard(id=NodeId("c"), name="client", role=Role.CLIENT, host="10.9.0.1", control_port=2, pub_port=3)
HIDDEN = structs.replace(CLIENT, behind_nat=True)


class Node:
    """What says and does what is decided."""

    def __init__(self, card: NodeCard) -> None:
        self.said: list[tuple[bytes, Broadcast]] = []
        self.dialled: list[tuple[int, str, bool]] = []
        self.greeted: list[NodeCard] = []
        self.notes: list[str] = []
        self.calling = Calling(card, cast(Any, self), lambda *what: self.dialled.append(what), lambda call: call())

    def publish(self, topic: bytes, body: Broadcast) -> None:
        self.said.append((topic, body))

    def greet(self, card: NodeCard) -> None:
        self.greeted.append(card)

    def note_once(self, message: str) -> None:
        self.notes.append(message)

    def hears(self, *calls: Call, node: NodeId = CLIENT.id) -> None:
        self.calling.heard(ASKER, CallBack(node=node, calls=calls), self)


def test_a_node_behind_nat_dials_whoever_waits_for_it_until_that_one_is_gone() -> None:
    node = Node(HIDDEN)
    node.hears(Call(3, 40), node=NodeId("another"))
    assert node.dialled == []
    node.hears(Call(3, 40))
    node.hears(Call(3, 40))
    assert node.dialled == [(3, "tcp://10.0.0.1:40", True)]
    node.calling.lost(ASKER, unheard=False)
    assert node.dialled[1:] == [(3, "tcp://10.0.0.1:40", False)]
    assert (node.greeted, node.notes, node.said) == ([], [], [])


def test_a_node_behind_nat_that_is_not_heard_any_more_says_hello_again() -> None:
    node = Node(HIDDEN)
    node.hears()
    assert node.greeted == [ASKER]
    assert node.notes == []


def test_a_node_that_does_not_know_that_it_cannot_be_dialled_is_told() -> None:
    asker, node = Node(ASKER), Node(CLIENT)
    asker.calling.lost(CLIENT, unheard=True)
    assert asker.said == [(topic_of(CLIENT.id), CallBack(node=CLIENT.id, calls=()))]
    node.hears()
    assert node.notes == [
        "asker does not hear this node at 10.9.0.1:2: behind NAT, or a firewall, it has to be started with --behind-nat"
    ]
    node.hears(Call(3, 40))
    assert (node.dialled, node.greeted) == ([], [])


@pytest.mark.parametrize("role", [Role.OBSERVER, Role.CLIENT])
def test_who_only_looks_needs_not_be_heard(role: Role) -> None:
    asker = Node(ASKER)
    asker.calling.lost(structs.replace(CLIENT, role=role), unheard=role is Role.OBSERVER)
    assert asker.said == []


def test_what_was_said_is_said_again_with_each_heartbeat() -> None:
    asker = Node(ASKER)
    asker.calling.board.changed(HIDDEN.id, Call(3, 40), there=True)
    asker.calling.tell_all()
    assert asker.said == [(topic_of(HIDDEN.id), CallBack(node=HIDDEN.id, calls=(Call(3, 40),)))] * 2


def test_who_said_goodbye_is_not_told_any_more_and_who_did_not_is() -> None:
    asker, other = Node(ASKER), structs.replace(HIDDEN, id=NodeId("o"))
    for card in (HIDDEN, other):
        asker.calling.board.changed(card.id, Call(3, 40), there=True)
    asker.calling.lost(HIDDEN, left=True)
    asker.calling.lost(other)
    for card in (HIDDEN, other):
        asker.calling.board.changed(card.id, Call(3, 40), there=False)  # its lines are closed after that
    assert asker.calling.board.nodes() == [other.id]
