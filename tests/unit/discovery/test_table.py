"""The peer table, rule by rule."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import pytest
from msgspec import structs

from zsfl.discovery import table as limits
from zsfl.discovery.events import (
    Candidate,
    Dial,
    DialFailed,
    Heard,
    Joined,
    Left,
    Lost,
    Refused,
    Tick,
    Welcomed,
)
from zsfl.discovery.table import DIAL_TRIES, RETURN_TRIES, PeerTable, PresenceTiming, wants_of
from zsfl.errors import ConfigError
from zsfl.ids import Address, NodeCard, NodeId, Role

TIMING = PresenceTiming()


def card(name: str, port: int, role: Role = Role.SPLIT_SERVER, start: int = 0, key: str = "") -> NodeCard:
    node_id = NodeId(f"{key}{name}.{start}")
    return NodeCard(id=node_id, name=name, role=role, host="10.0.0.1", control_port=port, key=key)


ME = card("me", 1, Role.CLIENT)
S1, S2, AGG = card("s1", 11), card("s2", 12), card("agg", 13, Role.AGGREGATOR)
SEED = Address("gpu.lan:4000")


def new_table(me: NodeCard = ME) -> PeerTable:
    return PeerTable(me, wants_of(me.role), TIMING)


def joined(*cards: NodeCard, at_s: float = 0.0) -> PeerTable:
    """A client's table that these nodes called."""
    table = new_table()
    for c in cards:
        assert table.on(Welcomed(c, c.address, "them"), at_s) == [Joined(c)]
    return table


def fail_until_silent(table: PeerTable, address: Address, now_s: float) -> list[float]:
    """Answer every dial of `address` with a failure; the times of the dials, at most 20."""
    dials: list[float] = []
    while (deadline_s := table.next_deadline()) is not None and len(dials) < 20:
        now_s = max(now_s, deadline_s)
        if Dial(address) in table.on(Tick(), now_s):
            dials.append(now_s)
            table.on(DialFailed(address), now_s)
    return dials


@pytest.mark.parametrize(
    ("me", "dialled"),
    [
        (Role.CLIENT, {Role.SPLIT_SERVER, Role.AGGREGATOR}),
        (Role.SPLIT_SERVER, {Role.AGGREGATOR}),
        (Role.AGGREGATOR, set(Role)),
        (Role.OBSERVER, set(Role)),
    ],
)
def test_a_node_dials_the_roles_it_wants(me: Role, dialled: set[Role]) -> None:
    for role in Role:
        table, hint = new_table(card("me", 1, me)), Candidate(S1.address, "mdns", role, S1.id)
        assert table.ignores(hint) == (role not in dialled)
        assert table.on(hint, 0.0) == ([Dial(S1.address)] if role in dialled else [])


def test_seeds_and_unknown_roles_are_always_dialled() -> None:
    table = new_table()
    assert not table.ignores(Candidate(SEED, "seed", Role.CLIENT))
    assert table.on(Candidate(SEED, "seed", Role.CLIENT), 0.0) == [Dial(SEED)]
    assert table.on(Candidate(S1.address, "exchange"), 0.0) == [Dial(S1.address)]


def test_a_node_never_dials_itself() -> None:
    table = new_table(card("me", 1, Role.AGGREGATOR))
    me = card("me", 1)
    assert table.ignores(Candidate(me.address, "seed"))
    assert table.on(Candidate(me.address, "seed"), 0.0) == []
    assert table.on(Candidate(S1.address, "mdns", Role.CLIENT, me.id), 0.0) == []
    assert table.next_deadline() is None


def test_a_seed_that_turns_out_to_be_this_node_is_given_up_and_told_of() -> None:
    table = new_table()
    table.on(Candidate(SEED, "seed"), 0.0)
    assert table.on(Welcomed(ME, SEED, "me"), 0.1) == []
    assert table.next_deadline() is None
    assert "this node itself" in table.refusals()[SEED]


