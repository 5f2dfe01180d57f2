"""What is announced, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from zsfl.aggregator.stage import Stage
from zsfl.ids import Cid, NodeId, Version
from zsfl.wire.messages import Announcement


def test_what_a_commit_settled_is_said_once_with_the_next_announcement() -> None:
    said: list[Announcement] = []
    stage = Stage(cast(Any, SimpleNamespace(card=SimpleNamespace(id=NodeId("agg")), publish=said.append)))
    stage.settle([Cid("a")], [Cid("x")])
    stage.settle([Cid("b")], [])
    stage.place(round=2)
    assert said == []
    stage.enter(phase="training", version=Version(4))
    stage.enter(window=1)
    assert [(one.counted, one.dropped) for one in said] == [(("a", "b"), ("x",)), ((), ())]
    assert [(one.node, one.state.phase, one.state.round, one.state.window) for one in said] == [
        ("agg", "training", 2, 0),
        ("agg", "training", 2, 1),
    ]
    assert said[-1].state is stage.state
    assert stage.state.run == stage.run
