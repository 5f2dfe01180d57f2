"""Node ids belong to keys, and each says what its role may."""

from __future__ import annotations

import pytest

from zsfl.errors import Unauthorised
from zsfl.ids import BODY, PROTOCOL, NodeCard, NodeId, Role, Version
from zsfl.keys.nodes import is_of, new_node_id
from zsfl.keys.trusted import EVERY_ROLE
from zsfl.wire.guard import MAX_BOUND, Guard, node_of
from zsfl.wire.messages import Drain, FetchWeights, Hello, Join, ReleaseSpills, Train

A, B = "A" * 40, "B" * 40
A1, A2, B1 = new_node_id(A), new_node_id(A), new_node_id(B)
WEIGHTS = FetchWeights(portion=BODY, version=Version(1))


def hello(node: str, role: Role, key: str = "") -> Hello:
    card = NodeCard(id=NodeId(node), name=f"name-{node}", role=role, host="127.0.0.1", control_port=1, key=key)
    return Hello(protocol=PROTOCOL, facts={}, card=card, codecs=())


def at(node: NodeId, number: int = 0) -> bytes:
    return f"{node}/{number}".encode()


def trusting(**roles: frozenset[Role]) -> Guard:
    known = {A: EVERY_ROLE, B: EVERY_ROLE} | {key * 40: held for key, held in roles.items()}
    return Guard("me", lambda key: known.get(key, frozenset()))


def test_a_routing_id_says_of_which_node_it_is() -> None:
    assert node_of(b"abc/12") == "abc"
    assert node_of(b"\x00\x01\x02\x03\x04") == ""
    assert node_of(b"") == ""
    assert node_of(b"a\nb/1") == ""


def test_a_node_id_is_of_the_machine_that_made_it_wherever_it_is_heard_first() -> None:
    guard = trusting()
    for body in (WEIGHTS, hello(A1, Role.CLIENT, B)):
        with pytest.raises(Unauthorised, match=f"node id {A1} is that of another machine"):
            guard.check(at(A1, 2), B, body)
    guard.check(at(A1), A, hello(A1, Role.CLIENT, A))
    guard.check(at(A1, 1), A, WEIGHTS)
    for made_up in ("", "-", "3f9a0c12ab44", "3f9a0c12ab44-", f"{A1}-", f"{A1.upper()}x", "operator-1"):
        assert not is_of(NodeId(made_up), A)
        if made_up:
            with pytest.raises(Unauthorised, match="another machine"):
                guard.check(f"{made_up}/0".encode(), A, WEIGHTS)


def test_nobody_can_tell_that_two_ids_are_of_one_machine() -> None:
    (salt, mark), (other_salt, other) = A1.split("-"), A2.split("-")
    assert (len(salt), len(mark)) == (12, 16)
    assert salt != other_salt
    assert mark != other
    assert new_node_id().isalnum(), "without a key"


def test_a_hello_says_who_it_comes_from() -> None:
    guard = trusting()
    with pytest.raises(Unauthorised, match=f"introduces itself as node {A2} or with another key"):
        guard.check(at(A1), A, hello(A2, Role.CLIENT, A))
    with pytest.raises(Unauthorised, match="or with another key"):
        guard.check(at(A1), A, hello(A1, Role.CLIENT, B))
    guard.check(at(A1), A, hello(A1, Role.CLIENT, A))
    with pytest.raises(Unauthorised, match="was a client and says that it is a aggregator"):
        guard.check(at(A1), A, hello(A1, Role.AGGREGATOR, A))


def test_who_answers_is_who_it_says_it_is() -> None:
    guard = trusting()
    guard.introduce(hello(A1, Role.CLIENT, A).card)
    with pytest.raises(Unauthorised, match="another machine"):
        guard.introduce(hello(A1, Role.CLIENT, B).card)


def test_a_node_is_only_what_its_key_is_trusted_for() -> None:
    guard = trusting(B=frozenset({Role.CLIENT, Role.OBSERVER}))
    with pytest.raises(Unauthorised, match=r"trusts the machine of \S+ as client, observer, and not as aggregator"):
        guard.check(at(B1), B, hello(B1, Role.AGGREGATOR, B))
    with pytest.raises(Unauthorised, match=r"ReleaseSpills is not for a key that is trusted for client, observer"):
        guard.check(at(new_node_id(B)), B, ReleaseSpills(cids=()))
    with pytest.raises(Unauthorised, match="Drain"):
        guard.check(at(new_node_id(B)), B, Drain())
    guard.check(at(new_node_id(A)), A, Drain())


def test_a_node_says_what_its_role_may_even_if_its_key_may_more() -> None:
    guard = trusting()
    guard.check(at(A1), A, hello(A1, Role.CLIENT, A))
    guard.check(at(A1), A, WEIGHTS)
    for body in (ReleaseSpills(cids=()), Train(rounds=1), Drain()):
        with pytest.raises(Unauthorised, match="is not for a client to say to me, but for: "):
            guard.check(at(A1), A, body)


def test_nobody_speaks_for_another_node() -> None:
    guard = trusting()
    for node in (A1, A2):
        guard.check(at(node), A, hello(node, Role.CLIENT, A))
    guard.check(at(A1), A, Join(node=A1, shards=()))
    with pytest.raises(Unauthorised, match=f"node {A1} says Join for node '{A2}'"):
        guard.check(at(A1), A, Join(node=A2, shards=()))


def test_a_key_that_is_trusted_no_more_may_say_nothing() -> None:
    known = {A: EVERY_ROLE}
    guard = Guard("me", lambda key: known.get(key, frozenset()))
    guard.check(at(A1), A, WEIGHTS)
    known.clear()
    for body in (WEIGHTS, hello(A1, Role.CLIENT, A)):
        with pytest.raises(Unauthorised, match="does not trust the key of this machine any more"):
            guard.check(at(A1), A, body)


def test_without_keys_everybody_is_one_thing_at_a_time() -> None:
    guard = Guard("me")
    guard.check(b"x/0", "", Drain())
    guard.check(b"n1/0", "", hello("n1", Role.CLIENT))
    with pytest.raises(Unauthorised, match="ReleaseSpills is not for a client"):
        guard.check(b"n1/5", "", ReleaseSpills(cids=()))
    guard.check(b"n2/0", "", ReleaseSpills(cids=()))


def test_memory_of_nodes_is_bounded_and_nobody_has_those_of_another_key_forgotten() -> None:
    guard = trusting()
    guard.check(at(B1), B, hello(B1, Role.CLIENT, B))
    guard.check(at(A1), A, hello(A1, Role.CLIENT, A))
    for _ in range(MAX_BOUND):
        node = new_node_id(A)
        guard.check(at(node), A, hello(node, Role.CLIENT, A))
    with pytest.raises(Unauthorised, match="not for a client"):
        guard.check(at(B1), B, Drain())
    guard.check(at(A1), A, Drain())  # forgotten, being silent for longest
