"""What the benchmarks share: figures, the lot and its table, two commits by turns, and the peers to compare with."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.waiting import HANG_S

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = ("run", "compare", "transport", "_figures", "_record", "peers", "peers.program")

BENCHMARK = """
import argparse, sys
sys.path.insert(0, {folder!r})
from _figures import Figure, add_json_flag, hand_over
{stated}
parser = argparse.ArgumentParser()
parser.add_argument("--value", type=float, default=1.0)
add_json_flag(parser)
args = parser.parse_args()
{body}
hand_over(args.json, "it", {{}}, [
    Figure(name="speed", unit="a/s", values=(args.value, 2 * args.value, 9.0), target=1.5),
    Figure(name="time", unit="s", values=(3.0,), better="lower", target=2.0),
    Figure(name="aside", unit="s", values=(3.0,), headline=False),
])
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The modules of the benchmarks, keeping their results elsewhere."""
    monkeypatch.syspath_prepend(FOLDER)
    found = {name: importlib.import_module(name) for name in MODULES}
    monkeypatch.setattr(found["_record"], "RESULTS", tmp_path / "results")
    yield SimpleNamespace(**{name.strip("_").replace(".", "_"): module for name, module in found.items()})
    for name in [name for name in sys.modules if name in MODULES or name.startswith("peers.")]:
        sys.modules.pop(name)


def write(folder: Path, name: str, stated: str = "BUDGET_S = 60", body: str = "") -> None:
    (folder / f"{name}.py").write_text(BENCHMARK.format(folder=str(FOLDER), stated=stated, body=body))


def rows(page: str) -> list[list[str]]:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    return lines[2:]


# --- figures ---------------------------------------------------------------------------------------------


def test_figures_come_back_as_they_were_handed_over(bench: Any, tmp_path: Path) -> None:
    figure = bench.figures.Figure(name="n", unit="s", values=(1.0, 5.0, 2.0), better="lower", target=2.0)
    bench.figures.hand_over(tmp_path / "f.json", "it", {"commit": "abc"}, [figure])
    handed = bench.figures.taken(tmp_path / "f.json")
    assert (handed.benchmark, handed.about, handed.figures) == ("it", {"commit": "abc"}, (figure,))
    assert (figure.median, figure.met) == (2.0, True)
    bench.figures.hand_over(None, "it", {}, [figure])


@pytest.mark.parametrize(
    ("values", "better", "target", "met"),
    [
        ((1, 2, 3), "higher", 2, True),
        ((1, 2, 3), "higher", 2.1, False),
        ((1, 2, 3), "lower", 1.9, False),
        ((1,), "lower", None, None),
    ],
)
def test_the_median_is_what_meets_a_target(bench: Any, values: Any, better: str, target: Any, met: bool | None) -> None:
    assert bench.figures.Figure(name="n", unit="", values=values, better=better, target=target).met is met


# --- the lot ---------------------------------------------------------------------------------------------


def test_all_budgets_together_are_within_ten_minutes(bench: Any) -> None:
    known = {entry.path.stem: entry for entry in bench.run.entries(FOLDER)}
    assert {"mnist", "startup", "transport"} <= {name for name, entry in known.items() if entry.budget_s}
    assert known["learning"].budget_s is None
    assert sum(entry.budget_s or 0 for entry in known.values()) <= bench.run.LOT_S


def test_the_lot_ends_with_one_table(bench: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "first", 'BUDGET_S = 60\nIN_THE_LOT = ("--value", "4")')
    write(tmp_path, "second")
    write(tmp_path, "longest", stated="")
    assert bench.run.main([], tmp_path) == 0
    said = capfd.readouterr().out
    assert rows(said) == [
        ["first", "speed", "8", "a/s", "4 to 9", ">= 1.5", "yes"],
        ["first", "time", "3", "s", "", "<= 2", "NO"],
        ["second", "speed", "2", "a/s", "1 to 9", ">= 1.5", "yes"],
        ["second", "time", "3", "s", "", "<= 2", "NO"],
    ]
    assert "Not of the lot, as they take longer: longest.py" in said
    assert {path.suffix for path in (tmp_path / "results").iterdir()} == {".json", ".md"}


def test_benchmarks_can_be_named(bench: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "first")
    write(tmp_path, "longest", stated="")
    assert bench.run.main(["longest"], tmp_path) == 0
    assert {row[0] for row in rows(capfd.readouterr().out)} == {"longest"}
    assert bench.run.main(["third"], tmp_path) == 2
    assert "no benchmark 'third': use first, longest" in capfd.readouterr().err


def test_what_breaks_is_said_and_the_others_are_measured(
    bench: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "broken", body="sys.exit(3)")
    write(tmp_path, "fine")
    write(tmp_path, "silent", body="sys.exit(0)")
    assert bench.run.main([], tmp_path) == 1
    said = capfd.readouterr()
    assert [row[1] for row in rows(said.out)][:3] == ["ended with exit code 3", "speed", "time"]
    assert "broken.py ended with exit code 3" in said.err
    assert "silent.py handed over no figures" in said.err


def test_over_its_budget_it_and_all_it_started_are_stopped(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "pid"
    child = f"import os, time; open({str(here)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    body = f"import subprocess, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n"
    body += f"import os\nwhile not os.path.exists({str(here)!r}) or not open({str(here)!r}).read(): time.sleep(0.01)\n"
    write(tmp_path, "endless", "BUDGET_S = 0.5", body + "time.sleep(600)")
    (entry,) = bench.run.entries(tmp_path)
    wait = subprocess.Popen.wait

    def once_it_has_begun(process: Any, timeout: float | None = None) -> int:
        while not (here.exists() and here.read_text()):
            time.sleep(0.01)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", once_it_has_begun)
    outcome = bench.run.run(entry, entry.budget_s)
    assert outcome.failure == "stopped after 0.5 s, its budget"
    until_s = time.monotonic() + HANG_S
    while Path(f"/proc/{here.read_text()}").exists() and _state(here.read_text()) != "Z":
        assert time.monotonic() < until_s
        time.sleep(0.01)


def _state(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


# --- two commits -----------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits of a zsfl that consists of one number, and a benchmark that reads it."""
    root = tmp_path / "repository"
    (root / "zsfl").mkdir(parents=True)
    (root / "benchmarks").mkdir()
    for name in ("_figures.py", "_record.py"):
        (root / "benchmarks" / name).write_text((FOLDER / name).read_text())
    _git(root, "init", "-q", "-b", "main")
    for number in (2, 6):
        (root / "zsfl" / "__init__.py").write_text(f"SPEED = {number}\n")
        write(root / "benchmarks", "it", body="import zsfl\nargs.value *= zsfl.SPEED")
        _git(root, "add", "-A")
        _git(root, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", str(number))
    return root


def _git(root: Path, *order: str) -> str:
    return subprocess.run(["git", "-C", str(root), *order], check=True, capture_output=True, text=True).stdout


def test_two_commits_are_measured_by_turns(bench: Any, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["it", "main~1", "main", "--times", "3", "--", "--value", "0.5"]
    assert bench.compare.main(asked, repository) == 0
    said = capsys.readouterr()
    assert rows(said.out) == [
        ["speed", "a/s", "2", "6", "3.000 (3.000 to 3.000)", "better"],
        ["time", "s", "3", "3", "1.000 (1.000 to 1.000)", ""],
        ["aside", "s", "3", "3", "1.000 (1.000 to 1.000)", ""],
    ]
    assert len(_git(repository, "worktree", "list").splitlines()) == 1


def test_the_present_benchmarks_measure_both_unless_each_is_to_use_its_own(
    bench: Any, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(repository / "benchmarks", "it", body="import zsfl\nargs.value *= 10 * zsfl.SPEED")
    assert bench.compare.main(["it", "main~1", "main", "--times", "1"], repository) == 0
    assert rows(capsys.readouterr().out)[0][2:4] == ["20", "60"]
    assert bench.compare.main(["it", "main~1", "main", "--times", "1", "--own-code"], repository) == 0
    assert rows(capsys.readouterr().out)[0][2:4] == ["4", "9"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["it", "main", "nowhere"], "cannot check out nowhere"),
        (["they", "main", "main"], "they failed with exit code 2"),
        (["it", "main", "main", "--", "--speed"], "unrecognized arguments: --speed"),
    ],
)
def test_what_cannot_be_compared_is_said(
    bench: Any, repository: Path, asked: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.compare.main(asked, repository) == 1
    assert said in capsys.readouterr().err
    assert len(_git(repository, "worktree", "list").splitlines()) == 1


@pytest.mark.parametrize(
    ("ratios", "better", "said"),
    [
        ([1.1, 1.2, 1.3], "higher", "better"),
        ([1.1, 1.2, 1.3], "lower", "worse"),
        ([0.9, 0.8, 0.7], "lower", "better"),
        ([0.9, 1.2, 1.3], "higher", ""),
        ([1.5, 1.6], "higher", ""),
    ],
)
def test_a_verdict_takes_three_pairs_that_agree(bench: Any, ratios: list[float], better: str, said: str) -> None:
    figure = bench.figures.Figure(name="n", unit="", values=(1.0,), better=better)
    assert bench.compare.verdict(ratios, figure) == said


# --- peers -----------------------------------------------------------------------------------------------

NEEDS = {
    "zsfl_wire": [],
    "bare_zmq": [],
    "streams": [],
    "grpc_aio": ["grpc"],
    "http_bytes": ["fastapi", "httpx", "httptools", "uvicorn", "uvloop"],
}


@pytest.mark.parametrize("name", NEEDS)
async def test_every_peer_sends_back_what_it_is_sent(bench: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS[name]:
        pytest.importorskip(package)
    assert set(NEEDS) == set(bench.transport.CONTESTANTS)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    async with bench.peers_program.started(name) as (asker, server):
        payloads = [os.urandom(size) for size in (1, 1 << 14, 5 << 20)]
        assert [bytes(await asker.ask(payload)) for payload in payloads] == payloads
        took = await bench.transport.ask_for(asker, server, payloads[1], 8, 0.0)
        assert took.answers_per_s > 0
    assert not Path(f"/proc/{server}").exists()
