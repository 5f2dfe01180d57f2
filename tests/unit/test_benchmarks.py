"""The parts of the benchmarks that need no cluster: what is asked, the figures, the table and the plots."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import zsfl

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
HELPERS = ("learning", "_curves", "_record")
ABOUT = {
    "date": "2030-01-02T03:04:05",
    "command": "python x",
    "commit": "abc",
    "versions": {"zsfl": "0"},
    "machine": {"processor": "p", "cores": 2, "load before": 0.0},
}


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The benchmark as a module, keeping its results elsewhere."""
    monkeypatch.syspath_prepend(FOLDER)
    module: Any = importlib.import_module("learning")
    monkeypatch.setattr(importlib.import_module("_record"), "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "circumstances", lambda: ABOUT)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)
    for name in HELPERS:
        sys.modules.pop(name)


def curve(learning: Any, name: str, ends: list[float], *, clients: int = 4, seed: int = 0, pace_s: float = 1.0) -> Any:
    points = [learning.Point(number, number * pace_s, end) for number, end in enumerate(ends, 1)]
    return learning.Curve(name, seed, clients, points=points, ends=ends, steps_per_s=8.0)


def comparison(learning: Any, **changes: Any) -> Any:
    what = {"title": "T", "job": Path("job.py"), "names": ["exact", "fedavg"], "clients": [4], "rounds": 4}
    return learning.Comparison(**{**what, "seeds": [0], "target": 0.9, **changes})


def rows(page: str) -> dict[str, list[str]]:
    """Cells by the first one of their row."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines[2:]}


def test_a_curve_knows_its_target_and_its_largest_drop(learning: Any) -> None:
    up_and_down = curve(learning, "exact", [0.9, 0.2, 0.8, 0.95, 0.7, 0.9, 0.85])
    assert up_and_down.final == 0.85
    assert up_and_down.drop == pytest.approx(0.25)  # what happens before the third round is let be
    assert up_and_down.reached(0.93).round == 4
    assert up_and_down.reached(0.99) is None
    assert curve(learning, "exact", [0.9, 0.1]).drop == 0


def test_the_table_compares_with_the_first(learning: Any) -> None:
    slow = curve(learning, "exact", [0.5, 0.8, 0.9, 0.92], pace_s=10.0)
    quick = curve(learning, "fedavg", [0.5, 0.91, 0.93, 0.9])
    slow.late, slow.dropped = 7, 2
    found = rows(comparison(learning).page([slow, quick], "t.png"))
    assert found["exact"] == ["92.00%", "+0.00", "92.00%", "0.00", "3.0", "30.0", "1.00", "8", "7 / 2", ""]
    assert found["fedavg"] == ["90.00%", "-2.00", "93.00%", "3.00", "2.0", "2.0", "15.00", "8", "", ""]


def test_of_several_seeds_the_table_has_the_median_and_the_spread(learning: Any) -> None:
    runs = [curve(learning, "exact", [end], seed=seed) for seed, end in enumerate([0.91, 0.95, 0.80])]
    page = comparison(learning, names=["exact"], seeds=[0, 1, 2]).page(runs, "t.png")
    assert "median (lowest to highest of the seeds)" in page
    final, _, _, _, rounds, *_ = rows(page)["exact"]
    assert final == "91.00% (80.00% to 95.00%)"
    assert rounds == "-"  # one of them never got there


def test_numbers_of_clients_have_rows_of_their_own(learning: Any) -> None:
    runs = [
        curve(learning, name, [end], clients=clients)
        for clients, name, end in ((5, "exact", 0.9), (5, "fedavg", 0.8), (10, "exact", 0.7), (10, "fedavg", 0.8))
    ]
    found = rows(comparison(learning, clients=[5, 10]).page(runs, "t.png"))
    assert [found[f"fedavg, {clients} clients"][1] for clients in (5, 10)] == ["-10.00", "+10.00"]


@pytest.mark.parametrize("clients", [[4], [5, 10, 20]])
def test_no_two_lines_look_the_same(learning: Any, clients: list[int], tmp_path: Path) -> None:
    names = [*learning.MODES, *learning.baselines.BASELINES] if len(clients) == 1 else ["exact", "merged", "local"]
    runs = [
        curve(learning, name, [0.1, 0.5 + 0.03 * number], clients=count)
        for count in clients
        for number, name in enumerate(names)
    ]
    curves: Any = importlib.import_module("_curves")
    styles = curves._styles(curves.grouped(runs), learning.MODES)
    assert len({(style["color"], style.get("dashes")) for style in styles.values()}) == len(runs)
    assert {label for label, style in styles.items() if "dashes" not in style} == {
        label for label in styles if label.split(",")[0] in learning.MODES
    }
    learning.draw(tmp_path / "plot.png", "T", runs, learning.MODES, 0.95)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job file that imports the one it changes, as those of the benchmarks do."""
    (tmp_path / "plain.py").write_text("from test_benchmarks_job import job\n")
    module: Any = type(sys)("test_benchmarks_job")
    module.job = zsfl.Job(
        name="plain",
        model=lambda: zsfl.SplitModel(head=nn.Linear(4, 4), body=nn.Tanh(), tail=nn.Linear(4, 3)),
        loss=F.cross_entropy,
        data=_shard,
        optimizer=zsfl.sgd(lr=0.5),
        batch_size=8,
        rounds=3,
        shards=2,
    )
    monkeypatch.setitem(sys.modules, "test_benchmarks_job", module)
    return tmp_path / "plain.py"


def _shard(shard: int, shards: int) -> tuple[TensorDataset, TensorDataset]:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(shard))
    data = TensorDataset(x, x[:, :3].argmax(1))
    return data, data