def test_two_nodes_may_not_claim_one_address() -> None:
    table = new_table()
    twin = card("twin", 1)
    assert table.on(Welcomed(twin, twin.address, "them"), 0.0) == []
    assert table.peers() == ()
    assert "--host" in table.refusals()[ME.address]


def test_only_one_dial_per_address_is_under_way() -> None:
    table = new_table()
    hint = Candidate(S1.address, "mdns", S1.role, S1.id)
    assert table.on(hint, 0.0) == [Dial(S1.address)]
    assert table.on(hint, 0.1) == []
    assert table.on(Tick(), 60.0) == []
    assert table.next_deadline() is None


def test_hello_from_both_sides_joins_once() -> None:
    table = new_table()
    table.on(Candidate(S1.address, "mdns", S1.role, S1.id), 0.0)
    assert table.on(Welcomed(S1, S1.address, "them"), 0.1) == [Joined(S1)]
    assert table.on(Welcomed(S1, S1.address, "me"), 0.2) == []
    assert table.peers() == (S1,)
    assert table.on(Candidate(S1.address, "exchange"), 0.3) == []


def test_a_hello_counts_as_a_sign_of_life() -> None:
    table = joined(S1)
    for now_s in (1.0, 1.9):
        table.on(Welcomed(S1, S1.address, "them"), now_s)
    assert table.on(Tick(), 2.5) == []


def test_a_candidate_is_tried_with_growing_pauses_and_then_forgotten() -> None:
    table = new_table()
    table.on(Candidate(S1.address, "exchange"), 0.0)
    table.on(DialFailed(S1.address), 0.0)
    dials = fail_until_silent(table, S1.address, 0.0)
    assert dials == [0.25, 0.75, 1.75, 3.75, 5.75]
    assert 1 + len(dials) == DIAL_TRIES
    assert table.on(Candidate(S1.address, "exchange"), 9.0) == [Dial(S1.address)]


def test_a_seed_is_tried_for_ever() -> None:
    table = new_table()
    table.on(Candidate(SEED, "seed"), 0.0)
    table.on(DialFailed(SEED), 0.0)
    dials = fail_until_silent(table, SEED, 0.0)
    assert len(dials) == 20
    assert dials[-1] - dials[-2] == TIMING.redial_max_s


def test_mdns_shortens_the_wait_for_a_seed_that_was_not_there_yet() -> None:
    table = new_table()
    table.on(Candidate(S1.address, "seed"), 0.0)
    table.on(DialFailed(S1.address), 0.0)
    assert table.on(Candidate(S1.address, "mdns", S1.role, S1.id), 0.1) == [Dial(S1.address)]


def test_a_final_refusal_holds_until_another_node_lives_there() -> None:
    table = new_table()
    hint = Candidate(S1.address, "mdns", S1.role, S1.id)
    table.on(hint, 0.0)
    assert table.on(Refused(S1.address, "another job", final=True), 0.1) == []
    assert table.refusals() == {S1.address: "another job"}
    assert table.on(hint, 50.0) == table.on(Candidate(S1.address, "seed"), 51.0) == []
    assert table.on(DialFailed(S1.address), 51.5) == []
    assert table.next_deadline() is None
    other = card("s1", 11, start=1)
    assert table.on(Candidate(S1.address, "mdns", S1.role, other.id), 52.0) == [Dial(S1.address)]
    assert table.refusals() == {}
    assert table.on(Welcomed(other, S1.address, "me"), 52.1) == [Joined(other)]


def test_a_passing_refusal_is_tried_again_and_its_reason_outlives_the_tries() -> None:
    table = new_table()
    table.on(Candidate(S1.address, "exchange"), 0.0)
    table.on(Refused(S1.address, "full", final=False), 0.0)
    assert len(fail_until_silent(table, S1.address, 0.0)) == DIAL_TRIES - 1
    assert table.refusals() == {S1.address: "full"}
    assert table.on(Candidate(S1.address, "exchange"), 60.0) == [Dial(S1.address)]


