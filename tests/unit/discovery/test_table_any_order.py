"""The peer table under any events in any order, checked against what it must never do."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from msgspec import structs

from zsfl.discovery.events import (
    Action,
    Candidate,
    Dial,
    DialFailed,
    Event,
    Heard,
    Joined,
    Left,
    Lost,
    Refused,
    Source,
    Tick,
    Welcomed,
)
from zsfl.discovery.table import UNHEARD, PeerTable, PresenceTiming, wants_of
from zsfl.ids import Address, NodeCard, NodeId, Role

TIMING = PresenceTiming()


def card(name: str, port: int, role: Role, start: int = 0, key: str = "") -> NodeCard:
    return NodeCard(id=NodeId(f"{name}.{start}"), name=name, role=role, host="10.0.0.1", control_port=port, key=key)


ME = card("me", 1, Role.CLIENT)
NODES = [card(f"n{n}", 10 + n, role, start) for n, role in enumerate(Role) for start in (0, 1)]
RIVALS = [card(f"n{n}", 10 + n, role, start, f"key-{start}") for n, role in enumerate(Role) for start in (0, 1)]
"""Nodes of two machines that claim the same names and addresses."""
HIDDEN = [structs.replace(node, behind_nat=number % 2 == 0) for number, node in enumerate(NODES)]
"""Half of them, and each of these with the address of another, cannot be dialled."""
NUMBERS = st.integers(0, len(NODES) - 1)
ALIASES = {Address("alias:1"): NODES[0], Address("self:1"): ME}
ADDRESSES = [*dict.fromkeys(node.address for node in NODES), ME.address, *ALIASES]


class AnyOrder(RuleBasedStateMachine):
    @initialize(role=st.sampled_from(list(Role)), nodes=st.sampled_from([NODES, RIVALS, HIDDEN]))
    def start(self, role: Role, nodes: list[NodeCard]) -> None:
        self.nodes = nodes
        self.table = PeerTable(ME, wants_of(role), TIMING)
        self.now_s = 0.0
        self.silent_since: dict[NodeId, float] = {}
        self.live: dict[NodeId, NodeCard] = {}
        self.dialling: list[Address] = []

    def feed(self, event: Event) -> None:
        for action in self.table.on(event, self.now_s):
            self.check(action)
        assert set(self.live.values()) == set(self.table.peers())

    def check(self, action: Action) -> None:
        match action:
            case Dial(address):
                assert address != ME.address
                assert address not in self.dialling
                self.dialling.append(address)
            case Joined(node):
                assert node.id not in self.live
                self.live[node.id] = node
                self.silent_since[node.id] = self.now_s
            case Lost(node, reason):
                assert self.live.pop(node.id) == node
                silence_s = self.now_s - self.silent_since[node.id]
                assert not reason.startswith(("silent", UNHEARD)) or silence_s >= TIMING.lost_after_s

    @rule(
        address=st.sampled_from(ADDRESSES),
        source=st.sampled_from(["mdns", "seed", "exchange", "hello"]),
        number=st.none() | st.integers(-1, len(NODES) - 1),
    )
    def hint(self, address: Address, source: Source, number: int | None) -> None:
        node = None if number is None else self.nodes[number] if number >= 0 else ME
        self.feed(Candidate(address, source, node.role if node else None, node.id if node else None))

    @rule(number=NUMBERS)
    def they_call(self, number: int) -> None:
        node = self.nodes[number]
        self.silent_since[node.id] = self.now_s
        self.feed(Welcomed(node, node.address, "them"))

    @rule(data=st.data(), start=st.integers(0, 1), outcome=st.sampled_from(["ok", "final", "later", "fail"]))
    def a_dial_ends(self, data: st.DataObject, start: int, outcome: str) -> None:
        if not self.dialling:
            return
        address = data.draw(st.sampled_from(self.dialling))
        self.dialling.remove(address)
        living = [node for node in self.nodes if node.address == address]
        node = ME if ALIASES.get(address) is ME else (living or self.nodes)[start]
        match outcome:
            case "ok":
                self.silent_since[node.id] = self.now_s
                self.feed(Welcomed(node, address, "me"))
            case "fail":
                self.feed(DialFailed(address))
            case _:
                self.feed(Refused(address, outcome, outcome == "final"))

    @rule(number=NUMBERS)
    def heard(self, number: int) -> None:
        node = self.nodes[number]
        self.silent_since[node.id] = self.now_s
        self.feed(Heard(node.id))

    @rule(number=NUMBERS)
    def left(self, number: int) -> None:
        node = self.nodes[number]
        self.feed(Left(node.id, "bye"))

    @rule()
    def lag(self) -> None:
        self.now_s += TIMING.lag_s * 1.5
        self.silent_since = dict.fromkeys(self.silent_since, self.now_s)
        self.feed(Tick())

    @rule(deadlines=st.integers(1, 12))
    def wake_on_time(self, deadlines: int) -> None:
        for _ in range(deadlines):
            if (deadline_s := self.table.next_deadline()) is None:
                return
            self.now_s = max(self.now_s, deadline_s)
            self.feed(Tick())

    @invariant()
    def progress(self) -> None:
        deadline_s = self.table.next_deadline()
        assert deadline_s is None or deadline_s > self.now_s
        assert deadline_s is not None or not self.live

    @invariant()
    def nobody_is_silent_too_long(self) -> None:
        assert all(self.now_s < self.silent_since[node_id] + TIMING.lost_after_s for node_id in self.live)

    @invariant()
    def one_peer_of_a_machine_per_name_and_address(self) -> None:
        peers = self.table.peers()
        for values in ({p.id for p in peers}, {(p.name, p.key) for p in peers}, {(p.address, p.key) for p in peers}):
            assert len(values) == len(peers)


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
