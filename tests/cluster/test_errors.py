"""What the command line says when something is wrong, and with which exit code."""

from __future__ import annotations

import re
import secrets
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.jobs import write_job
from helpers.processes import command
from helpers.waiting import until
from safetensors.torch import load_file

import zsfl
from zsfl.cli import main
from zsfl.cluster.processes import ProcessSpawner
from zsfl.cluster.spawner import NodeCommand
from zsfl.ids import Role
from zsfl.reports import Failed

Said = Callable[..., tuple[int, str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Said:
    """Run the command in this process: its exit code, and its last line on standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str | Path) -> tuple[int, str]:
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as error:
            code = int(error.code or 0)
        lines = capsys.readouterr().err.splitlines()
        assert "Traceback" not in "".join(lines)
        return code, lines[-1] if lines else ""

    return run


@pytest.mark.parametrize("args", [("up",), ("node", "aggregator"), ("up", "--clients", "2")])
def test_no_job_file(said: Said, args: tuple[str, ...]) -> None:
    code, error = said(*args, "nowhere.py")
    assert code == 2
    assert "there is no job file" in error
    assert "nowhere.py" in error


@pytest.mark.parametrize(
    ("args", "text", "message"),
    [
        (("up",), "import nothing_of_the_kind", "cannot be imported: ModuleNotFoundError"),
        (("up",), "import zsfl", "has no `job`: add a line"),
        (("node", "aggregator"), "import zsfl", "has no `job`: add a line"),
        # Here it is the nodes that find out.
        (("up", "--clients", "1", "--split-servers", "1"), "import zsfl", "has no `job`: add a line"),
    ],
)
def test_a_job_file_that_will_not_do(
    said: Said, tmp_path: Path, args: tuple[str, ...], text: str, message: str
) -> None:
    (tmp_path / "job.py").write_text(text)
    code, error = said(*args, "job.py")
    assert (code, message in error) == (2, True), error
    assert "job.py" in error


@pytest.mark.parametrize(
    ("text", "message", "code"),
    [("import nothing_of_the_kind", "No module named", 2), ("", "no `job`", 2), ("DATA", "out of luck", 1)],
)
def test_a_mistake_is_told_once(
    text: str, message: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = write_job(tmp_path)
    broken = job.read_text().replace("    draw = torch", "    raise OSError('out of luck')\n    draw = torch")
    job.write_text(broken if text == "DATA" else text)
    assert main(["up", str(job), "--clients", "2", "--runs", str(tmp_path / "runs"), "--no-mdns"]) == code
    said = capsys.readouterr()
    assert (said.out + said.err).count(message) == 1, said
    assert said.err.startswith("zsfl: ")
    assert "ended with exit code" not in said.out
    if text == "DATA":
        own = next(number for number, line in enumerate(job.read_text().splitlines(), 1) if "out of luck" in line)
        end = rf"\({job}, line {own}\); its log has the traceback: \S+/logs/(\S+)\.log\n$"
        found = re.search(end, said.err)
        assert found, said.err
        log = tmp_path / "runs" / "logs" / f"{found[1]}.log"
        assert log.read_text().endswith(f"zsfl: OSError: out of luck ({job}, line {own})\n")


def test_a_label_that_is_no_class_is_told_with_its_shard(said: Said, tmp_path: Path) -> None:
    job = write_job(tmp_path)
    job.write_text(
        job.read_text().replace("    return torch.utils.data", "    y[20] = 3 + shard\n    return torch.utils.data")
    )
    code, error = said("up", job, "--in-process", "--runs", tmp_path / "runs")
    assert code == 2
    assert re.search(r"in shard [01] the label [34] is there, and the model gives 3 classes, 0 to 2", error), error


def test_parts_that_do_not_fit_are_found_before_training(said: Said, tmp_path: Path) -> None:
    code, error = said("up", write_job(tmp_path, body=7))
    assert code == 2
    assert "body.0 (Linear(in_features=7" in error
    assert "head gives (2, 8)" in error
    assert not list(tmp_path.glob("runs/tiny*/metrics.jsonl"))


def test_a_shard_out_of_range(said: Said, tmp_path: Path) -> None:
    code, error = said("node", "client", write_job(tmp_path), "--shard", "7")
    assert code == 2
    assert "shard 7 is out of range: the data has 2 shards, 0 to 1" in error


@pytest.mark.parametrize("role", ["aggregator", "standby"])
def test_a_lossy_codec_for_weights_is_refused_at_once(role: str, said: Said, tmp_path: Path) -> None:
    flags = ("--codec", "raw, weights=int8", "--runs", tmp_path / "runs")
    code, error = said("node", role, write_job(tmp_path), *flags)
    assert code == 2
    assert "all nodes have the same weights, bit for bit" in error


def test_a_client_without_a_shard(said: Said, tmp_path: Path) -> None:
    assert said("node", "client", write_job(tmp_path)) == (
        2,
        "zsfl: which shards does this client hold? Give --shard, 0 to 1",
    )


def test_a_port_that_is_taken(said: Said, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, error = said("node", "aggregator", write_job(tmp_path), "--port", str(port), "--no-mdns")
    assert code == 2
    assert f"port {port} on 127.0.0.1 is taken" in error


def test_data_that_is_missing_or_truncated(said: Said, tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text(
        "import torch.nn as nn, zsfl, torch.nn.functional as F\n"
        "def model(): return zsfl.SplitModel(head=nn.Linear(784, 8), body=nn.Linear(8, 10))\n"
        f"data = zsfl.shards(lambda: zsfl.mnist({str(tmp_path / 'pictures')!r}, flat=True), by=zsfl.iid())\n"
        "job = zsfl.Job(name='pictures', model=model, loss=F.cross_entropy, data=data, optimizer=zsfl.sgd(lr=0.1))\n"
    )
    code, error = said("node", "client", job, "--shard", "0", "--no-mdns")
    assert code == 2
    assert "pictures" in error
    (tmp_path / "pictures").mkdir()
    for kind in ("train", "t10k"):
        (tmp_path / f"pictures/{kind}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 60, 28, 28) + bytes(99))
        (tmp_path / f"pictures/{kind}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 60) + bytes(60))
    code, error = said("up", job, "--clients", "1", "--split-servers", "1")
    assert code == 2
    assert "train-images-idx3-ubyte" in error
    assert "truncated" in error


def test_a_start_that_fails_leaves_no_run(said: Said, tmp_path: Path) -> None:
    code, error = said("up", write_job(tmp_path, body=7), "--no-mdns")
    assert (code, "aggregator" in error or "client" in error or "split-server" in error) == (2, True), error
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["logs", "spills"]


def test_the_loss_is_no_number(said: Said, tmp_path: Path) -> None:
    code, error = said("up", write_job(tmp_path, lr=1e307, rounds=50))
    assert code == 1
    for part in ("the loss became", "at round", "window", "(version", "client-", "is kept in", "learning rate"):
        assert part in error
    kept = load_file(tmp_path / "runs/tiny/model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    loaded = subprocess.run(
        [sys.executable, "-c", "import safetensors.torch as s; print(len(s.load_file('model.safetensors')))"],
        cwd=tmp_path / "runs/tiny", check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert loaded.stdout == f"{len(kept)}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("up", "JOB", "--resume"), "there is no run runs/tiny to resume"),
        (("up", "JOB", "--runs", "JOB"), "choose another folder with --runs"),
        (("up", "JOB", "--clients", "0"), "a cluster needs at least one client, not 0"),
        (("up", "JOB", "--rounds", "many"), "--rounds is 'many': expected a whole number"),
        (("up", "JOB", "--device", "tpu"), "--device is 'tpu': expected auto, cpu, cuda or cuda:N"),
        (("up", "JOB", "--host", "0.0.0.0"), "--host is '0.0.0.0': expected the IPv4 address of one interface"),
        (("up", "JOB", "--clients", "some"), "invalid int value: 'some'"),
        (("up", "JOB", "--speed", "9"), "zsfl up: there is no --speed (see zsfl up --help)"),
        (("up", "JOB", "--run", "Logs"), "--run is 'Logs': expected up to 100 letters, digits, dots, - and _; not"),
        (("node", "client", "JOB", "--run", "spills"), "not spills, logs or noise, which are folders beside the runs"),
        (("fly",), "there is no command 'fly': choose from demo, up"),
        (("node", "client", "JOB", "--peer", "here"), "host:port"),
    ],
)
def test_flags_that_will_not_do(said: Said, tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    job = str(write_job(tmp_path))
    code, error = said(*(job if arg == "JOB" else arg for arg in args))
    assert (code, message in error) == (2, True), error


def test_nobody_there(said: Said, tmp_path: Path) -> None:
    code, error = said("node", "client", write_job(tmp_path), "--shard", "0", "--no-mdns", "--join-s", "0.5")
    assert (code, error) == (
        1,
        "zsfl: no aggregator came within 0.5 s; start one with: zsfl node aggregator JOB",
    )


async def test_a_shard_that_another_client_holds(tmp_path: Path) -> None:
    spawner = ProcessSpawner(write_job(tmp_path), tmp_path / "logs")
    try:
        await spawner.open()
        flags = {"runs": tmp_path / "runs", "cluster": secrets.token_hex(4)}
        await spawner.start(NodeCommand(name="aggregator", role=Role.AGGREGATOR, flags=flags))
        for name in ("one", "two"):
            await spawner.start(NodeCommand(name=name, role=Role.CLIENT, flags={**flags, "shards": "0"}))
        while not isinstance(report := await until(spawner.reports.get()), Failed):
            pass
    finally:
        await spawner.close()
    other = {"one": "two", "two": "one"}[report.node]
    assert report.kind == "ConfigError"
    assert f"shard 0 is already held by {other}; give this client another with --shard" in report.message


@pytest.mark.parametrize("differs", ["job", "protocol"])
async def test_a_peer_that_does_not_agree(tmp_path: Path, differs: str) -> None:
    job = write_job(tmp_path)
    other = write_job(tmp_path, shards=3, name="other") if differs == "job" else job
    code = "" if differs == "job" else "import zsfl.peers; zsfl.peers.PROTOCOL = 99; "
    program = f"import sys; {code}from zsfl.cli import main; sys.exit(main())"
    async with command("node", "aggregator", job, "--no-mdns", cwd=tmp_path) as aggregator:
        peer = ("--no-mdns", "--peer", await aggregator.address())
        async with command("node", "client", other, "--shard", "0", *peer, cwd=tmp_path, run=("-c", program)) as client:
            assert await client.ended() == 2, client.text
        (error,) = client.err
        (note,) = (line for line in aggregator.out if "was turned away" in line)
    reason = {
        "job": "runs another job than client-0: name is tiny there and other here, shards is 2 there and 3 here",
        "protocol": "of the protocol and client-0 version 99: install the same zsfl on both",
    }[differs]
    assert reason in error or reason.replace("there", "here") in error, error
    assert reason in note, note


async def test_an_error_in_the_jobs_own_loss_is_told_and_its_traceback_logged(tmp_path: Path) -> None:
    job = tmp_path / "faulty.py"
    text = Path(zsfl.__file__).with_name("demo.py").read_text(encoding="utf-8")
    loss = 'def loss(output, target):\n    if output.requires_grad:\n        raise OSError("out of luck")\n'
    body = "    return F.cross_entropy(output, target)\n\n\njob = "
    job.write_text(text.replace("job = ", loss + body, 1).replace("loss=F.cross_entropy", "loss=loss"), "utf-8")

    async def run() -> None:
        async with zsfl.LocalCluster(job, clients=2, split_servers=1, runs=tmp_path / "runs") as cluster:
            async for _ in cluster.train(1):
                pass

    with pytest.raises(zsfl.RunFailed, match=r"client-\d: OSError: out of luck"):
        await run()
    logs = [log.read_text("utf-8") for log in (tmp_path / "runs" / "logs").glob("client-*.log")]
    assert any("in loss" in text and "out of luck" in text for text in logs)


async def test_the_environment_means_the_same_to_all_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSFL_CLIENTS", "3")
    monkeypatch.setenv("ZSFL_RUNS", str(tmp_path / "elsewhere"))
    demo = Path(zsfl.__file__).with_name("demo.py")
    async with zsfl.LocalCluster(demo, split_servers=1, in_process=True) as cluster:
        assert sum(name.startswith("client-") for name in cluster.nodes) == 3
        reports = [report async for report in cluster.train(1)]
    assert len(reports[0].serving) == 3
    assert (tmp_path / "elsewhere" / "digits" / "metrics.jsonl").exists()