def test_a_silent_peer_is_lost_and_its_address_tried_again() -> None:
    table = joined(S1, S2)
    assert table.on(Heard(S2.id), 0.0) == []
    for beat in range(1, 4):
        assert table.on(Heard(S1.id), beat * 0.5) == []
    assert table.on(Tick(), 1.99) == []
    assert table.on(Tick(), 2.0) == [Lost(S2, "silent for 2 s")]
    assert table.peers() == (S1,)
    assert table.on(Tick(), 2.25) == [Dial(S2.address)]


def test_who_said_that_it_is_behind_nat_is_not_told_to_say_so() -> None:
    hidden = structs.replace(S2, behind_nat=True)
    table = joined(hidden)
    for beat in range(1, 4):
        table.on(Tick(), beat * 0.5)
    assert table.on(Tick(), 2.0) == [Lost(hidden, "silent for 2 s")]


def test_a_node_that_lagged_itself_accuses_nobody() -> None:
    for wake in (Tick(), Heard(S1.id)):
        table = joined(S1, S2)
        assert not [action for action in table.on(wake, 30.0) if isinstance(action, Lost)]
        for tick in range(1, 4):
            assert not [action for action in table.on(Tick(), 30.0 + tick * 0.5) if isinstance(action, Lost)]
        assert [type(action) for action in table.on(Tick(), 32.0)] == [Lost, Lost]


def test_a_node_that_was_absent_for_so_long_that_others_gave_it_up_greets_them_all_once() -> None:
    table = joined(S1, S2)
    assert table.on(Tick(), 1.5) == []  # it lagged, but nobody can have given it up
    assert table.on(Heard(S1.id), 20.0) == []
    deadline_s = table.next_deadline()
    assert deadline_s is not None
    assert deadline_s <= 20.0 + TIMING.beat_s
    assert table.on(Tick(), 20.5) == [Dial(S1.address), Dial(S2.address)]
    assert table.on(Welcomed(S1, S1.address, "me"), 20.6) == []
    assert table.on(DialFailed(S2.address), 20.7) == []
    assert table.on(Tick(), 21.0) == []
    assert table.peers() == (S1, S2)


def test_a_former_peer_is_tried_for_an_hour_with_pauses_that_stay_short() -> None:
    table = joined(S1)
    table.on(Heard(S1.id), 0.0)
    for tick in range(1, 5):
        table.on(Tick(), tick * 0.5)
    now_s, dials = 2.0, list[float]()
    while (deadline_s := table.next_deadline()) is not None:
        now_s = deadline_s
        if table.on(Tick(), now_s) == [Dial(S1.address)]:
            dials.append(now_s)
            table.on(DialFailed(S1.address), now_s)
    assert len(dials) == RETURN_TRIES
    assert max(later - sooner for sooner, later in pairwise(dials)) == TIMING.return_max_s
    assert 1800 < dials[-1] < 7200


def test_a_quiet_node_is_woken_often_enough_to_tell_quiet_from_lag() -> None:
    table, now_s = joined(S1), 0.3
    table.on(Tick(), now_s)
    while table.peers():
        deadline_s = table.next_deadline()
        assert deadline_s is not None
        assert now_s < deadline_s <= now_s + TIMING.beat_s
        now_s = deadline_s
        table.on(Tick(), now_s)
    assert now_s == TIMING.lost_after_s


def test_goodbye_loses_at_once_and_is_not_redialled_unless_a_seed() -> None:
    table = joined(S1)
    assert table.on(Left(S1.id, "drained"), 0.1) == [Lost(S1, "left: drained")]
    assert table.next_deadline() is None
    assert table.on(Candidate(S1.address, "exchange"), 0.1) == [Dial(S1.address)]
    table.on(Candidate(SEED, "seed"), 0.2)
    table.on(Welcomed(S1, SEED, "me"), 0.3)
    table.on(Left(S1.id, "drained"), 0.4)
    assert table.on(Tick(), 1.0) == [Dial(SEED)]


