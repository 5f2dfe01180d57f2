"""What `zsfl doctor` asks one node, over real sockets, and who is reached by which key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import zmq
from helpers.descriptors import none_left
from helpers.doors import machines
from helpers.waiting import HANG_S
from helpers.wires import HOST
from zmq.utils import z85

from zsfl.doctor.asking import Asker
from zsfl.doctor.seen import SeenNode
from zsfl.errors import NoPeer
from zsfl.ids import Address, PublicKey
from zsfl.keys.trusted import EVERY_ROLE, Trusted, trust
from zsfl.wire.connection import Connection
from zsfl.wire.greeting import mechanism_at
from zsfl.wire.reaching import KEYS_AT_ONCE, by_key


async def test_whose_machine_it_is_comes_out_however_many_are_trusted(tmp_path: Path) -> None:
    async with machines(tmp_path, "anna", "bob") as (anna, bob):
        for number in range(KEYS_AT_ONCE):
            key = PublicKey(z85.encode(bytes([number + 1] * 32)).decode())
            trust(bob.folder, Trusted(key=key, name=f"machine-{number}", roles=EVERY_ROLE))
        bob.trusts(anna)
        anna.trusts(bob)
        asker = Asker(bob.door)
        try:
            node = SeenNode(address=f"{HOST}:{anna.serve().port}", sources=frozenset())
            seen = await asker.ask(node, "")
        finally:
            asker.close()
        assert seen.key == anna.key


async def test_where_no_file_descriptor_is_left_that_is_said_and_nothing_of_whom_is_trusted(tmp_path: Path) -> None:
    async with machines(tmp_path, "anna", "bob") as (anna, bob):
        bob.trusts(anna)
        anna.trusts(bob)
        address = f"{HOST}:{anna.serve().port}"

        def connect(key: str) -> Connection:
            return bob.dial(address, key, watch=True)

        asker, said = Asker(bob.door), "this process may open no more files and connections"
        try:
            with none_left():
                with pytest.raises(NoPeer, match=said):
                    await by_key(connect, list(bob.trust.known), HANG_S)
                with pytest.raises(NoPeer, match=said):
                    await mechanism_at(Address(address), HANG_S)
                with pytest.raises(NoPeer, match=said):
                    await asker.ask(SeenNode(address=address, sources=frozenset()), "")
        finally:
            asker.close()
        found = await by_key(connect, list(bob.trust.known), HANG_S)
        assert found is not None
        assert found[0] == anna.key
        assert len(bob.trust.known) == 2


async def test_a_connection_that_cannot_be_made_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[zmq.Socket[bytes]] = []
    socket = zmq.Context.socket

    def kept(*args: Any, **named: Any) -> zmq.Socket[bytes]:
        made.append(socket(*args, **named))
        return made[-1]

    async with machines(tmp_path, "anna") as (anna,):
        monkeypatch.setattr(zmq.Context, "socket", kept)
        with pytest.raises(zmq.ZMQError):
            anna.dial("no address", anna.key, watch=True)
        assert [one.closed for one in made] == [True, True]
