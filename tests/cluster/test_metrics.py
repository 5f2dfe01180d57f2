"""What people's own tools read of real runs: Prometheus, TensorBoard, and those that the examples are for."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import write_job
from helpers.processes import Command, command
from helpers.waiting import HANG_S, POLL_S, eventually
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

import zsfl
from zsfl.errors import ConfigError
from zsfl.reports import AnyReport, Note

EXAMPLES = Path(__file__).resolve().parents[2] / "tools/examples"
Scraped = dict[str, Metric]


async def url_of(said: Command) -> str:
    """Where metrics are, once the command says so."""

    def urls() -> list[str]:
        return re.findall(r"metrics at (http://[0-9.:]+/metrics)", said.text)

    await eventually(lambda: urls() or said.process.returncode is not None)
    assert urls(), said.text
    return urls()[0]


def scrape(url: str) -> Scraped:
    with urllib.request.urlopen(url, timeout=HANG_S) as reply:  # noqa: S310
        assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return {family.name: family for family in text_string_to_metric_families(reply.read().decode())}


async def scraped(url: str, is_so: Callable[[Scraped], object]) -> Scraped:
    """What is served, once it is so."""
    async with asyncio.timeout(HANG_S):
        while not is_so(found := await asyncio.to_thread(scrape, url)):
            await asyncio.sleep(POLL_S)
    return found


def of_nodes(found: Scraped, name: str) -> dict[str, float]:
    return {sample.labels["node"]: sample.value for sample in found[name].samples}


def total(found: Scraped, name: str) -> float:
    return sum(sample.value for sample in found[name].samples)


async def test_a_local_cluster_is_served_at_one_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = write_job(tmp_path, rounds=100_000)
    monkeypatch.setenv("ZSFL_METRICS", "0")  # the nodes themselves serve nothing
    async with command("up", job, "--no-mdns", "--in-process", cwd=tmp_path) as up:
        url = await url_of(up)
        everybody = {"aggregator": 1, "split-server-0": 1, "split-server-1": 1, "client-0": 1, "client-1": 1}
        told = ("zsfl_round_steps", "zsfl_test_version", "zsfl_run_version", "zsfl_run_rounds")
        found = await scraped(
            url, lambda now: of_nodes(now, "zsfl_node_up") == everybody and all(total(now, name) for name in told)
        )
        roles = {sample.labels["node"]: sample.labels["role"] for sample in found["zsfl_node_up"].samples}
        assert roles["split-server-0"] == "split-server"
        assert {sample.labels["client"] for sample in found["zsfl_client_test_accuracy_ratio"].samples} == {
            "client-0", "client-1",
        }  # fmt: skip
        assert total(found, "zsfl_run_rounds") == 100_000
        assert 0 <= total(found, "zsfl_test_accuracy_ratio") <= 1
        assert up.text.count("metrics at") == 1
        steps = of_nodes(await scraped(url, lambda now: of_nodes(now, "zsfl_steps").get("client-0")), "zsfl_steps")
        assert steps["aggregator"] == 0
        later = await scraped(url, lambda now: of_nodes(now, "zsfl_steps").get("client-0", 0) > steps["client-0"])
        assert total(later, "zsfl_run_version") >= total(found, "zsfl_run_version")
        up.signal(signal.SIGINT)
        await up.ended()


async def test_each_node_serves_its_own(tmp_path: Path) -> None:
    job = write_job(tmp_path, rounds=100_000, shards=1)
    flags = ("--no-mdns", "--metrics", "0")
    async with command("node", "aggregator", job, *flags, cwd=tmp_path) as aggregator:
        peer = ("--peer", await aggregator.address())
        async with (
            command("node", "split-server", job, *flags, *peer, cwd=tmp_path) as server,
            command("node", "client", job, *flags, *peer, "--shard", "0", cwd=tmp_path) as client,
        ):
            told = ("zsfl_test_version", "zsfl_run_version", "zsfl_train_loss")
            found = await scraped(
                await url_of(aggregator),
                lambda now: total(now, "zsfl_node_peers") == 2 and all(total(now, name) for name in told),
            )
            if sys.platform == "linux":
                assert total(found, "process_resident_memory_bytes") > 1 << 20
            counted = ("zsfl_steps", "zsfl_spills", "zsfl_spilled_bytes", "zsfl_sent_bytes", "zsfl_node_up")
            for one, role in ((server, "split-server"), (client, "client")):
                found = await scraped(await url_of(one), lambda now: all(total(now, name) for name in counted))
                assert [sample.labels["role"] for sample in found["zsfl_node_up"].samples] == [role]
                assert not found["zsfl_run_version"].samples, "which is for the aggregator to say"


async def test_a_port_that_is_taken_ends_what_wanted_it(tmp_path: Path) -> None:
    said: list[AnyReport] = []
    job = zsfl.load_job(write_job(tmp_path, rounds=1))
    common: dict[str, Any] = {"in_process": True, "runs": tmp_path / "runs"}
    async with zsfl.LocalCluster(job, metrics="0", on_report=said.append, **common):
        (note,) = [report for report in said if isinstance(report, Note) and "metrics at" in report.message]
        port = note.message.rpartition(":")[2].partition("/")[0]
        with pytest.raises(ConfigError, match=f"cannot serve metrics at 127.0.0.1:{port} "):
            async with zsfl.LocalCluster(job, metrics=port, **common):
                pass


async def trained(tmp_path: Path, rounds: int, **settings: Any) -> Path:
    job = zsfl.load_job(write_job(tmp_path, rounds=rounds))
    where: dict[str, Any] = {"in_process": True, "runs": tmp_path / "runs", "rounds": rounds}
    async with zsfl.LocalCluster(job, **where, **settings) as cluster:
        async for _ in cluster.train():
            pass
    assert cluster.result
    return Path(cluster.result.folder)


async def test_tensorboard_reads_the_curves_also_of_a_run_that_was_resumed(tmp_path: Path) -> None:
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed"
    )

    def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
        read = accumulators.EventAccumulator(str(folder / "tensorboard"))
        read.Reload()
        return {tag: [(one.step, one.value) for one in read.Scalars(tag)] for tag in read.Tags()["scalars"]}

    folder = await trained(tmp_path, 2)
    assert not (folder / "tensorboard").exists()
    await trained(tmp_path, 3, resume=True, tensorboard=True)
    await trained(tmp_path, 4, resume=True, tensorboard=True)
    run, found = zsfl.read_run(folder), await asyncio.to_thread(curves, folder)
    assert len(run.rounds) == 4
    assert {"round/train_loss", "round/test_accuracy", "round/steps_per_s", "version/test_loss"} <= found.keys()
    assert {"clients/client-0", "clients/client-1"} <= found.keys()
    assert found["version/test_loss"] == [(one.version, pytest.approx(one.loss)) for one in run.tests]
    assert found["clients/client-1"] == [(one.version, pytest.approx(one.clients["client-1"])) for one in run.tests]
    losses = [(one.version, pytest.approx(one.losses["client-1"])) for one in run.tests]
    assert found["clients_test_loss/client-1"] == losses
    in_training = [(one.round, pytest.approx(one.train_losses["client-1"])) for one in run.rounds]
    assert found["clients_train_loss/client-1"] == in_training
    assert found["round/steps_per_s"][-1] == (4, pytest.approx(run.rounds[-1].steps_per_s))
    assert [step for step, _ in found["round/train_loss"]] == [1, 2, 3, 4]


async def test_without_tensorboard_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsfl.aggregator.curves.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install 'tensorboard"):
        await trained(tmp_path, 1, tensorboard=True)


MLFLOW = """
import contextlib, json