@pytest.mark.parametrize(
    "new",
    [card("renamed", 11), card("s1", 11, Role.AGGREGATOR)],
    ids=["same address", "same id"],
)
def test_a_restarted_node_replaces_the_old_one(new: NodeCard) -> None:
    table = joined(S1, S2)
    lost, join = table.on(Welcomed(new, new.address, "them"), 0.5)
    assert isinstance(lost, Lost)
    assert lost.card == S1
    assert lost.reason == f"restarted as node {new.id} at {new.address}"
    assert join == Joined(new)
    assert table.peers() == (S2, new)
    assert table.get(new.id) == new


def test_of_two_nodes_with_one_name_the_first_stays_until_it_is_lost() -> None:
    table = joined(S1, S2)
    twin = card("s1", 99, start=1)
    assert table.on(Welcomed(twin, twin.address, "them"), 0.5) == []
    assert table.peers() == (S1, S2)
    assert "give this one another --name" in table.refusals()[twin.address]
    table.on(Left(S1.id, "restarts"), 0.6)
    assert table.on(Welcomed(twin, twin.address, "them"), 0.7) == [Joined(twin)]
    assert table.refusals() == {}


GOOD, EVIL = card("s1", 11, key="good"), card("s1", 66, Role.OBSERVER, key="evil")
EVIL_THERE = card("eve", GOOD.control_port, Role.OBSERVER, key="evil")


@pytest.mark.parametrize("by", ["me", "them"])
def test_no_machine_keeps_a_node_of_another_out_by_its_name(by: Literal["me", "them"]) -> None:
    table = joined(EVIL)
    table.on(Heard(EVIL.id), 0.1)
    assert table.on(Welcomed(GOOD, GOOD.address, by), 0.2) == [Joined(GOOD)]
    again = card("s1", 99, start=1, key="good")
    assert table.on(Welcomed(again, again.address, "them"), 0.3) == [], "its own predecessor does"


def test_no_machine_keeps_a_node_of_another_out_by_its_address() -> None:
    table = joined(EVIL_THERE)
    table.on(Heard(EVIL_THERE.id), 0.1)
    assert table.on(Welcomed(GOOD, GOOD.address, "them"), 0.2) == [Joined(GOOD)]
    # Whoever looks for it finds out who is there, and that the other is not.
    assert table.on(Candidate(GOOD.address, "exchange", GOOD.role, GOOD.id), 0.3) == []
    assert table.on(Candidate(GOOD.address, "seed"), 0.3) == []


def test_who_says_that_it_is_at_an_address_keeps_nobody_from_looking_there() -> None:
    table = new_table()
    assert table.on(Candidate(GOOD.address, "seed"), 0.0) == [Dial(GOOD.address)]
    table.on(DialFailed(GOOD.address), 0.0)
    assert table.on(Welcomed(EVIL_THERE, EVIL_THERE.address, "them"), 0.1) == [Joined(EVIL_THERE)]
    assert table.on(Tick(), 0.5) == [Dial(GOOD.address)]
    reason = f"is not where it says, but node {GOOD.id} at {GOOD.address}"
    assert table.on(Welcomed(GOOD, GOOD.address, "me"), 0.6) == [Lost(EVIL_THERE, reason), Joined(GOOD)]
    # It was proven: the other one may say so again, and changes nothing.
    assert table.on(Welcomed(EVIL_THERE, EVIL_THERE.address, "them"), 0.7) == [Joined(EVIL_THERE)]
    table.on(Left(EVIL_THERE.id, "bye"), 0.8)
    assert table.on(Candidate(GOOD.address, "exchange"), 0.9) == []
    assert table.peers() == (GOOD,)


def test_who_answers_elsewhere_pushes_nobody_out() -> None:
    table = new_table()
    table.on(Candidate(GOOD.address, "exchange"), 0.0)
    table.on(Welcomed(GOOD, GOOD.address, "me"), 0.0)
    assert table.on(Welcomed(EVIL_THERE, Address("10.6.6.6:66"), "me"), 0.1) == [Joined(EVIL_THERE)]
    assert table.peers() == (GOOD, EVIL_THERE)


