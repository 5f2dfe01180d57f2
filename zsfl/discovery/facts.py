"""What two nodes have to agree on to be peers."""

from __future__ import annotations

from collections.abc import Mapping

from zsfl.ids import PROTOCOL, NodeCard, Role


def disagreement(mine: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """How two nodes' facts about the job differ, told to the other one; empty when they agree."""
    names = [*mine, *(name for name in theirs if name not in mine)]
    return ", ".join(
        f"{name} is {mine.get(name, 'not stated')} there and {theirs.get(name, 'not stated')} here"
        for name in names
        if mine.get(name) != theirs.get(name)
    )


def objection(me: NodeCard, mine: Mapping[str, str], other: NodeCard, theirs: Mapping[str, str], protocol: int) -> str:
    """Why another node, which speaks that version of the protocol, is none of ours; empty where it is."""
    if protocol != PROTOCOL:
        return (
            f"{me.name} speaks version {PROTOCOL} of the protocol and {other.name} version {protocol}: install the "
            "same zsfl on both"
        )
    if other.role is Role.OBSERVER:  # which needs no job to look, and may not know it
        mine = {fact: value for fact, value in mine.items() if fact in theirs}
    if me.role is Role.OBSERVER:
        theirs = {fact: value for fact, value in theirs.items() if fact in mine}
    difference = disagreement(mine, theirs)
    return f"{me.name} runs another job than {other.name}: {difference}" if difference else ""
