"""The command `zsfl plan`: what it says, of a job and of given figures, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.jobs import write_job

from zsfl.cli import main

GIVEN = ["plan", "--clients", "12", "--client-ms", "5", "--server-ms", "20", "--activations-kib", "16"]


def test_given_figures_need_no_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GIVEN, "--split-servers", "2", "--link", "100", "--latency-ms", "2", "--samples", "640"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("a run with 12 clients, exact mode, 1 step of each client a version; a step costs\n")
    assert re.search(r"client +5 ms +given", said)
    assert re.search(r"split server +20 ms +given", said)
    assert re.search(r"link +100 Mbit/s, 2 ms +given", said)
    rows = re.findall(r"^>? +([\d,]+) +[\d.]+ ", said, re.MULTILINE)
    assert {"1", "2", "4", "8"} <= set(rows)
    assert said.count("\n>") == 1
    assert "a round" in said
    assert re.search(r"^With 2 split servers: [\d.]+ steps/s, bound by the split servers; with \d+", said, re.MULTILINE)


def test_programs_are_told_the_same_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[dict[str, Any]] = []
    for _ in range(2):
        assert main([*GIVEN, "--clients", "4", "--mode", "async", "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == told[1]
    assert told[0]["figures"]["mode"] == "async"
    assert told[0]["figures"]["link_bytes_per_s"] is None
    (asked,) = [plan for plan in told[0]["plans"] if plan["split_servers"] == told[0]["asked"]]
    assert 40 < asked["steps_per_s"] <= 100
    assert asked["bottleneck"] == "split servers"
    assert told[0]["needed"] in [plan["split_servers"] for plan in told[0]["plans"]]


def test_more_peers_than_a_node_has_are_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--clients", "1100", "--client-ms", "1", "--server-ms", "1", "--split-servers", "1"]) == 0
    assert "A node has 1,024 peers at most, and these are 1,101" in capsys.readouterr().out


def test_what_is_not_given_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        job = write_job(tmp_path)
        assert main(["plan", str(job), "--clients", "3", "--seconds", "0.01", "--server-ms", "7", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
    finally:
        torch.set_num_threads(threads)
    figures = told["figures"]
    assert told["job"] == "tiny"
    assert (figures["clients"], figures["batch"], figures["samples"], figures["u_shaped"]) == (3, 10, 40, True)
    assert figures["forward_s"] + figures["backward_s"] == pytest.approx(0.007)
    assert figures["activation_bytes"] == 10 * 8 * 8
    assert (figures["body_spill_bytes"], figures["body_weights_bytes"]) == ((8 * 8 + 8) * 8, (8 * 8 + 8) * 8)
    assert min(figures[name] for name in ("head_s", "tail_s", "back_s", "client_message_s", "part_s")) > 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--clients", "3"], "say --client-ms, --server-ms too"),
        (["no.py"], "there is no job file"),
        ([*GIVEN[1:], "--link", "0"], "--link is 0"),
        ([*GIVEN[1:], "--latency-ms", "-1"], "--latency-ms is -1"),
        ([*GIVEN[1:], "--server-ms", "nan"], "--server-ms is nan"),
        ([*GIVEN[1:], "--split-servers", "0"], "split_servers is 0"),
        ([*GIVEN[1:], "--client-processes", "13"], "13 processes cannot share 12 clients"),
        ([*GIVEN[1:], "--bench", "there", "--seconds", "0.1"], "--bench is 'there'"),
        ([*GIVEN[1:], "--bench", "127.0.0.1:1", "--link", "5"], "leave out either"),
        ([*GIVEN[1:], "--seconds", "0"], "--seconds is 0"),
        (["--clients", "3", "--client-ms", "0", "--server-ms", "0"], "costs nothing"),
    ],
)
def test_what_makes_no_sense_is_refused(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *args]) == 2
    assert said in capsys.readouterr().err