def test_a_hint_of_another_node_at_a_live_address_is_looked_into() -> None:
    table = joined(S1)
    assert table.on(Candidate(S1.address, "mdns", S1.role, NodeId("other")), 0.1) == [Dial(S1.address)]
    assert table.on(Welcomed(S1, S1.address, "me"), 0.2) == []
    assert table.peers() == (S1,)


def test_queries() -> None:
    client = card("c", 20, Role.CLIENT)
    table = joined(client, S1, AGG, S2)
    assert table.by_role(Role.SPLIT_SERVER) == (S1, S2)
    assert table.get(AGG.id) == AGG
    assert table.get(ME.id) is None
    assert table.to_tell(9) == (AGG, S1, S2, client)
    assert table.to_tell(2) == (AGG, S1)


def test_peers_beyond_the_bound_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_PEERS", 2)
    table = joined(S1, S2)
    for one in (S1, S2):
        table.on(Heard(one.id), 0.0)
    assert table.on(Welcomed(AGG, AGG.address, "them"), 0.1) == []
    assert table.get(AGG.id) is None
    assert "MAX_PEERS" in table.refusals()[AGG.address]
    again = card("s1", 11, start=1)
    assert len(table.on(Welcomed(again, again.address, "them"), 0.2)) == 2
    table = PeerTable(ME, wants_of(ME.role), TIMING, 1)
    for one in (S1, S2):
        table.on(Welcomed(one, one.address, "me"), 0.0)
    assert "1 peers already (it may have no more files open: raise `ulimit -Hn`" in table.refusals()[S2.address]


def test_hellos_that_lead_nowhere_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_PEERS", 4)
    table = joined(S1)
    table.on(Heard(S1.id), 0.0)
    ghosts = [card(f"ghost-{number}", 100 + number) for number in range(40)]
    for ghost in ghosts:
        assert Joined(ghost) in table.on(Welcomed(ghost, ghost.address, "them"), 0.1)
    assert table.peers() == (S1, *ghosts[-3:])
    assert Joined(AGG) in table.on(Welcomed(AGG, AGG.address, "them"), 0.2)
    assert table.peers() == (S1, ghosts[-2], ghosts[-1], AGG)
    for one in (*ghosts[-2:], AGG):  # all of them are real
        table.on(Heard(one.id), 0.2)
    assert table.on(Welcomed(S2, S2.address, "them"), 0.3) == []
    assert table.get(S2.id) is None


def test_a_hello_that_leads_nowhere_is_not_tried_for_an_hour() -> None:
    table = joined(S1)
    for tick in range(1, 5):
        table.on(Tick(), tick * 0.5)
    assert len(fail_until_silent(table, S1.address, 2.0)) <= DIAL_TRIES


def test_candidates_beyond_the_bound_push_out_the_oldest_unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_CANDIDATES", 3)
    table = joined(S1)
    table.on(Heard(S1.id), 0.0)
    table.on(Candidate(SEED, "seed"), 0.0)
    for tick in range(1, 5):
        table.on(Tick(), tick * 0.5)
    first, second, third = (Address(f"10.9.9.9:{port}") for port in (1, 2, 3))
    for address in (first, second, third):
        table.on(Candidate(address, "exchange"), 2.0)
        table.on(Refused(address, "another job", final=True), 2.0)
    assert set(table.refusals()) == {third}
    table.on(DialFailed(SEED), 2.1)
    assert set(table.on(Tick(), 2.5)) == {Dial(SEED), Dial(S1.address)}


def test_dials_beyond_the_bound_wait_for_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_DIALS", 1)
    table = new_table()
    assert table.on(Candidate(S1.address, "exchange"), 0.0) == [Dial(S1.address)]
    assert table.on(Candidate(S2.address, "exchange"), 0.0) == []
    assert table.next_deadline() is None
    assert table.on(Welcomed(S1, S1.address, "me"), 0.1) == [Joined(S1), Dial(S2.address)]


@pytest.mark.parametrize("wrong", [{"beat_s": 3.0}, {"lag_s": 5.0}, {"redial_s": 0.0}])
def test_timing_that_cannot_work_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="correct the settings"):
        PresenceTiming(**wrong)
