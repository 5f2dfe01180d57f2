"""What a node is told when it is started."""

from __future__ import annotations

from pathlib import Path

from zsfl.cluster.spawner import NodeCommand
from zsfl.ids import Role


def test_settings_are_fit_for_json_and_leave_out_what_is_not_given() -> None:
    flags = {"runs": Path("a/b"), "shards": "0-3", "mdns": False, "run": None}
    told = NodeCommand(name="client-0-3", role=Role.CLIENT, flags=flags).settings()
    assert told == {"name": "client-0-3", "runs": "a/b", "shards": "0-3", "mdns": False}
