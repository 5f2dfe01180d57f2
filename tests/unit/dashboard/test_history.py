"""The lines of metrics.jsonl, as they are read while they are written, add up to the curves of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from zsfl import reports
from zsfl.dashboard import history, tail
from zsfl.dashboard.history import History
from zsfl.dashboard.tail import Tail
from zsfl.reports import Before, Finished, RoundReport, WindowReport


def round_(number: int, **about: Any) -> RoundReport:
    said: dict[str, Any] = {
        "rounds": 9, "version": 10 * number, "train_loss": 1.0 / number, "loss": 2.0, "accuracy": 0.5, "steps": 4,
        "samples": 40, "seconds": 2.0, "steps_per_s": 2.0, "bytes_sent": 30, "serving": {"a": {"s": 3, "t": 1}},
        "peers": {"a": {"bytes_sent": 5.0}, "s": {"bytes_sent": 7.0}, "t": {"bytes_sent": 8.0},
                  "g": {"bytes_sent": 10.0}},
    }  # fmt: skip
    return RoundReport(round=number, **{**said, **about})


def of_test(version: int, seconds: float, **about: Any) -> reports.Tested:
    said: dict[str, Any] = {"round": 0, "loss": 1.0, "accuracy": 0.5, "clients": {"a": 0.4}}
    return reports.Tested(version=version, seconds=seconds, **{**said, **about})


def test_rounds_and_tests_lie_where_training_had_come_to() -> None:
    told = History()
    for report in (of_test(10, 2.5), round_(1), of_test(15, 3.5, ends_round=False), of_test(20, 5.0), round_(2)):
        told.on(report)
    assert [row.end_s for row in told.rounds] == [2.5, 5.0]
    assert [test.at_s for test in told.tests] == [2.5, 3.5, 5.0]
    assert told.rounds[0].sent == {"clients": 5.0, "split servers": 15.0, "aggregator and others": 10.0}
    # Another process goes on: its clock begins anew, and it makes the second round again.
    mark = told.mark
    for report in (of_test(20, 1.0), round_(2), round_(3, version=31)):
        told.on(report)
    assert [row.round for row in told.rounds] == [1, 2, 3]
    assert [row.end_s for row in told.rounds] == [2.5, 6.0, 8.0]
    assert [test.version for test in told.tests] == [10, 15, 20]
    assert told.since(mark) is None, "what was made again is not only an addition"


def test_a_run_that_is_taken_up_again_elsewhere_is_shown_from_its_first_round() -> None:
    told = History()
    told.on(Before(reports=(of_test(10, 2.5), round_(1), of_test(20, 5.0), round_(2))))
    told.on(of_test(30, 1.5))
    told.on(round_(3))
    assert [(row.round, row.end_s) for row in told.rounds] == [(1, 2.5), (2, 5.0), (3, 6.5)]


def test_a_viewer_needs_only_what_was_added() -> None:
    told = History()
    told.on(round_(1))
    mark = told.mark
    told.on(of_test(20, 5.0))
    told.on(round_(2))
    added = told.since(mark)
    assert added is not None
    assert ([row.round for row in added.rounds], [test.version for test in added.tests]) == ([2], [20])
    assert told.since(told.mark) == history.Rows(rounds=[], tests=[])
    assert History().since(mark) is None, "it is of another history"
    told.begin_again()
    assert (told.since(mark), told.rounds, told.tests) == (None, [], [])


def test_lines_that_do_not_have_the_losses_of_clients_yet_are_read(tmp_path: Path) -> None:
    old = tmp_path / "metrics.jsonl"
    lines = [msgspec.to_builtins(one) for one in (of_test(10, 2.5), round_(1))]
    del lines[0]["losses"], lines[1]["train_losses"]
    old.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    told = History()
    for report in reports.reports_in(tmp_path):
        told.on(report)
    assert [(row.train_loss, row.train_losses) for row in told.rounds] == [(1.0, {})]
    assert [(row.clients, row.losses) for row in told.tests] == [({"a": 0.4}, {})]


def test_how_it_ended_holds_until_it_goes_on() -> None:
    told = History()
    told.on(Finished(rounds=1, version=9, accuracy=None, loss=None, seconds=1.0, folder="runs/a"))
    assert isinstance(told.end, Finished)
    window = {"round": 2, "rounds": 3, "window": 1, "windows": 4, "version": 9, "loss": 1.0, "steps_per_s": 1.0}
    told.on(WindowReport(serving={}, **window))
    assert told.end is None
    assert told.window is not None


def test_a_long_history_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_ROUNDS", 20)
    monkeypatch.setattr(history, "DETAILED", 5)
    monkeypatch.setattr(history, "MAX_CELLS", 60)
    told = History()
    for number in range(1, 101):
        told.on(of_test(10 * number, 2.0 * number, clients=dict.fromkeys("abc", 0.5)))
        told.on(round_(number, train_losses=dict.fromkeys("abcd", 1.0)))
        assert len(told.rounds) <= 15
        assert len(told.tests) <= 20
        assert sum(bool(row.serving) for row in told.rounds) <= 6
        assert told.rounds[-1].round == number
        assert told.rounds[-1].end_s == 2.0 * number, "time does not depend on what was left out"
    assert told.rounds[0].round < 20, "what is left out is not the beginning"
    msgspec.json.encode(told.whole())


def test_lines_are_read_once_and_only_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reading = Tail(path)
    assert reading.read() == ([], False, False)
    path.write_bytes(b"one\ntwo\nthr")
    assert reading.read() == ([b"one", b"two"], False, False)
    with path.open("ab") as file:
        file.write(b"ee\nfour\n")
    assert reading.read() == ([b"three", b"four"], False, False)
    assert reading.read() == ([], False, False)


def test_a_file_that_was_cut_or_replaced_is_begun_again(tmp_path: Path) -> None:
    path, other = tmp_path / "metrics.jsonl", tmp_path / "other"
    path.write_bytes(b"one\ntwo\n")
    reading = Tail(path)
    reading.read()
    os.truncate(path, 4)
    assert reading.read() == ([b"one"], True, False)
    other.write_bytes(b"1\n2\n3\n")
    other.replace(path)
    assert reading.read() == ([b"1", b"2", b"3"], True, False)
    path.unlink()
    assert reading.read() == ([], True, False)
    assert reading.read() == ([], False, False)


def test_a_long_file_is_read_in_pieces_and_a_line_without_end_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "CHUNK_BYTES", 16)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"a\n" * 10 + b"x" * 40 + b"\nb\n")
    reading, lines, more = Tail(path), [], True
    while more:
        found, _, more = reading.read()
        lines += found
    assert lines == [b"a"] * 10 + [b"b"]
