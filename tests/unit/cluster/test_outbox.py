"""What a fork server tells: nobody waits for a reader, and what is dropped is counted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

import pytest

from zsfl.cluster import outbox
from zsfl.cluster.outbox import Outbox
from zsfl.cluster.talk import Described, Introduced, Printed, read_told
from zsfl.reports import AnyReport, Exited, Note, RoundReport

Told = AnyReport | Introduced | Described | Printed


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    monkeypatch.setattr(outbox, "MOST_WAITING_BYTES", 1 << 18)
    read, write = os.pipe()
    os.set_blocking(read, False)
    yield read, write
    for end in (read, write):
        with suppress(OSError):
            os.close(end)


def round_(number: int) -> RoundReport:
    return RoundReport(
        round=number, rounds=9, version=number, train_loss=1.0, loss=None, accuracy=None, steps=1, samples=1,
        seconds=1.0, steps_per_s=1.0, bytes_sent=1, serving={}, peers={"a": dict.fromkeys(map(str, range(300)), 1.0)},
    )  # fmt: skip


def read_all(box: Outbox, read: int) -> list[Told]:
    """What a reader gets that is back."""
    come = b""
    while True:
        with suppress(BlockingIOError):
            while piece := os.read(read, 1 << 20):
                come += piece
        if not box.waits:
            break
        box.flush()
    return [read_told(line) for line in come.splitlines()]


def test_who_reads_gets_all_of_it(pipe: tuple[int, int]) -> None:
    read, write = pipe
    box, told = Outbox(write), list[Told]()
    lines = [Printed(node="a", line=f"{number} " + "x" * 5000) for number in range(200)]
    for line in lines:
        box.report(line)
        told += read_all(box, read)
    assert told == lines
    assert not box.waits


def test_while_nobody_reads_the_newest_is_kept_and_the_rest_counted(pipe: tuple[int, int]) -> None:
    read, write = pipe
    box, lines = Outbox(write), 3000
    for number in range(lines):
        box.report(Printed(node="a", line=f"{number} " + "x" * 1000))
        if number % 300 == 0:
            box.report(Exited(node=f"node-{number}", code=-9))
            box.report(round_(number))
    told = read_all(box, read)
    printed = [int(one.line.split()[0]) for one in told if isinstance(one, Printed)]
    dropped = [int(one.message.split(": ")[1].split()[0]) for one in told if isinstance(one, Note)]
    assert printed == sorted(printed)
    assert printed[-1] == lines - 1
    assert len(printed) + sum(dropped) == lines
    assert 0 < len(dropped) <= 2
    for kept in ([one.node for one in told if isinstance(one, Exited)], [f"node-{n}" for n in range(0, lines, 300)]):
        assert len(kept) == 10
    assert [one.round for one in told if isinstance(one, RoundReport)] == list(range(0, lines, 300))


def test_rounds_are_dropped_only_where_nothing_else_is_left(pipe: tuple[int, int]) -> None:
    read, write = pipe
    box = Outbox(write)
    for number in range(500):
        box.report(round_(number))
    box.report(Exited(node="a", code=0))
    told = read_all(box, read)
    rounds = [one.round for one in told if isinstance(one, RoundReport)]
    assert rounds[-1] == 499
    assert len(rounds) < 200
    assert told[-1] == Exited(node="a", code=0)


def test_where_nobody_can_read_any_more_nothing_waits(pipe: tuple[int, int]) -> None:
    read, write = pipe
    box = Outbox(write)
    for _ in range(200):
        box.report(Printed(node="a", line="x" * 1000))
    assert box.waits
    os.close(read)
    box.flush()
    assert not box.waits
