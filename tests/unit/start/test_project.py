"""`zsfl new`: what it writes is right, and overwrites nothing. That it trains: tests/cluster/test_new.py."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import zsfl
from zsfl.cli import main
from zsfl.settings import NodeSettings, load_settings


def test_it_writes_a_job_named_after_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "My first_Job!"
    assert main(["new", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [".gitignore", "job.py", "zsfl.toml"]
    assert f"cd '{folder}'\n  zsfl up job.py" in capsys.readouterr().out
    job = zsfl.load_job(folder / "job.py")
    assert job.name == "my-first-job"
    (x, y), (_, held_out) = (dataset[0] for dataset in job.data(0, job.shards) if dataset is not None)
    assert x.shape == (64,)
    assert y.dtype == held_out.dtype
    assert "/runs/" in (folder / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("name", ["Spills", "..."])
def test_a_folder_that_no_job_can_be_called_after(name: str, tmp_path: Path) -> None:
    assert main(["new", str(tmp_path / name)]) == 0
    assert zsfl.load_job(tmp_path / name / "job.py").name == "my-job"


def test_its_settings_are_what_holds_anyway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", "."]) == 0
    assert load_settings({}, {}) == NodeSettings()
    text = Path("zsfl.toml").read_text()
    shown = tomllib.loads("\n".join(re.findall(r"^# (\w+ = .*)$", text, re.MULTILINE)))
    assert {"threads", "device", "host", "peers"} <= shown.keys()
    Path("zsfl.toml").write_text(re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE))
    assert load_settings({}, {}) == NodeSettings()


@pytest.mark.parametrize("name", ["job.py", "zsfl.toml"])
def test_it_overwrites_nothing(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text("mine")
    assert main(["new", str(tmp_path)]) == 2
    assert f"has {name} already, and nothing is overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_it_puts_no_job_among_runs_nor_in_the_place_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "night"
    run.mkdir(parents=True)
    (run / "settings.json").write_text('{"job": {}}')
    (tmp_path / ".vscode").mkdir()
    (tmp_path / ".vscode" / "settings.json").write_text("{}")
    (tmp_path / "notes").write_text("mine")
    for folder, what in (
        (run.parent, "is the folder of runs (night), and no place for a job"),
        (run, "is the folder of the run night, and no place for a job"),
        (tmp_path / "notes", "is a file: name a folder"),
    ):
        assert main(["new", str(folder)]) == 2
        assert f"{folder} {what}" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["settings.json"]
    assert main(["new", str(tmp_path)]) == 0


def test_the_gitignore_of_a_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".gitignore").write_text("mine\n")
    assert main(["new", str(tmp_path)]) == 0
    assert ".gitignore  that it had before: add a line /runs/ to it" in capsys.readouterr().out
    assert (tmp_path / ".gitignore").read_text() == "mine\n"


def test_where_nothing_can_be_written_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["new", str(tmp_path / "file" / "mine")]) == 1
    assert "cannot write" in capsys.readouterr().err
