"""What a plan predicts where it can be worked out by hand, and that it comes to an end whatever it is asked."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zsfl.errors import ConfigError
from zsfl.learning.modes import Async, Elastic, Exact, Mode
from zsfl.planning.comparing import compare
from zsfl.planning.figures import Figures
from zsfl.planning.machines import Clock, Cores, Lane, Port
from zsfl.planning.nodes import HEADER_BYTES
from zsfl.planning.simulation import simulate

STEP = Figures(clients=1, head_s=0.001, tail_s=0.002, back_s=0.003, forward_s=0.004, backward_s=0.01, version_s=0.005)
STEP_S = 0.025
"""Of one client alone, with what the aggregator takes to begin the next version."""
MODES = {"exact": Exact(), "elastic": Elastic(), "async": Async()}


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Mode:
    return MODES[request.param]


def test_one_client_and_one_server_take_turns(mode: Mode) -> None:
    found = simulate(replace(STEP, mode=mode))
    assert found.steps_per_s == pytest.approx(1 / STEP_S, rel=1e-6)
    assert (found.late, found.dropped, found.refused) == (0, 0, 0)
    assert found.busy["split servers"] == pytest.approx(0.014 / STEP_S, rel=0.02)
    assert found.spent_s["clients"] == pytest.approx(0.006)
    assert found.spent_s["servers"] == pytest.approx(0.014)


def test_every_hop_and_every_byte_is_on_the_way_of_a_step() -> None:
    rate, latency_s, there, back = 1e6, 0.01, 20_000.0, 10_000.0
    far = replace(
        STEP,
        activation_bytes=there,
        output_bytes=back,
        link_bytes_per_s=rate,
        latency_s=latency_s,
        input_grad_bytes=0.0,
    )
    # Two requests and their answers, then the client's spill, and the next version; the other spill is there before.
    bytes_ = there + 2 * back + 6 * HEADER_BYTES
    assert 1 / simulate(far).steps_per_s == pytest.approx(STEP_S + 6 * latency_s + bytes_ / rate, rel=1e-6)


def test_a_job_without_a_tail_asks_once() -> None:
    found = simulate(replace(STEP, u_shaped=False, tail_s=0.0, latency_s=0.01))
    assert 1 / found.steps_per_s == pytest.approx(STEP_S - 0.002 + 4 * 0.01, rel=1e-6)


@pytest.mark.parametrize("servers", [1, 2, 4])
def test_many_clients_saturate_the_servers(servers: int) -> None:
    found = simulate(replace(STEP, clients=48, steps=8, split_servers=servers, version_s=0.0))
    most = servers / 0.014
    assert 0.85 * most <= found.steps_per_s <= most * 1.001
    assert found.bottleneck == "split servers"


def test_one_queue_is_as_long_as_those_who_do_not_compute() -> None:
    """A closed queue with one server: the interactive response time law, exactly."""
    clients = 12
    found = simulate(replace(STEP, clients=clients, mode=Async(samples=1, quota=1000), version_s=0.0))
    response_s = clients / found.steps_per_s
    inside = sum(found.spent_s[place] for place in ("clients", "servers", "link", "room"))
    assert found.steps_per_s == pytest.approx(1 / 0.014, rel=0.02)
    assert inside <= response_s * 1.02


def test_several_steps_of_each_that_make_a_version_follow_each_other() -> None:
    many = replace(STEP, clients=4, version_s=0.0)
    one, two = (
        simulate(replace(many, mode=Async(samples=each * many.clients * many.batch, quota=8))) for each in (1, 2)
    )
    assert two.steps_per_s >= one.steps_per_s


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    clients=st.integers(1, 24),
    servers=st.integers(1, 5),
    steps=st.integers(1, 3),
    latency_ms=st.floats(0, 20),
    seed=st.integers(0, 99),
)
def test_nothing_is_faster_than_its_bounds(
    clients: int, servers: int, steps: int, latency_ms: float, seed: int
) -> None:
    """The asymptotic bounds of any closed queueing network: what one step takes alone, and what each place can do."""
    figures = replace(
        STEP, clients=clients, split_servers=servers, steps=steps, latency_s=latency_ms / 1e3, jitter=0.2, seed=seed
    )
    found = simulate(figures, 60_000)
    alone_s = 0.8 * 0.02 + 4 * latency_ms / 1e3
    assert found.steps_per_s <= clients * steps / alone_s * 1.01
    assert found.steps_per_s <= servers / (0.8 * 0.014) * 1.01
    assert all(0 <= share <= 1 for share in found.busy.values())


def test_a_narrow_link_of_the_clients_bounds_and_more_servers_are_no_help() -> None:
    narrow = replace(
        STEP,
        clients=8,
        split_servers=16,
        steps=8,
        activation_bytes=100_000.0,
        link_bytes_per_s=1e6,
        server_link_bytes_per_s=1e9,
    )
    found = compare(narrow)
    assert found.asked.bottleneck == "client links"
    assert found.asked.steps_per_s == pytest.approx(8 * 1e6 / 100_900, rel=0.1)
    assert found.needed.split_servers < 16
    assert "the clients' links" in found.says
    assert "codec" in found.says


def test_the_aggregator_s_link_bounds_what_spills_much() -> None:
    heavy = replace(STEP, clients=16, steps=4, split_servers=8, body_spill_bytes=1e6, server_link_bytes_per_s=2e7)
    found = simulate(heavy)
    assert found.bottleneck == "aggregator link"
    assert found.steps_per_s == pytest.approx(20, rel=0.1)


def test_more_servers_help_until_something_else_bounds() -> None:
    found = compare(replace(STEP, clients=16, steps=8, version_s=0.0, part_s=0.0025))
    rates = {one.split_servers: one.steps_per_s for one in found.tried}
    assert rates[2] > 1.5 * rates[1]
    assert found.asked.bottleneck == "split servers"
    assert 2 < found.needed.split_servers < 8
    assert found.tried[-1].bottleneck == "aggregator"
    assert found.says.startswith("With 1 split server: ")
    assert "then bound by the aggregator's computing" in found.says


def test_processes_that_share_two_cores_are_as_fast_as_two_cores() -> None:
    here = replace(STEP, clients=8, steps=32, split_servers=32, cores=2.0)
    found = simulate(here)
    assert found.bottleneck == "cores"
    assert found.steps_per_s <= 2 / 0.006
    on_cores = simulate(replace(here, on_device=False))
    assert on_cores.steps_per_s == pytest.approx(2 / 0.02, rel=0.1)


def test_the_same_seed_is_the_same_run_and_another_seed_another() -> None:
    figures = replace(STEP, clients=12, split_servers=3, jitter=0.3, mode=Async())
    assert simulate(figures) == simulate(figures)
    assert simulate(figures).steps_per_s != simulate(replace(figures, seed=1)).steps_per_s


def test_elastic_goes_on_without_the_slow_and_counts_them_late() -> None:
    figures = replace(STEP, clients=16, split_servers=2, jitter=0.9)
    elastic, exact = (simulate(replace(figures, mode=mode)) for mode in (Elastic(quorum=0.5, grace=0.0), Exact()))
    assert elastic.late > 0
    assert exact.late == 0
    assert elastic.steps_per_s > exact.steps_per_s


def test_what_finds_no_room_goes_elsewhere_or_comes_again() -> None:
    found = simulate(replace(STEP, clients=24, split_servers=2, slots=2))
    assert found.refused > 0
    assert found.steps_per_s <= 2 / 0.014 * 1.001
    assert found.dropped == 0


def test_clients_of_one_process_share_its_thread() -> None:
    together = simulate(replace(STEP, clients=8, client_nodes=1, split_servers=8, steps=4))
    assert together.steps_per_s == pytest.approx(1 / 0.006, rel=0.1)
    assert together.bottleneck == "clients"


def test_ten_thousand_clients_and_a_thousand_servers_end_in_so_many_events() -> None:
    many = replace(STEP, clients=10_000, split_servers=1_000, activation_bytes=16_384.0, link_bytes_per_s=1e6)
    found = simulate(many, 10_000)
    assert found.events == 10_000
    assert not found.is_whole
    assert math.isfinite(found.steps_per_s)
    assert math.isinf(found.version_s)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"clients": 0}, "clients is 0"),
        ({"split_servers": -1}, "split_servers is -1"),
        ({"slots": 0}, "slots is 0"),
        ({"client_nodes": 2}, "cannot share 1 clients"),
        ({"forward_s": -0.1}, "forward_s is -0.1"),
        ({"forward_s": math.nan}, "forward_s is nan"),
        ({"activation_bytes": math.inf}, "activation_bytes is inf"),
        ({"link_bytes_per_s": 0.0}, "carries more than nothing"),
        ({"jitter": 1.0}, "jitter is 1.0"),
        ({"mode": Async(), "steps": 2}, "mode async has none"),
        (dict.fromkeys(("head_s", "tail_s", "back_s", "forward_s", "backward_s"), 0.0), "costs nothing"),
    ],
)
def test_figures_that_make_no_sense_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        replace(STEP, **change)


# --- what takes time --------------------------------------------------------------------------------------------


def test_events_of_one_moment_come_in_the_order_in_which_they_were_asked_for() -> None:
    clock, seen = Clock(), list[str]()
    for name in "abc":
        clock.at(1.0, seen.append, name)
    clock.at(0.5, seen.append, "first")
    clock.run(3)
    assert seen == ["first", "a", "b"]
    assert clock.now_s == 1.0


def test_cores_are_shared_equally_by_those_who_compute() -> None:
    clock = Clock()
    cores, ended = Cores(clock, 2), dict[str, float]()
    for name, work_s in (("short", 1.0), ("long", 2.0), ("longer", 3.0)):
        cores.use(work_s, lambda name=name: ended.setdefault(name, clock.now_s))
    clock.run(1000)
    # Three at 2/3 each until 1.5 s, then each has one of its own.
    assert ended == {"short": pytest.approx(1.5), "long": pytest.approx(2.5), "longer": pytest.approx(3.5)}
    assert cores.busy_s == pytest.approx(6.0)


def test_a_lane_does_one_thing_after_the_other_and_holds_no_core_while_a_device_works() -> None:
    clock = Clock()
    cores = Cores(clock, 1)
    lanes, ended = (Lane(clock, cores), Lane(clock, cores)), list[float]()
    for lane in lanes:
        for _ in range(2):
            lane.do(0.5, lambda: ended.append(clock.now_s), held_s=2.0)
    clock.run(1000)
    assert ended == [pytest.approx(when) for when in (3.0, 3.0, 6.0, 6.0)]


def test_a_message_takes_as_long_as_the_slower_end_and_waits_for_those_before_it() -> None:
    clock, came = Clock(), dict[str, float]()
    slow, other, quick = Port(1.0), Port(1.0), Port(4.0)
    for name, port in (("a", slow), ("b", slow), ("c", other)):
        port.send(clock, quick, 4.0, 0.5, lambda name=name: came.setdefault(name, clock.now_s))
    clock.run(1000)
    assert came == {"a": pytest.approx(4.5), "c": pytest.approx(4.5), "b": pytest.approx(8.5)}
    assert (slow.out_busy_s, quick.in_busy_s) == (pytest.approx(8.0), pytest.approx(3.0))
