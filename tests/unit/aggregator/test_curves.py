"""Curves for TensorBoard say what metrics.jsonl says, also where a resume makes something again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zsfl import reports
from zsfl.aggregator.curves import TENSORBOARD, drawing, standing
from zsfl.aggregator.run_folder import RunFolder
from zsfl.reports import Finished, RoundReport, WindowReport


def round_(number: int, loss: float) -> RoundReport:
    return RoundReport(
        round=number, rounds=9, version=2 * number, train_loss=loss, loss=None, accuracy=None, steps=1, samples=1,
        seconds=1.0, steps_per_s=1.0, bytes_sent=1, serving={}, peers={}, train_losses={"a": 2 * loss, "b": None},
    )  # fmt: skip


def window(version: int, loss: float) -> WindowReport:
    return WindowReport(round=1, rounds=9, window=1, windows=9, version=version, loss=loss, steps_per_s=1.0, serving={})


def one_test(version: int, loss: float) -> reports.Tested:
    said = {"round": 1, "accuracy": None, "clients": {"a": 0.5}, "losses": {"a": 3 * loss}, "seconds": 1.0}
    return reports.Tested(version=version, loss=loss, **said)  # type: ignore[arg-type]


def test_what_was_made_again_counts_once() -> None:
    first, again = round_(2, 0.5), round_(2, 0.25)
    kept = standing(
        [round_(1, 1.0), one_test(2, 9.0), first, round_(3, 0.4), one_test(4, 8.0), again, one_test(4, 7.0)]
    )
    assert kept == [round_(1, 1.0), again, one_test(2, 9.0), one_test(4, 7.0)]


def test_readers_see_what_the_run_stands_by(tmp_path: Path) -> None:
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed"
    )

    def read() -> dict[str, Any]:
        found = accumulators.EventAccumulator(str(tmp_path / "run" / TENSORBOARD))
        found.Reload()
        return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}

    notes: list[tuple[str, str]] = []
    with RunFolder.create(tmp_path, "run", resume=False) as folder:
        folder.append_metrics(round_(1, 1.0))
        with drawing(folder, lambda *said: notes.append(said)):
            for report in (window(3, 0.75), one_test(4, 2.0), round_(2, 0.5), round_(3, 0.25), round_(2, 0.125)):
                folder.append_metrics(report)
            folder.append_metrics(Finished(rounds=2, version=4, accuracy=None, loss=None, seconds=1.0, folder=""))
            assert read()["round/train_loss"] == [(1, 1.0), (2, 0.125)], "what is written is there at once at the end"
        folder.append_metrics(round_(4, 0.0))
    found = read()
    assert found["round/train_loss"] == [(1, 1.0), (2, 0.125)]
    assert found["version/train_loss"] == [(3, 0.75)]
    assert found["version/test_loss"] == [(4, 2.0)]
    assert found["clients/a"] == [(4, 0.5)]
    assert found["clients_test_loss/a"] == [(4, 6.0)]
    assert found["clients_train_loss/a"] == [(1, 2.0), (2, 0.25)]
    assert "clients_train_loss/b" not in found
    assert notes == []
