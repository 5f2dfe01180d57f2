"""Whose shards are whose."""

from __future__ import annotations

import pytest
import zmq

from zsfl.aggregator.holders import Holders
from zsfl.errors import ConfigError
from zsfl.ids import NodeCard, NodeId, PublicKey, Role
from zsfl.keys.machine import machine_id

ANNA, BOB, EVE = (PublicKey(zmq.curve_keypair()[0].decode()) for _ in range(3))


def card(key: str, name: str = "client") -> NodeCard:
    return NodeCard(id=NodeId(name), name=name, role=Role.CLIENT, host="127.0.0.1", control_port=1, key=key)


def test_without_keys_everybody_speaks_for_what_it_says() -> None:
    holders = Holders({}, keyed=False, most=1)
    holders.check(card(""), range(100))
    assert not holders.take("", [0])
    assert holders.believed(card(""), (0, 7)) == (0, 7)
    assert (holders.by_key(), holders.largest()) == ({}, ("", 0))


def test_a_machine_speaks_for_the_shards_that_it_joined_with() -> None:
    holders = Holders({ANNA: (0, 2)}, keyed=True)
    assert holders.believed(card(ANNA), (0, 1, 2)) == (0, 2)
    assert holders.take(BOB, [1])
    assert not holders.take(BOB, [1])
    assert holders.believed(card(BOB), (0, 1, 2)) == (1,)
    assert holders.by_key() == {ANNA: (0, 2), BOB: (1,)}
    assert holders.largest() == (machine_id(ANNA), 2)


def test_a_shard_stays_with_its_machine_while_that_is_trusted() -> None:
    trusted = {ANNA, BOB, EVE}
    holders = Holders({ANNA: (0, 1)}, keyed=True, most=8, trusts=lambda key: key in trusted)
    holders.check(card(ANNA, "another-client"), [0, 1])
    holders.check(card(EVE), [2])
    said = rf"shard 1 is of the machine {machine_id(ANNA)} in this run, and eve is on .* --reassign 1$"
    with pytest.raises(ConfigError, match=said):
        holders.check(card(EVE, "eve"), [2, 1])
    trusted.remove(ANNA)
    holders.check(card(EVE), [2, 1])
    holders.take(EVE, [1])
    trusted.add(ANNA)
    with pytest.raises(ConfigError, match="shard 1 is of the machine"):
        holders.check(card(ANNA), [0, 1])


def test_a_person_gives_a_shard_to_another_machine_once() -> None:
    holders = Holders({ANNA: (0, 1)}, keyed=True, most=8, reassign=[1])
    holders.check(card(BOB), [1])
    with pytest.raises(ConfigError, match="shard 0 is of the machine"):
        holders.check(card(BOB), [0])
    holders.take(ANNA, [1])  # it is back
    holders.take(BOB, [1])
    with pytest.raises(ConfigError, match="shard 1 is of the machine"):
        holders.check(card(EVE), [1])


def test_one_key_is_not_everybody() -> None:
    holders = Holders({}, keyed=True, most=3)
    holders.check(card(EVE), [0, 1, 2])
    holders.take(EVE, [0, 1])
    holders.check(card(EVE), [1, 2])
    said = "the machine of eve would hold 4 shards, and clients with one key may hold 3: .*--clients-per-key"
    with pytest.raises(ConfigError, match=said):
        holders.check(card(EVE, "eve"), [2, 3])
    holders.check(card(BOB), [2, 3])
