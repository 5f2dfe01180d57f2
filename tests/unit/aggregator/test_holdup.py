"""What is said of a window that is not over yet."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from zsfl.aggregator.holdup import HoldUp
from zsfl.aggregator.roster import Roster
from zsfl.ids import NodeId, PublicKey, Role
from zsfl.keys.machine import machine_id
from zsfl.latest import Latest
from zsfl.wire.fields import ShardInfo

NODES = [NodeId(name) for name in "abc"]


class Window:
    """A window of three clients of four shards, and a clock."""

    def __init__(self) -> None:
        self.now_s, self.missing, self.servers = 100.0, [0, 1, 2], ["server"]
        self.roster = Roster(4)
        for shard, node in enumerate(NODES):
            self.roster.join(node, f"client-{shard}", [ShardInfo(shard=shard, train_samples=9, test_samples=0)])
        self.cards = {node: SimpleNamespace(key="") for node in NODES}
        node = SimpleNamespace(
            peers=lambda role: self.servers,
            hints_of_gone=self.hints_of_gone,
            peer=self.cards.get,
            card=SimpleNamespace(key="mine"),
            settings=SimpleNamespace(keys="/my keys"),
        )
        self.holdup = HoldUp(cast(Any, node), Latest(self.roster), lambda: self.missing, lambda: self.now_s)
        self.holdup.began()

    def hints_of_gone(self, role: Role, last: NodeId | None = None, shards: tuple[int, ...] = ()) -> tuple[str, ...]:
        return (f"start {role} {last} {list(shards)}",)

    def after(self, seconds: float) -> str:
        self.now_s += seconds
        return self.holdup.unusual()


def test_an_ordinary_start_is_not_worth_a_word_and_a_long_one_is() -> None:
    window = Window()
    assert window.after(9.0) == ""
    assert window.after(2.0) == "the steps of client-0, client-1, client-2"


def test_once_windows_are_quick_one_that_is_not_is_spoken_of_soon() -> None:
    window = Window()
    window.now_s += 0.5
    window.holdup.began()
    window.missing = [2]
    assert window.after(2.5) == ""
    assert window.after(1.0) == "the steps of client-2"


def test_windows_that_always_take_long_are_usual() -> None:
    window = Window()
    for _ in range(2):
        window.now_s += 8.0
        window.holdup.began()
    assert window.after(20.0) == ""
    assert window.after(5.0) != ""


def test_who_is_gone_is_spoken_of_at_once_with_what_to_do() -> None:
    window = Window()
    window.roster.lost(NODES[1], 100.0)
    assert window.after(0.1) == "the steps of client-0, client-1, which is gone, client-2"
    window.missing = [1, 2]
    assert window.holdup.hints() == (
        "start client b [1]",
        "client-2: there, and at work or stuck; the terminal or the log of each says what it waits for",
        "the run goes on without a client that is stopped",
    )
    for node in NODES:
        window.roster.lost(node, 100.0)
    window.missing = []
    assert window.holdup.hints() == ("start client a [0]", "start client b [1]", "start client c [2]")
    window.servers = []
    window.missing = [1]
    assert window.after(0.1).endswith(", and no split server is there to make them with")
    assert window.holdup.hints() == ("start split-server None []",)
    window.missing = []
    assert window.holdup.names() == "any client, and no split server is there to make them with"


def test_where_steps_are_merged_only_those_are_named_whose_steps_are_not_there() -> None:
    window = Window()
    window.holdup.merging([0, 2])
    assert window.after(11.0) == "the steps of client-1"
    window.holdup.merging([0, 1, 2])  # they are worked on
    assert window.after(0.0) == "the steps of client-0, client-1, client-2"
    window.holdup.merging([0, 2])
    window.holdup.began()
    assert window.holdup.names() == "client-0, client-1, client-2"


def test_of_another_machine_it_is_said_how_to_be_rid_of_it() -> None:
    window = Window()
    key = "]{=qk]Mk:)*d+DoP.TP>]S%*aF7Uh>l!XsZu&9Gf"
    window.cards[NODES[0]].key, window.cards[NODES[1]].key = "mine", key
    assert window.holdup.hints()[-1] == (
        "the run goes on without a client that is stopped, or whose machine is trusted no more: "
        f"zsfl keys revoke {machine_id(PublicKey(key))} --keys '/my keys'"
    )
