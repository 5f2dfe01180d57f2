"""What two nodes have to agree on to be peers."""

from __future__ import annotations

from collections.abc import Mapping


def disagreement(mine: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """How two nodes' facts about the job differ, told to the other one; empty when they agree."""
    names = [*mine, *(name for name in theirs if name not in mine)]
    return ", ".join(
        f"{name} is {mine.get(name, 'not stated')} there and {theirs.get(name, 'not stated')} here"
        for name in names
        if mine.get(name) != theirs.get(name)
    )
