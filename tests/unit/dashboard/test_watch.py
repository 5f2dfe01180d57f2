"""What an observer sees adds up to who is there."""

from __future__ import annotations

from typing import Any

import msgspec

from zsfl.dashboard.watch import MAX_GONE, RATE_S, Watch
from zsfl.ids import NodeCard, NodeId, Role, RunId, Version
from zsfl.wire.fields import Load
from zsfl.wire.messages import Beat, Phase, RunState

BEAT_S = 0.5


def card(name: str, role: Role = Role.CLIENT, node: str = "") -> NodeCard:
    return NodeCard(id=NodeId(node or name), name=name, role=role, host="127.0.0.1", control_port=7)


def beat(of: NodeCard, load: Load | None = None, state: RunState | None = None, **counters: float) -> Beat:
    return Beat(card=of, peers=(), counters=counters, load=load, state=state)


def state(serial: int, phase: Phase = "training", epoch: int = 0, run: str = "abc123", reason: str = "") -> RunState:
    return RunState(
        run=RunId(run), phase=phase, version=Version(serial), round=0, rounds=3, window=0, windows=2, epoch=epoch,
        serial=serial, reason=reason,
    )  # fmt: skip


def test_nodes_are_shown_by_role_and_name_with_their_newest_load() -> None:
    watch = Watch(BEAT_S)
    nodes = [card("b"), card("a"), card("s", Role.SPLIT_SERVER), card("g", Role.AGGREGATOR), card("t", Role.STANDBY)]
    for node in nodes:
        watch.joined(node, 1.0)
    watch.said(beat(nodes[2], Load(slots=8, busy=1, service_s=0.1), steps=3.0), 1.5)
    watch.said(beat(nodes[2], Load(slots=8, busy=2, service_s=0.2), steps=9.0), 3.5)
    shown = watch.snapshot(4.0)
    assert [node.name for node in shown.nodes] == ["g", "t", "s", "a", "b"]
    server = shown.nodes[2]
    assert (server.slots, server.busy, server.service_s) == (8, 2, 0.2)
    assert (server.counters, server.rates) == ({"steps": 9.0}, {"steps": 3.0})
    assert (server.heard_s, server.since_s) == (0.5, 3.0)
    assert shown.run is None
    assert [(event.node, event.what) for event in shown.events[:2]] == [("t", "joined"), ("g", "joined")]


def test_rates_are_of_the_last_seconds() -> None:
    watch, node = Watch(BEAT_S), card("a")
    watch.joined(node, 0.0)
    for tick in range(40):
        watch.said(beat(node, steps=100.0 * min(tick, 20)), tick * BEAT_S)
    (shown,) = watch.snapshot(20.0).nodes
    assert shown.rates == {"steps": 0.0}, "nothing happened for longer than is looked at"
    watch.said(beat(node, steps=2500.0), 20.0)
    (shown,) = watch.snapshot(20.0).nodes
    assert shown.rates["steps"] == 500.0 / RATE_S


def test_silence_is_late_and_whoever_left_is_gone_until_it_is_started_again() -> None:
    watch, node = Watch(BEAT_S), card("a", node="first")
    watch.joined(node, 0.0)
    watch.said(beat(node, steps=1.0), 0.4)
    assert [watch.snapshot(now_s).nodes[0].presence for now_s in (1.8, 2.0)] == ["there", "late"]
    watch.lost(node, "no heartbeat for 2 s", 2.5)
    (gone,) = watch.snapshot(3.0).nodes
    assert (gone.presence, gone.reason, gone.since_s, gone.rates) == ("gone", "no heartbeat for 2 s", 0.5, {})
    watch.joined(card("a", node="second"), 4.0)
    (back,) = watch.snapshot(4.0).nodes
    assert (back.id, back.presence) == ("second", "there")
    assert [event.what for event in watch.snapshot(4.0).events] == ["joined", "is gone: no heartbeat for 2 s", "joined"]
    watch.said(beat(node, steps=5.0), 4.5)  # of the one that is gone: a broadcast that took longer
    assert watch.snapshot(4.5).nodes[0].counters == {}


