"""What `zsfl doctor` asks one node, over real sockets."""

from __future__ import annotations

from pathlib import Path

from helpers.doors import machines
from helpers.wires import HOST
from zmq.utils import z85

from zsfl.doctor.asking import Asker
from zsfl.doctor.seen import SeenNode
from zsfl.ids import PublicKey
from zsfl.keys.trusted import EVERY_ROLE, Trusted, trust
from zsfl.wire.reaching import KEYS_AT_ONCE


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
