"""What a round adds up to, against computing it directly."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsfl.aggregator.tally import WINDOW_REPORT_S, PeerCounters, Tally, pooled
from zsfl.ids import NodeId, PartName, RunId, Version, step_cid
from zsfl.learning.averaging import Contribution, StepShare
from zsfl.wire.messages import Evaluated

RUN = RunId("3fa9c1")


def tally(now_s: float = 100.0) -> Tally:
    return Tally(node="agg", round_=2, rounds=5, windows=3, now_s=now_s)


def contribution(part: PartName, n: float, loss_sum: float | None, samples: int) -> Contribution:
    cid = step_cid(RUN, 0, Version(0))
    return Contribution(
        cid=cid,
        part=part,
        version=Version(0),
        n=n,
        loss_sum=loss_sum,
        samples=samples,
        grads={},
        buffers={},
        node="n",
    )


def meta(part: PartName, client: str, node: str) -> Contribution:
    return replace(contribution(part, 1.0, None, 1), client=client, node=node)


def evaluated(samples: int, weight: float, correct: float | None, loss_sum: float) -> Evaluated:
    return Evaluated(
        node=NodeId("a"),
        shard=0,
        version=Version(0),
        samples=samples,
        weight=weight,
        correct=correct,
        loss_sum=loss_sum,
    )


def test_what_nodes_counted_for_another_aggregator_is_not_of_the_first_round() -> None:
    counters, old, new = PeerCounters(), NodeId("old"), NodeId("new")
    counters.begin(lambda _: True, before=[old])
    counters.heard(old, "old", {"bytes_sent": 1_000.0})
    counters.heard(old, "old", {"bytes_sent": 1_010.0})
    counters.heard(new, "new", {"bytes_sent": 5.0})  # it joined meanwhile
    assert counters.added() == {"old": {"bytes_sent": 10.0}, "new": {"bytes_sent": 5.0}}


steps = st.tuples(st.floats(0.5, 100), st.floats(-100, 100), st.integers(1, 500))


@given(st.lists(steps, min_size=1, max_size=20), st.integers(1, 5))
def test_the_training_loss_is_the_mean_over_samples_and_not_over_batches(
    done: list[tuple[float, float, int]], split: int
) -> None:
    counting = tally()
    dropped = [step_cid(RUN, 1, Version(0))]
    window = [contribution("client", n, loss_sum, samples) for n, loss_sum, samples in done]
    bodies = [contribution("body", n, None, samples) for n, _, samples in done]
    counting.counted([*window[:split], *bodies[:split]], Version(0))
    counting.counted([*window[split:], *bodies[split:]], Version(1), dropped)
    expected = sum(loss_sum for _, loss_sum, _ in done) / sum(n for n, _, _ in done)
    assert counting.train_loss == pytest.approx(expected)
    assert counting.round_report(Version(9), {}, 104.0).train_losses == {"0": pytest.approx(expected)}
    report = counting.round_report(Version(9), {}, now_s=104.0)
    assert report.train_loss == counting.train_loss
    assert (report.steps, report.samples) == (len(done), sum(samples for *_, samples in done))
    assert (report.seconds, report.steps_per_s) == (4.0, len(done) / 4.0)
    assert (report.round, report.rounds, report.version) == (2, 5, 9)
    assert (report.late, report.dropped) == (len(window[split:]), 1)  # all were made at version 0
    assert (report.loss, report.accuracy) == (None, None)  # until it is tested


def test_before_any_window_there_is_no_loss_to_speak_of() -> None:
    assert tally().train_loss == 0.0


def test_each_client_has_the_mean_over_its_own_samples() -> None:
    counting = tally()
    steps = [(7, 0, 2.0, 3.0), (7, 1, 6.0, 1.0), (10, 0, 4.0, 2.0), (11, 0, 1.0, math.inf), (12, 0, 0.0, 0.0)]
    made = [(contribution("client", n, loss, 1), step_cid(RUN, shard, Version(0), k)) for shard, k, n, loss in steps]
    counting.counted([replace(one, cid=cid) for one, cid in made], Version(0))
    report = counting.round_report(Version(1), {}, 101.0, lambda shard: f"client-{shard}")
    assert report.train_losses == {"client-7": 0.5, "client-10": 0.5, "client-11": None, "client-12": None}


def test_progress_is_reported_now_and_then() -> None:
    counting = tally(100.0)
    counting.counted([meta("body", "client-0", "server-1"), contribution("client", 2.0, 3.0, 2)], Version(0))
    assert counting.window_report(1, Version(1), 100.0 + WINDOW_REPORT_S / 2) is None
    report = counting.window_report(1, Version(1), 100.5)
    assert report is not None
    assert (report.loss, report.steps_per_s, report.serving) == (1.5, 2.0, {"client-0": "server-1"})
    assert (report.round, report.rounds, report.window, report.windows, report.version) == (2, 5, 1, 3, 1)
    assert counting.window_report(2, Version(2), 100.5 + WINDOW_REPORT_S / 2) is None
    assert counting.window_report(2, Version(2), 100.5 + 2 * WINDOW_REPORT_S) is not None


def test_who_served_whom_is_counted() -> None:
    counting = tally()
    bodies = [("c1", "s0"), ("c1", "s1"), ("c1", "s0"), ("c0", "s1")]
    counting.counted(
        [one for client, server in bodies for one in (meta("body", client, server), meta("client", client, client))],
        Version(0),
    )
    shares = tuple(StepShare(cid=step_cid(RUN, at, Version(1)), n=1, samples=1, client=f"c{at}") for at in range(2))
    alone = [meta("client", one.client, one.client) for one in shares]
    counting.counted([replace(meta("body", "c0", "s2"), members=shares), *alone], Version(1))
    report = counting.round_report(Version(2), {}, 101.0)
    assert report.serving == {"c0": {"s1": 1, "s2": 1}, "c1": {"s0": 2, "s1": 1, "s2": 1}}
    assert sum(sum(servers.values()) for servers in report.serving.values()) == report.steps


def test_bytes_are_those_of_this_round_and_of_all_peers() -> None:
    counting = tally()
    peers = PeerCounters()
    peers.heard(NodeId("1"), "a", {"bytes_sent": 100.0, "steps": 1.0})
    peers.begin(lambda _: True)
    peers.heard(NodeId("1"), "a", {"bytes_sent": 150.0, "steps": 3.0})
    peers.heard(NodeId("2"), "late", {"bytes_sent": 7.0})
    peers.heard(NodeId("3"), "mute", {})
    report = counting.round_report(Version(1), peers.added(), 101.0)
    assert report.bytes_sent == 57
    assert report.peers == {"a": {"bytes_sent": 50.0, "steps": 2.0}, "late": {"bytes_sent": 7.0}, "mute": {}}


tests_of_shards = st.tuples(st.integers(0, 50), st.floats(0.5, 50), st.integers(0, 50), st.floats(0, 100))


@given(st.lists(tests_of_shards, max_size=8))
def test_pooling_is_over_samples_and_not_over_shards(shards: list[tuple[int, float, int, float]]) -> None:
    found = {number: evaluated(*shard) for number, shard in enumerate(shards)}
    used = [shard for shard in shards if shard[0]]
    loss, accuracy = pooled(found)
    if not used:
        assert (loss, accuracy) == (None, None)
        return
    assert loss == pytest.approx(sum(shard[3] for shard in used) / sum(shard[1] for shard in used))
    assert accuracy == pytest.approx(sum(shard[2] for shard in used) / sum(shard[0] for shard in used))


def test_where_clients_are_not_trusted_none_counts_for_more_samples_than_the_middle_one() -> None:
    honest = {
        shard: evaluated(samples, float(samples), samples / 2, samples * 1.0) for shard, samples in ((0, 4), (1, 8))
    }
    liar = evaluated(1 << 40, 2.0**40, 2.0**40, 0.0)
    loss, accuracy = pooled({**honest, 2: liar})
    assert (loss, accuracy) == (pytest.approx(0.0, abs=1e-9), pytest.approx(1.0))
    assert pooled({**honest, 2: liar}, trusting=False) == (12 / 20, 14 / 20)
    assert pooled({0: honest[0], 2: liar}, trusting=False) == (4 / 8, 6 / 8), "of two neither is more than the other"


def test_without_right_and_wrong_there_is_no_accuracy() -> None:
    assert pooled({0: evaluated(4, 4.0, None, 2.0), 1: evaluated(4, 4.0, 3.0, 6.0)}) == (1.0, None)
    assert pooled({}) == (None, None)


def test_a_node_that_is_started_again_in_a_round_adds_to_what_it_did_before() -> None:
    peers = PeerCounters()
    peers.heard(NodeId("1"), "a", {"steps": 5.0})
    peers.heard(NodeId("3"), "b", {})
    peers.begin(lambda _: True)
    peers.heard(NodeId("1"), "a", {"steps": 7.0})
    peers.heard(NodeId("2"), "a", {"steps": 1.0, "retries": 1.0})
    assert peers.added() == {"a": {"steps": 3.0, "retries": 1.0}, "b": {}}


def test_nodes_that_are_gone_are_forgotten_with_the_next_round() -> None:
    peers = PeerCounters()
    for number in range(3):
        peers.heard(NodeId(str(number)), "a", {"steps": 5.0})
    peers.begin(lambda node: node == "2")
    assert peers.added() == {"a": {"steps": 0.0}}