def said(what):
    def say(*args, **kwargs):
        with open("said.jsonl", "a") as file:
            file.write(json.dumps([what, args, kwargs]) + "\\n")
    return say

set_experiment, log_metrics, log_params, log_artifact = map(said, ("experiment", "metrics", "params", "artifact"))
start_run = contextlib.nullcontext
"""
WANDB = """
import contextlib, json

class Run:
    def __init__(self, config):
        self.summary = {}
        self.said = [["config", config]]
    def define_metric(self, name, step_metric):
        self.said.append(["step", name, step_metric])
    def log(self, values):
        self.said.append(["log", values])
    def __enter__(self):
        return self
    def __exit__(self, *_):
        with open("said.jsonl", "w") as file:
            file.writelines(json.dumps(one) + "\\n" for one in [*self.said, ["summary", self.summary]])

def init(project, name, config):
    return Run(config)
"""


async def example(name: str, *args: str | Path, module: str, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What an example tells a module that stands in for the one it is for, which is too large for these tests."""
    (cwd / "modules").mkdir()
    (cwd / "modules" / f"{name.partition('_')[0]}.py").write_text(module)
    paths = [str(cwd / "modules"), *sys.path]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    async with command(*args, cwd=cwd, run=(str(EXAMPLES / name),)) as running:
        assert await running.ended() == 0, running.text
    return [json.loads(line) for line in (cwd / "said.jsonl").read_text().splitlines()]


async def test_the_example_for_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = write_job(tmp_path)
    said = await example(
        "mlflow_run.py", job, "--rounds", "2", "--clients", "1", module=MLFLOW, cwd=tmp_path, monkeypatch=monkeypatch
    )
    rounds = [one for one in said if one[0] == "metrics" and "train_loss" in one[1][0]]
    assert [one[2]["step"] for one in rounds] == [1, 2]
    assert {"train_loss", "test_loss", "test_accuracy", "steps_per_s", "bytes_sent"} == rounds[0][1][0].keys()
    assert any("accuracy_of/client-0" in one[1][0] for one in said if one[0] == "metrics")
    assert next(one[1][0] for one in said if one[0] == "params")["shards"] == 1
    assert [Path(one[1][0]).name for one in said if one[0] == "artifact"][-1] == "load_model.py"


async def test_the_example_for_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = await trained(tmp_path, 2)
    said = await example("wandb_run.py", folder, module=WANDB, cwd=tmp_path, monkeypatch=monkeypatch)
    logged = [one[1] for one in said if one[0] == "log"]
    assert [one["by_round/train_loss"] for one in logged if "round" in one] == [
        one.train_loss for one in zsfl.read_run(folder).rounds
    ]
    assert all("by_version/client-0" in one for one in logged if "version" in one)
    assert said[0][1]["name"] == "tiny"
    assert said[-1][1]["state"] == "finished"
