from __future__ import annotations

import asyncio
import json
import resource
import signal
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zsfl.aggregator.run_folder import RunFolder
from zsfl.aggregator.standing import Standing
from zsfl.errors import ConfigError, StorageError
from zsfl.reports import Failed, Finished, RoundReport, WindowReport


def round_report(number: int, *, loss: float | None = 0.5, accuracy: float | None = 0.9) -> RoundReport:
    return RoundReport(
        round=number,
        rounds=9,
        version=number * 10,
        train_loss=1 / number,
        loss=loss,
        accuracy=accuracy,
        steps=50,
        samples=500,
        seconds=1.0,
        steps_per_s=50.0,
        bytes_sent=1000,
        serving={"client-0": {"server-0": 50}},
        peers={},
    )


WINDOW = WindowReport(round=1, rounds=9, window=1, windows=10, version=1, loss=2.0, steps_per_s=5.0, serving={})

FINISHED = Finished(node="a", rounds=1, version=1, accuracy=None, loss=None, seconds=1.0, folder="runs/digits")


def test_a_taken_name_gets_a_number(tmp_path: Path) -> None:
    runs = tmp_path / "deep" / "runs"
    names: list[str] = []
    for _ in range(3):
        with RunFolder.create(runs, "digits", resume=False) as folder:
            names.append(folder.path.name)
            folder.append_metrics(WINDOW)
    assert names == ["digits", "digits-2", "digits-3"]


def test_a_run_that_never_trained_leaves_no_folder(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "digits", resume=False) as folder:
        folder.write_address("127.0.0.1:1")
        folder.checkpoint_path.mkdir()
    with pytest.raises(ConfigError), RunFolder.create(tmp_path, "digits", resume=False) as again:
        raise ConfigError("that name was free again")
    with RunFolder.of_copy(tmp_path, "digits.standby"):
        pass
    assert again.path == folder.path
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_which_something_may_come_keeps_its_folder(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "trained", resume=False) as folder:
        folder.append_commit({"version": 1})
    with RunFolder.create(tmp_path, "trained", resume=True) as folder:
        folder.ledger_path.unlink()
    with RunFolder.create(tmp_path, "failed", resume=False) as folder:
        folder.append_metrics(Failed(node="aggregator", kind="RunFailed", message="the loss became nan"))
    with RunFolder.create(tmp_path, "stood-by-for", resume=False) as folder:
        Standing(holder="a", shared=True).keep(folder.path)
    with pytest.raises(asyncio.CancelledError), RunFolder.create(tmp_path, "killed", resume=False):
        raise asyncio.CancelledError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["failed", "killed", "stood-by-for", "trained"]


@pytest.mark.parametrize("name", ["spills", "logs", "Logs"])
def test_a_job_that_is_called_like_a_folder_beside_the_runs_needs_a_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"a run cannot be called {name}, which is .* name it with --run"):
        RunFolder.create(tmp_path, name, resume=False)


def test_a_folder_without_a_run_does_not_take_the_name(tmp_path: Path) -> None:
    (tmp_path / "digits" / "spills").mkdir(parents=True)
    with RunFolder.create(tmp_path, "digits", resume=False) as folder:
        assert folder.path.name == "digits"


def test_resume_takes_the_folder_of_that_name(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "digits", resume=False) as folder:
        folder.append_metrics(round_report(1))
    with RunFolder.create(tmp_path, "digits", resume=True) as folder:
        assert [report.round for report in folder.rounds()] == [1]


def test_a_service_takes_the_folder_of_that_name_and_begins_it_where_nothing_was_begun(tmp_path: Path) -> None:
    def create() -> RunFolder:
        return RunFolder.create(tmp_path, "digits", resume=False, or_begin=True)

    with create() as folder:
        assert folder.is_new
        with pytest.raises(ConfigError, match="another process uses"):
            create()
    assert list(tmp_path.iterdir()) == []  # nothing came of it
    with pytest.raises(asyncio.CancelledError), create():
        raise asyncio.CancelledError
    assert (tmp_path / "digits").exists()
    with create() as folder:
        assert folder.is_new
        (folder.checkpoint_path / "round-000000").mkdir(parents=True)
        folder.append_metrics(FINISHED)
        assert folder.finished() == FINISHED
        folder.append_metrics(WINDOW)
        assert folder.finished() is None  # it was resumed
    with create() as folder:
        assert not folder.is_new
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_resume_without_a_folder_lists_the_runs_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no run yet"):
        RunFolder.create(tmp_path / "none", "x", resume=True)
    for name in ("logs", "spills/digits"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("b", "a"):
        with RunFolder.create(tmp_path, name, resume=False) as folder:
            folder.append_commit({})
            folder.write_settings({})
    with pytest.raises(ConfigError, match=r"no run .*x to resume; .* has a, b$"):
        RunFolder.create(tmp_path, "x", resume=True)


def test_one_folder_has_one_writer(tmp_path: Path) -> None:
    first = RunFolder.create(tmp_path, "digits", resume=False)
    with pytest.raises(ConfigError, match=r"another process uses .*\.lock"):
        RunFolder.create(tmp_path, "digits", resume=True)
    first.close()
    RunFolder.create(tmp_path, "digits", resume=True).close()


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file"):
        RunFolder.create(tmp_path / "file", "digits", resume=False)


def test_what_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "digits", resume=False) as folder:
        for name in ("settings.json", "metrics.jsonl", "model.safetensors"):
            (folder.path / name).mkdir()
        with pytest.raises(StorageError, match=r"settings\.json"):
            folder.write_settings({})
        with pytest.raises(StorageError, match=r"metrics\.jsonl"):
            folder.append_metrics(WINDOW)
        with pytest.raises(StorageError, match=r"model\.safetensors"):
            folder.write_model({"w": torch.zeros(1)}, "")