def test_memory_of_who_is_gone_is_bounded() -> None:
    watch = Watch(BEAT_S)
    for number in range(MAX_GONE + 10):
        watch.joined(card(f"n{number}"), float(number))
        watch.lost(card(f"n{number}"), "left", float(number))
    shown = watch.snapshot(1000.0).nodes
    assert len(shown) == MAX_GONE
    assert {"n9", "n10"} & {node.name for node in shown} == {"n10"}


def test_the_run_is_what_its_newest_aggregator_says() -> None:
    watch, old, new = Watch(BEAT_S), card("old", Role.AGGREGATOR), card("new", Role.AGGREGATOR)
    for node in (old, new):
        watch.joined(node, 0.0)
    said = [
        (old, state(1)), (old, state(3)), (old, state(2)), (new, state(2, epoch=1)), (old, state(9)),
        (new, state(5, "failed", epoch=1, reason="the loss became nan")),
    ]  # fmt: skip
    versions: list[int] = []
    for at_s, (node, now) in enumerate(said):
        watch.said(beat(node, state=now), float(at_s))
        run = watch.snapshot(9.0).run
        assert run is not None
        versions.append(run["version"])
    assert versions == [1, 3, 3, 2, 2, 5]
    run = watch.snapshot(9.0).run
    assert run is not None
    assert (run["phase"], run["reason"]) == ("failed", "the loss became nan")
    whats = [(event.node, event.what) for event in reversed(watch.snapshot(9.0).events)]
    assert whats[2:] == [
        ("old", "run abc123 is training"), ("new", "took over"), ("new", "run abc123 is failed: the loss became nan")
    ]  # fmt: skip
    msgspec.json.encode(watch.snapshot(9.0))
    watch.said(beat(old, state=state(1, "waiting", epoch=2)), 9.0)
    assert [event.what for event in watch.snapshot(9.0).events[:2]] == ["run abc123 is waiting", "took over"]


def test_how_long_it_goes_on_is_told_by_the_pace_of_late() -> None:
    watch, node = Watch(BEAT_S), card("g", Role.AGGREGATOR)
    watch.joined(node, 0.0)

    def said(serial: int, round_: int, window: int, at_s: float, phase: Phase = "training") -> dict[str, Any]:
        now = msgspec.structs.replace(state(serial, phase), round=round_, rounds=10, window=window, windows=4)
        watch.said(beat(node, state=now), at_s)
        run = watch.snapshot(at_s).run
        assert run is not None
        return run

    assert said(1, 0, 0, -0.1)["left_s"] is None
    assert said(2, 0, 1, 2.5)["left_s"] is None, "it may have been looked at since the last moment of a window"
    run = said(3, 0, 2, 5.0)
    assert (run["done"], run["left_s"], run["round_left_s"]) == (0.5, 95.0, 5.0)
    run = said(4, 1, 1, 12.5)
    assert (run["done"], run["left_s"], run["round_left_s"]) == (1.25, 87.5, 7.5)
    assert watch.snapshot(14.5).run == {**run, "left_s": 85.5, "round_left_s": 5.5}
    # What was quick or slow long ago counts no more, and windows that count on for ever are no part of a round.
    for number in range(200):
        run = said(5 + number, 2 + number % 2, 4 + number, 20.0 + number)
    assert run["done"] == 3.0
    run = said(300, 3, 0, 400.0, "idle")
    assert (run["done"], run["left_s"]) == (None, None)


def test_what_others_tell_of_nodes_is_an_event() -> None:
    watch = Watch(BEAT_S)
    assert watch.is_alone
    watch.joined(card("a"), 1.0)
    watch.told("a", "was ended by signal 9", 2.0)
    assert not watch.is_alone
    watch.lost(card("a"), "silent", 3.0)
    assert watch.is_alone
    assert [event.what for event in watch.snapshot(3.0).events] == [
        "is gone: silent",
        "was ended by signal 9",
        "joined",
    ]