def test_a_job_is_run_with_some_fields_changed(learning: Any, job: Path, tmp_path: Path) -> None:
    changed = zsfl.load_job(learning.wrapped(job, tmp_path, {"seed": 5, "evaluate_every": None}))
    assert changed == dataclasses.replace(zsfl.load_job(job), seed=5)


def test_one_command_leaves_table_plots_and_figures(
    learning: Any, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [str(job), "--compare", "centralised", "fedavg", "--clients", "2", "3", "--seeds", "0", "1"]
    assert learning.main([*asked, "--target", "0.2"]) == 0
    kept = tmp_path / "results"
    names = {f"2030-01-02-learning-plain.{kind}" for kind in ("json", "md", "png")}
    assert {path.name for path in kept.iterdir()} == names
    page = (kept / "2030-01-02-learning-plain.md").read_text()
    assert set(rows(page)) == {f"{name}, {clients} clients" for name in ("centralised", "fedavg") for clients in (2, 3)}
    assert "![plots](2030-01-02-learning-plain.png)" in page
    assert page.split("\n\n")[2] in capsys.readouterr().out
    (run,) = json.loads((kept / "2030-01-02-learning-plain.json").read_text())["runs"]
    assert (run["job"], len(run["curves"]), len(run["curves"][0]["ends"])) == ("plain.py", 8, 3)


def test_a_baseline_is_tuned_as_far_as_that_helps(learning: Any, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []

    def pretended(job: zsfl.Job, name: str, rounds: int, rate: float = 1.0) -> Any:
        tried.append(rate)
        return curve(learning, name, [{0.01: 0.2, 0.1: 0.7, 1: 0.5, 10: 0.495, 100: 0.6}[round(rate, 3)]])

    monkeypatch.setattr(learning, "RATE_STEP", 10.0)
    monkeypatch.setattr(learning, "run_baseline", pretended)
    given, best = learning.run_tuned(zsfl.load_job(job), "fedavg", 3)
    assert tried == [1, 0.1, pytest.approx(0.01), 10]
    assert (given.final, best.final) == (0.5, 0.7)
    assert (given.name, best.name) == ("fedavg", "fedavg, tuned")
    assert [one.name for one in learning.pictured([given, best])] == ["fedavg, tuned"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--compare", "exact"], "name the job file that --compare is for"),
        (["{job}", "--compare", "exact", "fedavgg"], "cannot compare fedavgg: use some of exact, elastic, async"),
        (["nowhere.py"], "there is no job file"),
    ],
)
def test_what_cannot_be_asked_is_said(
    learning: Any, job: Path, asked: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = learning.main([word.format(job=job) for word in asked])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert said in capsys.readouterr().err


def test_the_scenarios_are_jobs_that_load(learning: Any) -> None:
    scenarios = learning.suite([0], 0.95)
    loaded = [zsfl.load_job(one.job).name for one in scenarios]
    assert loaded == ["mnist-sizes", "mnist-labels", "mnist-skewed", "mnist-slow-client"]
    known = {*learning.MODES, *learning.baselines.BASELINES}
    assert all(set(one.names) <= known for one in scenarios)


def test_each_scenario_is_kept_as_soon_as_it_is_done(
    learning: Any, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Any) -> list[Any]:
        if self.title == "broken":
            raise zsfl.ConfigError("broken")
        return [curve(learning, "exact", [0.9])]

    monkeypatch.setattr(learning.Comparison, "run", run)
    asked = [comparison(learning, job=job, title=title) for title in ("one", "two", "broken")]
    with pytest.raises(zsfl.ConfigError):
        learning.keep(asked, "all", ABOUT, {"more": 1})
    kept = {path.name: path for path in (tmp_path / "results").iterdir()}
    assert set(kept) == {f"2030-01-02-all{end}" for end in (".json", ".md", "-1.png", "-2.png")}
    assert json.loads(kept["2030-01-02-all.json"].read_text())["more"] == 1
    assert [line for line in kept["2030-01-02-all.md"].read_text().splitlines() if line.startswith("## ")] == [
        "## one",
        "## two",
    ]