def test_settings_are_plain_json(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "digits", resume=False) as folder:
        folder.write_settings({"runs": Path("runs"), "rounds": 3})
        assert json.loads((folder.path / "settings.json").read_text()) == {"runs": "runs", "rounds": 3}


def test_rounds_are_read_back_and_the_last_telling_of_a_round_counts(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "digits", resume=False) as folder:
        assert folder.rounds() == []
        redone = round_report(2, accuracy=0.5)
        for report in (round_report(1), WINDOW, round_report(2), redone):
            folder.append_metrics(report)
        assert folder.rounds() == [round_report(1), redone]


def test_a_torn_last_line_is_not_read_and_not_appended_to(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "digits", resume=False) as folder:
        folder.append_metrics(round_report(1))
        folder.append_commit({"version": 1})
        for name in ("metrics.jsonl", "ledger.jsonl"):
            with (folder.path / name).open("ab") as file:
                file.write(b'{"event":"rou')
        assert folder.rounds() == [round_report(1)]
    with RunFolder.create(tmp_path, "digits", resume=True) as folder:
        folder.append_metrics(round_report(2))
        folder.append_commit({"version": 2})
        assert folder.rounds() == [round_report(1), round_report(2)]
        ledger = folder.ledger_path.read_text().splitlines()
        assert [json.loads(line) for line in ledger] == [{"version": 1}, {"version": 2}]


def test_a_line_that_the_disk_took_in_part_is_appended_anew(tmp_path: Path) -> None:
    """Files of this process may be no longer than 20 bytes for a while, which is in the middle of the second line."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with RunFolder.create(tmp_path, "digits", resume=False) as folder:
        folder.append_commit({"version": 1}, sync=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        try:
            with pytest.raises(StorageError, match="File too large"):
                folder.append_commit({"version": 2}, sync=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)
        assert folder.ledger_path.stat().st_size == 20
        folder.append_commit({"version": 2}, sync=True)
        folder.append_commit({"version": 3})
        assert folder.commits() == [b'{"version":1}', b'{"version":2}', b'{"version":3}']
        folder.cut_commits(lambda line: b"2" in line)
        folder.append_commit({"version": 9})
        assert folder.commits() == [b'{"version":1}', b'{"version":2}', b'{"version":9}']


def test_the_model_loads_without_zsfl(tmp_path: Path) -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    state = {"w": weight, "tied": weight, "view": weight.T[1:], "steps": torch.tensor(3)}
    with RunFolder.create(tmp_path, "digits", resume=False) as folder:
        folder.write_model(state, "print('hello')")
        found = load_file(folder.path / "model.safetensors")
        assert set(found) == set(state)
        assert all(torch.equal(found[name], state[name]) for name in state)
        assert (folder.path / "load_model.py").read_text() == "print('hello')\n"
        assert not list(folder.path.glob(".*.tmp"))


@pytest.mark.parametrize("measured", [True, False])
def test_the_plot_is_a_readable_png(tmp_path: Path, measured: bool) -> None:
    with RunFolder.create(tmp_path, "digits", resume=False) as folder:
        folder.write_plot()
        assert not (folder.path / "plot.png").exists()
        for number in range(1, 4):
            value = 0.5 if measured else None
            folder.append_metrics(round_report(number, loss=value, accuracy=value))
        folder.write_plot()
        data = (folder.path / "plot.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1200, 504)


def test_the_model_may_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with RunFolder.create(tmp_path, "digits", resume=False) as folder:
        folder.write_model({"w": torch.zeros(1)}, "")
        modes = {path.stat().st_mode for path in (tmp_path / "usual", folder.path / "model.safetensors")}
    assert len(modes) == 1


def test_what_resume_goes_on_from_lies_in_the_folder(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "digits", resume=False) as folder:
        assert folder.checkpoint_path == folder.path / "checkpoint"
