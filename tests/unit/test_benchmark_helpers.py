"""What the benchmarks of throughput and scale reckon with: stacks, latencies, throughput while servers are added."""

from __future__ import annotations

import importlib
import math
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.waiting import until

import zsfl
import zsfl.demo

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


def module(name: str) -> Any:
    return importlib.import_module(name)


def test_a_stack_counts_as_its_innermost_room() -> None:
    profile = module("_profile")
    loop = "run (asyncio/runners.py:190)"
    stacks = profile.parse(
        [
            f"{loop};make (zsfl/client/driver.py:60);forward (torch/nn/modules/linear.py:5) 3",
            f"{loop};make (zsfl/client/driver.py:60);begin (zsfl/client/local.py:9);x (torch/f.py:1) 4",
            f"{loop};put (zsfl/spill/store.py:9);encode (zsfl/spill/layout.py:1);save (torch.py:1) 2",
            f"{loop};_handle_events (zmq/_future.py:700) 1",
            f"{loop} 1",
            f"{loop};run (zsfl/lane.py:50);EpollSelector.select (selectors.py:468) 9",
            "nothing that was seen",
        ]
    )
    assert profile.shares(stacks) == {
        "arithmetic": pytest.approx(4 / 11),
        "roles": pytest.approx(3 / 11),
        "spill": pytest.approx(2 / 11),
        "wire": pytest.approx(1 / 11),
        profile.REST: pytest.approx(1 / 11),
    }
    own = {name: (share, whole) for name, share, whole in profile.costs(stacks)}
    assert own["run (asyncio/runners.py)"] == (pytest.approx(1 / 11), 1.0)


@pytest.mark.parametrize(("share", "value"), [(0.5, 50.0), (0.99, 99.0), (1.0, 100.0)])
def test_a_quantile_is_the_smallest_value_that_so_many_do_not_exceed(share: float, value: float) -> None:
    assert module("_latency").quantile([float(number) for number in range(1, 101)], share) == value


def test_latencies_of_several_processes_are_read_together_and_half_a_record_is_left_out(tmp_path: Path) -> None:
    latency = module("_latency")
    assert math.isnan(latency.between(tmp_path, 0.0, 9.0).p50_s)
    (tmp_path / "1.times").write_bytes(struct.pack("dddd", 0.0, 1.0, 1.0, 4.0))
    (tmp_path / "2.times").write_bytes(struct.pack("dddd", 1.0, 3.0, 8.0, 12.0)[:-1])
    assert latency.between(tmp_path, 0.5, 9.0) == latency.Percentiles(3, 2.0, 3.0)
    assert latency.between(tmp_path, 2.0, 9.0).steps == 2


def test_a_server_counts_as_of_use_once_throughput_is_most_of_the_way_up() -> None:
    servers = module("_servers")
    # 50 steps/s until two seconds, then 100: a second server was ready after 1.5 s.
    done = [(number / 2, 25 * number) for number in range(1, 5)] + [(2 + n / 2, 100 + 50 * n) for n in range(1, 9)]
    run = servers.Servers(done=done, added=[(1.0, 1.5, 2)], steps_per_s={1: 50.0, 2: 100.0})
    assert run.steps_at(0.25) == 12.5
    assert run.rate(1.5, 2.5) == 75.0
    assert run.raised_s(0) == pytest.approx(0.4)
    run.done = done[:4]
    assert run.raised_s(0) is None


def test_the_page_and_the_plot_of_servers_take_what_was_found(tmp_path: Path) -> None:
    servers = module("_servers")
    done = [(number / 10, number) for number in range(1, 60)]
    run = servers.Servers(
        done=done, added=[(1.0, 1.1, 2), (2.0, 2.1, 4), (3.0, 3.1, 8)], steps_per_s={1: 50, 2: 99, 4: 180, 8: 380}
    )
    assert "7.60" in servers.servers_table([run])
    servers.draw(tmp_path / "plot.png", [run])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["microsfl", "microsfl_untested", "simulated_accelerator", "convolutional"])
def test_the_jobs_load_and_their_networks_are_built(name: str) -> None:
    job = zsfl.load_job(FOLDER / "jobs" / f"{name}.py")
    assert job.build().u_shaped


def test_only_body_and_tail_of_the_workload_are_trained() -> None:
    model = zsfl.load_job(FOLDER / "jobs" / "microsfl.py").build()
    assert {name.partition(".")[0] for name, weight in model.named_parameters() if weight.requires_grad} == {
        "body",
        "tail",
    }


async def test_every_step_that_clients_make_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latency = module("_latency")
    driver = importlib.import_module("zsfl.client.driver").StepDriver
    monkeypatch.setattr(driver, "make", driver.make)  # put back afterwards
    begun_s = time.monotonic()
    latency.watch(str(tmp_path))
    latency.watch(str(tmp_path))
    cluster = zsfl.LocalCluster(zsfl.demo.job, clients=2, split_servers=1, in_process=True, runs=tmp_path / "runs")
    async with cluster:
        (report,) = [report async for report in cluster.train(1)]
    found = latency.between(tmp_path, begun_s, time.monotonic())
    assert found.steps == report.steps
    assert 0 < found.p50_s <= found.p99_s


@pytest.mark.parametrize("name", ["zsfl_wire", "zsfl_locked", "bare_zmq", "streams"])
async def test_contestants_that_need_nothing_more_answer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZSFL_KEYS", str(tmp_path / "keys"))
    async with module("peers.program").started(name) as (asker, _):
        assert bytes(await until(asker.ask(b"payload"))) == b"payload"
