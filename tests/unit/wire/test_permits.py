"""The table of who may send what is whole, and says what it should."""

from __future__ import annotations

from random import Random
from typing import Any, get_args

import pytest
from helpers.wild import sample

from zsfl.ids import NodeCard, Role, RunId, Version, step_cid
from zsfl.wire import messages as m
from zsfl.wire.enrolment import Enrol, Enrolled
from zsfl.wire.examining import Condition, Examine
from zsfl.wire.fields import Load, Message
from zsfl.wire.messages import RunState, SpillOffer
from zsfl.wire.permits import MAY_SEND, may_say, may_send
from zsfl.wire.succession import FetchPiece, Follow, Grant, Granted


def _all_below(base: type[Message]) -> set[type[Message]]:
    return {kind for below in base.__subclasses__() for kind in (below, *_all_below(below))}


def test_every_message_that_travels_has_an_entry_and_nothing_else_has() -> None:
    travels = {*get_args(m.Request), *get_args(m.Reply), *get_args(m.Broadcast)}
    assert travels == MAY_SEND.keys()
    assert _all_below(Message) <= travels | {kind for kind in _all_below(Message) if kind.__module__.startswith("test")}


def test_what_has_no_entry_nobody_may_send() -> None:
    class New(Message, frozen=True, kw_only=True, tag="test-new"):
        pass

    assert not any(may_send(role, New) for role in Role)


@pytest.mark.parametrize(
    ("kind", "roles"),
    [
        (m.Hello, set(Role) - {Role.OPERATOR}),
        (m.Join, {Role.CLIENT}),
        (m.Train, {Role.OPERATOR}),
        (m.Drain, {Role.OPERATOR}),
        (Examine, {Role.OPERATOR, Role.OBSERVER}),
        (Condition, set(Role) - {Role.OPERATOR}),
        (m.ReleaseSpills, {Role.AGGREGATOR}),
        (m.FetchSpills, {Role.AGGREGATOR}),
        (m.Remake, {Role.AGGREGATOR}),
        (m.Recheck, {Role.AGGREGATOR}),
        (m.Announcement, {Role.AGGREGATOR}),
        (m.Committed, {Role.AGGREGATOR}),
        (m.Weights, {Role.AGGREGATOR}),
        (m.Offers, {Role.CLIENT, Role.SPLIT_SERVER}),
        (m.Forward, {Role.CLIENT}),
        (m.Output, {Role.SPLIT_SERVER}),
        (Grant, {Role.AGGREGATOR, Role.STANDBY}),
        (Granted, {Role.CLIENT}),
        (Follow, {Role.STANDBY}),
        (FetchPiece, {Role.STANDBY}),
        (Enrol, set[Role]()),
        (Enrolled, set[Role]()),
    ],
)
def test_who_may_send_what(kind: type[Message], roles: set[Role]) -> None:
    assert {role for role in Role if may_send(role, kind)} == roles


def test_of_a_heartbeat_everybody_says_what_is_for_them_to_say() -> None:
    """An aggregator gives way to the state of another, clients go by loads, and what is offered is fetched."""
    rng = Random(1)
    said: list[tuple[dict[str, Any], set[Role]]] = [
        ({}, set(Role) - {Role.OPERATOR}),
        ({"state": sample(rng, RunState)}, {Role.AGGREGATOR}),
        ({"load": sample(rng, Load)}, {Role.SPLIT_SERVER}),
        ({"merging": (step_cid(RunId("abcdef"), 1, Version(2)),)}, {Role.SPLIT_SERVER}),
        ({"offers": (sample(rng, SpillOffer),)}, {Role.CLIENT, Role.SPLIT_SERVER}),
    ]
    for fields, roles in said:
        beat = m.Beat(card=sample(rng, NodeCard), peers=(), counters={}, **fields)
        assert {role for role in Role if may_say(role, beat)} == roles
