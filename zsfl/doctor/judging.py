"""From what was seen to what is to be said of it: a pure function."""

from __future__ import annotations

from collections.abc import Iterator

from zsfl.doctor import nodes as each
from zsfl.doctor import together
from zsfl.doctor.machine import judge_machine
from zsfl.doctor.seen import Finding, Seen


def findings(seen: Seen) -> list[Finding]:
    """This machine first, then who is there, and what keeps them from one another."""
    return list(_findings(seen))


def _findings(seen: Seen) -> Iterator[Finding]:
    ours, others, unknown = together.groups_of(seen)
    met = [node for nodes in ours.values() for node in nodes]
    yield from judge_machine(seen)
    yield from each.judge_silent(seen, unknown)
    yield from together.judge_protocols(seen, unknown)
    yield from together.judge_jobs(seen, ours, others)
    yield from together.judge_roles(ours, others, silent=any(map(together.is_silent, unknown)))
    yield from together.judge_facts(seen, ours)
    for nodes in ours.values():
        yield from each.judge_keys_of(seen.here.keys, nodes)
    yield from each.judge_ports([*met, *unknown])
    yield from together.judge_hearing(ours)
    yield from each.judge_clocks(met)
    yield from each.judge_versions(seen, met)
    yield from each.judge_disks(met)
    if seen.left_out:
        what = f"{seen.left_out} more addresses are known, and were not asked"
        yield Finding(check="nodes", state="warn", what=what, do="name one of them with --peer to see them")
