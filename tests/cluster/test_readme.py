"""What README.md shows works: its programs run, its commands parse, its files are there."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import zsfl
from zsfl.cli import parser
from zsfl.cluster.lan import read_lan
from zsfl.ids import Role
from zsfl.settings import NODE_FLAGS, add_flags, load_settings

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """Arguments of every command line that starts with `program`."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")]


PROGRAMS = {re.search(r"\A# (\w+\.py)", block): block for block in blocks("python")}
NAMED = {found[1]: block for found, block in PROGRAMS.items() if found}


def test_every_python_block_is_a_program_with_a_name() -> None:
    assert len(NAMED) == len(blocks("python")) > 3


@pytest.mark.parametrize("line", commands("zsfl"), ids=" ".join)
def test_commands_parse(line: list[str]) -> None:
    parser().parse_args(line)


@pytest.mark.parametrize("line", commands("python"), ids=" ".join)
def test_programs_that_are_started_by_path_exist_and_take_these_flags(line: list[str]) -> None:
    path, *flags = line
    if path in NAMED:
        return
    assert (ROOT / path).is_file()
    role = {"client": Role.CLIENT, "split_server": Role.SPLIT_SERVER, "aggregator": Role.AGGREGATOR}.get(
        Path(path).stem
    )
    if role is not None:
        taken = argparse.ArgumentParser()
        add_flags(taken, NODE_FLAGS[role])
        taken.parse_args(flags)


def test_the_settings_file_is_read(tmp_path: Path) -> None:
    lan, file = blocks("toml")
    (tmp_path / "lan.toml").write_text(lan, encoding="utf-8")
    assert read_lan(tmp_path / "lan.toml").shards == 5
    (tmp_path / "zsfl.toml").write_text(file, encoding="utf-8")
    assert load_settings({}, {}, tmp_path / "zsfl.toml").threads == 4


def test_make_targets_exist() -> None:
    targets = {line.split(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if re.match(r"\w+:", line)}
    assert {target for (target, *_) in commands("make")} <= targets


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds all programs of the README, and is where they run."""
    for name, block in NAMED.items():
        (tmp_path / name).write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


JOBS = [name for name, block in NAMED.items() if re.search(r"^job = ", block, re.MULTILINE)]


@pytest.mark.parametrize("name", JOBS)
async def test_jobs_train(name: str, written: Path) -> None:
    async with zsfl.LocalCluster(name, clients=2, split_servers=1, in_process=True) as cluster:
        assert [report.round async for report in cluster.train(rounds=1)] == [1]


def test_the_program_with_a_cluster_runs_and_its_model_loads_without_zsfl(written: Path) -> None:
    runpy.run_path("train.py", run_name="__main__")
    folder = written / "runs" / "my-job"
    for name in ("settings.json", "metrics.jsonl", "ledger.jsonl", "plot.png", "checkpoint"):
        assert (folder / name).exists()
        assert name in README
    load = "import sys; sys.modules['zsfl'] = None; exec(open('load_model.py').read())"
    ran = subprocess.run(
        [sys.executable, "-c", f"import torch; {load}; print(model(torch.zeros(1, 64)).shape)"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "torch.Size([1, 10])\n"


def test_other_programs_run(written: Path) -> None:
    for name in NAMED.keys() - JOBS - {"train.py"}:
        runpy.run_path(name, run_name="__main__")
