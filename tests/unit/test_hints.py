"""What is to be done about a peer that is gone is said by how it could be reached."""

from __future__ import annotations

import shlex
from typing import Any

import msgspec
import pytest

from zsfl.cli import parser
from zsfl.hints import how_to_start, where_it_was
from zsfl.ids import Address, NodeCard, NodeId, Role
from zsfl.settings import NodeSettings, load_settings

NEAR = Address("10.0.0.1:7700")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ""),
        (
            {"cluster": "mine", "clients": 4, "mode": "elastic"},
            " --cluster mine --clients 4 --mode elastic",
        ),
        ({"mdns": False}, f" --no-mdns --peer {NEAR}"),
        ({"keys": "my keys"}, " --keys 'my keys'"),
        ({"keys": "/here", "host": "10.0.0.1"}, " --keys KEYS --host ADDRESS"),
        ({"peers": ("10.0.0.3:1",), "host": "10.0.0.1", "insecure": True}, f" --insecure --peer {NEAR} --host ADDRESS"),
    ],
)
def test_the_command_agrees_with_the_node_that_names_it(settings: dict[str, Any], words: str) -> None:
    command = how_to_start(Role.CLIENT, NodeSettings(**settings), NEAR, [4, 3])
    assert command == f"zsfl node client JOB --shards 3,4{words}"
    told = load_settings(vars(parser().parse_args(shlex.split(command.replace("ADDRESS", "10.0.0.2"))[1:])), {})
    assert (told.shards, told.cluster) == ("3,4", settings.get("cluster", ""))


def test_an_aggregator_that_was_there_is_to_go_on() -> None:
    assert how_to_start(Role.AGGREGATOR, NodeSettings(), NEAR) == "zsfl node aggregator JOB --resume"
    behind = how_to_start(Role.CLIENT, NodeSettings(host="10.0.0.1"), NEAR, [4], behind_nat=True)
    assert behind == f"zsfl node client JOB --shards 4 --peer {NEAR} --behind-nat"


@pytest.mark.parametrize(
    ("host", "here", "said"),
    [
        ("127.0.0.1", "127.0.0.1", "on this machine: its log, or its terminal"),
        ("10.0.0.1", "10.0.0.1", "on this machine: its log, or its terminal"),
        ("10.0.0.2", "10.0.0.1", "is that machine on, and in reach?"),
    ],
)
def test_where_to_look_depends_on_the_machine(host: str, here: str, said: str) -> None:
    card = NodeCard(id=NodeId("x"), name="client-3", role=Role.CLIENT, host=host, control_port=41)
    words = where_it_was(card, here)
    assert words.startswith(f"client-3 ran at {host}:41")
    assert said in words
    assert where_it_was(msgspec.structs.replace(card, behind_nat=True), here).startswith("client-3 ran behind NAT")
