"""Node ids belong to keys, and each says what its role may."""

from __future__ import annotations

import pytest

from zsfl.errors import Unauthorised
from zsfl.ids import BODY, PROTOCOL, NodeCard, NodeId, Role, Version
from zsfl.keys.trusted import EVERY_ROLE
from zsfl.wire.guard import MAX_BOUND, Guard, node_of
from zsfl.wire.messages import Drain, FetchWeights, Hello, Join, ReleaseSpills, Train

A, B = "A" * 40, "B" * 40
WEIGHTS = FetchWeights(portion=BODY, version=Version(1))


def hello(node: str, role: Role, key: str = "") -> Hello:
    card = NodeCard(id=NodeId(node), name=f"name-{node}", role=role, host="127.0.0.1", control_port=1, key=key)
    return Hello(protocol=PROTOCOL, facts={}, card=card, codecs=())


def trusting(**roles: frozenset[Role]) -> Guard:
    known = {A: EVERY_ROLE, B: EVERY_ROLE} | {key * 40: held for key, held in roles.items()}
    return Guard("me", lambda key: known.get(key, frozenset()))


def test_a_routing_id_says_of_which_node_it_is() -> None:
    assert node_of(b"abc/12") == "abc"
    assert node_of(b"\x00\x01\x02\x03\x04") == ""
    assert node_of(b"") == ""
    assert node_of(b"a\nb/1") == ""


def test_a_node_id_belongs_to_the_key_that_said_it_first() -> None:
    guard = trusting()
    guard.check(b"n1/0", A, hello("n1", Role.CLIENT, A))
    guard.check(b"n1/1", A, WEIGHTS)
    for body in (WEIGHTS, hello("n1", Role.CLIENT, B)):
        with pytest.raises(Unauthorised, match="node id n1 is that of another machine"):
            guard.check(b"n1/2", B, body)
    guard.check(b"n2/0", B, WEIGHTS)  # also where there was no HELLO yet
    with pytest.raises(Unauthorised, match="another machine"):
        guard.check(b"n2/0", A, hello("n2", Role.CLIENT, A))


def test_a_hello_says_who_it_comes_from() -> None:
    guard = trusting()
    with pytest.raises(Unauthorised, match="introduces itself as node n2 or with another key"):
        guard.check(b"n1/0", A, hello("n2", Role.CLIENT, A))
    with pytest.raises(Unauthorised, match="or with another key"):
        guard.check(b"n1/0", A, hello("n1", Role.CLIENT, B))
    guard.check(b"n1/0", A, hello("n1", Role.CLIENT, A))
    with pytest.raises(Unauthorised, match="was a client and says that it is a aggregator"):
        guard.check(b"n1/0", A, hello("n1", Role.AGGREGATOR, A))


def test_a_node_is_only_what_its_key_is_trusted_for() -> None:
    guard = trusting(B=frozenset({Role.CLIENT, Role.OBSERVER}))
    with pytest.raises(Unauthorised, match="trusts the machine of name-n1 as client, observer, and not as aggregator"):
        guard.check(b"n1/0", B, hello("n1", Role.AGGREGATOR, B))
    with pytest.raises(Unauthorised, match=r"ReleaseSpills is not for a key that is trusted for client, observer"):
        guard.check(b"n9/0", B, ReleaseSpills(cids=()))
    with pytest.raises(Unauthorised, match="Drain"):
        guard.check(b"orders-1/0", B, Drain())
    guard.check(b"orders-2/0", A, Drain())


def test_a_node_says_what_its_role_may_even_if_its_key_may_more() -> None:
    guard = trusting()
    guard.check(b"n1/0", A, hello("n1", Role.CLIENT, A))
    guard.check(b"n1/0", A, WEIGHTS)
    for body in (ReleaseSpills(cids=()), Train(rounds=1), Drain()):
        with pytest.raises(Unauthorised, match="is not for a client to say to me, but for: "):
            guard.check(b"n1/0", A, body)


def test_nobody_speaks_for_another_node() -> None:
    guard = trusting()
    for node in ("n1", "n2"):
        guard.check(f"{node}/0".encode(), A, hello(node, Role.CLIENT, A))
    guard.check(b"n1/0", A, Join(node=NodeId("n1"), shards=()))
    with pytest.raises(Unauthorised, match="node n1 says Join for node 'n2'"):
        guard.check(b"n1/0", A, Join(node=NodeId("n2"), shards=()))


def test_a_key_that_is_trusted_no_more_may_say_nothing() -> None:
    known = {A: EVERY_ROLE}
    guard = Guard("me", lambda key: known.get(key, frozenset()))
    guard.check(b"n1/0", A, WEIGHTS)
    known.clear()
    for body in (WEIGHTS, hello("n1", Role.CLIENT, A)):
        with pytest.raises(Unauthorised, match="does not trust the key of this machine any more"):
            guard.check(b"n1/0", A, body)


def test_without_keys_everybody_is_one_thing_at_a_time() -> None:
    guard = Guard("me")
    guard.check(b"x/0", "", Drain())
    guard.check(b"n1/0", "", hello("n1", Role.CLIENT))
    with pytest.raises(Unauthorised, match="ReleaseSpills is not for a client"):
        guard.check(b"n1/5", "", ReleaseSpills(cids=()))
    guard.check(b"n2/0", "", ReleaseSpills(cids=()))


def test_memory_of_nodes_is_bounded_and_nobody_has_those_of_another_key_forgotten() -> None:
    guard = trusting()
    guard.check(b"b/0", B, WEIGHTS)
    for number in range(MAX_BOUND + 1):
        guard.check(f"n{number}/0".encode(), A, WEIGHTS)
    with pytest.raises(Unauthorised, match="another machine"):
        guard.check(b"b/0", A, WEIGHTS)
    with pytest.raises(Unauthorised, match="another machine"):
        guard.check(b"n1/0", B, WEIGHTS)
    guard.check(b"n0/0", B, WEIGHTS)  # forgotten, being silent for longest
