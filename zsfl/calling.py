"""A node's part in NAT: it waits to be dialled by peers that it cannot dial, or is one of these and dials."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import zmq

from zsfl.ids import NodeCard, NodeId, Role
from zsfl.wire.calling import CallBack, Called, Switchboard, topic_of
from zsfl.wire.pubsub import Publisher

Soon = Callable[[Callable[[], None]], None]
Dial = Callable[[int, str, bool], None]


class _Caller(Protocol):
    """Whoever says HELLO, and tells people."""

    def greet(self, card: NodeCard) -> None:
        """Say HELLO again to a peer."""
        ...

    def note_once(self, message: str) -> None:
        """Say it, unless it was said."""
        ...


class Calling:
    """What a node behind NAT is called for, and by whom. In the main loop."""

    def __init__(self, card: NodeCard, publisher: Publisher, dial: Dial, soon: Soon) -> None:
        """`dial` has the socket with that port dial an endpoint, or not any more; `soon` calls in the main loop."""
        self._card = card
        self._publisher = publisher
        self._dial = dial
        self._called = Called(card)
        self.board = Switchboard(card.host, card.behind_nat, lambda peer: soon(lambda: self._tell(peer)))

    def tell_all(self) -> None:
        """Tell again where this node waits for others: they may have missed it."""
        for peer in self.board.nodes():
            self._tell(peer)

    def _tell(self, peer: NodeId) -> None:
        with suppress(zmq.ZMQError):  # this node is leaving
            self._publisher.publish(topic_of(peer), self.board.call_back(peer))

    def lost(self, card: NodeCard, *, unheard: bool = False, left: bool = False) -> None:
        """A peer is gone; one that said HELLO and was never heard may not know that it cannot be dialled."""
        self._on(card, CallBack(node=self._card.id, calls=()))
        if left:
            self.board.left(card.id)
        if unheard and card.role is not Role.OBSERVER:
            self._tell(card.id)

    def heard(self, card: NodeCard, said: CallBack, caller: _Caller) -> None:
        """A peer waits for this node, or does not hear it."""
        if said.node != self._card.id:
            return
        if self._card.behind_nat:
            self._on(card, said)
            if not said.calls:
                caller.greet(card)
        elif not said.calls:
            what = f"{card.name} does not hear this node at {self._card.address}: behind NAT, or a firewall"
            caller.note_once(f"{what}, it has to be started with --behind-nat")

    def _on(self, card: NodeCard, said: CallBack) -> None:
        for port, endpoint, there in self._called.by(card, said.calls):
            self._dial(port, endpoint, there)
