"""The command line: what there is, that it teaches, and that asking for help costs nothing."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.jobs import write_job

import zsfl
from zsfl.cli import main, parser

COMMON = {
    "--clients", "--cluster", "--codec", "--host", "--join-s", "--mdns", "--mode", "--name", "--no-mdns",
    "--patience-s", "--peer", "--port", "--request-s", "--run", "--runs", "--threads", "--insecure", "--no-insecure",
    "--io-threads", "--keys", "--metrics", "--service", "--no-service", "--dns", "--meet", "--behind-nat",
    "--no-behind-nat", "--stay", "--no-stay",
}  # fmt: skip
CLUSTER = {
    "--client-processes", "--clients", "--cluster", "--codec", "--device", "--durability", "--host", "--in-process",
    "--keep-mib", "--mdns", "--mode", "--no-mdns", "--no-resume", "--patience-s", "--resume", "--rounds", "--run",
    "--runs", "--slots", "--spill", "--spill-mib", "--split-servers", "--standbys", "--threads", "--insecure",
    "--no-insecure", "--io-threads", "--keys", "--dash", "--dash-port", "--metrics", "--tensorboard",
    "--no-tensorboard",
}  # fmt: skip
LOOKING = {
    "--host", "--peer", "--dns", "--meet", "--keys", "--insecure", "--no-insecure", "--mdns", "--no-mdns", "--runs",
}  # fmt: skip
RESUMING = {"--no-resume", "--resume", "--rounds"}
FLAGS = {
    "": {"--version"},
    "demo": {*CLUSTER, "--print-job"},
    "up": {*CLUSTER, "JOB", "--on", "--address", "--min", "--max"},
    "audit": {"RUN", "--replay", "--job", "--runs"},
    "new": {"DIR"},
    "completion": {"SHELL"},
    "baseline": {"ALGORITHM", "JOB", "--clients", "--rounds", "--threads"},
    "drain": {"HOST:PORT", "--wait-s", "--keys", "--insecure", "--no-insecure"},
    "ls": {*LOOKING, "RUN", "--json", "--wait-s"},
    "doctor": {*LOOKING, "JOB", "--json", "--cluster", "--device", "--spill", "--spill-mib"},
    "top": {*LOOKING, "RUN"},
    "status": {"RUN", "--json", "--runs"},
    "runs": {"RUN", "--json", "--plot", "--runs"},
    "report": {"RUN", "--to", "--runs"},
    "dash": {*LOOKING, "RUN", "--port"},
    "keys": set[str](),
    "keys show": {"--keys"},
    "keys list": {"--keys"},
    "keys trust": {"KEY", "NAME", "ROLES", "--keys"},
    "keys revoke": {"WHICH", "--keys"},
    "invite": {"--host", "--keys", "--name", "--port", "--roles", "--valid-s"},
    "join": {"TOKEN", "--keys", "--name", "--roles"},
    "bench": {
        "TARGET",
        "--serve",
        "--seconds",
        "--host",
        "--port",
        "--device",
        "--threads",
        "--request-s",
        "--keys",
        "--insecure",
        "--no-insecure",
        "--io-threads",
    },
    "plan": {
        "JOB",
        "--activations-kib",
        "--aggregator-ms",
        "--bench",
        "--body-kib",
        "--client-ms",
        "--client-processes",
        "--clients",
        "--cores",
        "--device",
        "--ends-kib",
        "--insecure",
        "--json",
        "--keys",
        "--latency-ms",
        "--link",
        "--mode",
        "--no-insecure",
        "--samples",
        "--seconds",
        "--seed",
        "--server-link",
        "--server-ms",
        "--slots",
        "--split-servers",
        "--threads",
    },
    "node": set[str](),
    "node client": {*COMMON, "JOB", "--connections", "--device", "--shard", "--shards", "--spill", "--spill-mib"},
    "node split-server": {*COMMON, "JOB", "--device", "--slots", "--spill", "--spill-mib"},
    "node aggregator": {
        *COMMON,
        "JOB",
        "--clients-per-key",
        "--durability",
        "--hold",
        "--keep-mib",
        "--no-hold",
        "--reassign",
        "--spill",
        *RESUMING,
        "--start-with",
        "--takeover",
        "--tensorboard",
        "--no-tensorboard",
    },
    "node standby": {
        *COMMON,
        "JOB",
        "--clients-per-key",
        "--durability",
        "--keep-mib",
        "--rounds",
        "--spill",
        "--takeover",
        "--tensorboard",
        "--no-tensorboard",
    },
}
"""Every flag of every command. A change here is a change that people notice."""


def _flags(command: argparse.ArgumentParser, name: str = "") -> dict[str, set[str]]:
    found: dict[str, set[str]] = {name: set()}
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                found |= _flags(inner, f"{name} {word}".strip())
        else:
            found[name] |= set(action.option_strings or (str(action.metavar),))
    found[name] -= {"-h", "--help"}
    return found


def test_the_command_line_stays_as_it_is() -> None:
    assert _flags(parser()) == FLAGS


@pytest.mark.parametrize("command", FLAGS)
def test_help_teaches_by_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command.split(), "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "examples" in text
    assert text.count(f"  zsfl {command}".rstrip()) >= 2


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["up", "--help"], ["node", "client", "--help"]])
def test_help_loads_nothing_heavy(args: list[str]) -> None:
    program = (
        "import contextlib, json, os, sys; from zsfl.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(open(os.devnull, 'w')): main(sys.argv[1:])\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, *args], check=True, capture_output=True, text=True)
    assert not {"asyncio", "numpy", "rich", "torch", "zeroconf", "zmq"} & set(json.loads(done.stdout))


def test_the_demo_prints_its_own_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--print-job"]) == 0
    assert capsys.readouterr().out == Path(zsfl.__file__).with_name("demo.py").read_text()


def test_a_baseline_is_told_round_by_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    job, threads = write_job(tmp_path), torch.get_num_threads()
    try:
        assert main(["baseline", "fedavg", str(job), "--rounds", "2", "--clients", "3"]) == 0
        head, *rows = capsys.readouterr().out.splitlines()
        assert head.split()[:3] == ["round", "train", "loss"]
        assert [row.split()[0] for row in rows] == ["1/2", "2/2"]
        assert [int(row.split()[-1]) for row in rows] == [14, 28]  # of shards of 40, 41 and 42 samples
        expected = [done.accuracy for done in zsfl.baselines.run("fedavg", replace(zsfl.load_job(job), shards=3), 2)]
        assert [row.split()[3] for row in rows] == [f"{accuracy:.2%}" for accuracy in expected if accuracy is not None]
        with pytest.raises(SystemExit):
            main(["baseline", "fedavgg", str(job)])
        assert "there is no algorithm 'fedavgg': did you mean fedavg?" in capsys.readouterr().err
    finally:
        torch.set_num_threads(threads)


def test_baseline_help_names_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["baseline", "--help"])
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.split("one of:\n")[1].split("\n\n")[0].splitlines()] == list(
        zsfl.baselines.BASELINES
    )


def test_who_gives_it_nothing_to_do_is_told_how_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr()
    assert re.findall(r"^  (zsfl \w+)", said.out, re.MULTILINE) == ["zsfl demo", "zsfl new", "zsfl up"]
    assert "zsfl --help" in said.out
    assert said.err == ""


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert zsfl.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("noed client", "zsfl: there is no command 'noed': did you mean node?"),
        ("xyz", "zsfl: there is no command 'xyz': choose from demo, up, node"),
        ("node agregator", "zsfl node: there is no role 'agregator': did you mean aggregator?"),
        ("up --ruonds 3 job.py", "zsfl up: there is no --ruonds: did you mean --rounds?"),
        ("up --ruonds=3", "zsfl up: there is no --ruonds: did you mean --rounds?"),
        ("up --round 3 job.py", "zsfl up: there is no --round: did you mean --rounds?"),
        ("up job.py --xyzzy", "zsfl up: there is no --xyzzy (see"),
        ("up job.py -x", "zsfl up: there is no -x (see"),
        ("up job.py other.py", "zsfl up: 'other.py' is an argument too many"),
        ("node client job.py --mode exat", "zsfl node client: --mode is 'exat': choose from exact, elastic, async"),
    ],
)
def test_what_is_not_known_is_told_with_what_may_have_been_meant(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(line.split())
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert said in error
    assert error.endswith(f" (see {said.partition(':')[0]} --help)\n")
    assert error.count("\n") == 1
