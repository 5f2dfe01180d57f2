"""Batch sizes that follow speed, with clients and a clock that are simulated."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsfl.aggregator.pacing import OUTLIER, REMEMBERED, Pacer, Slices
from zsfl.ids import RunId, StepId, Version
from zsfl.learning.batches import BySpeed, by_speed

RULE = by_speed(least=4, most=400, mix=0)


def step(shard: int, version: int, k: int = 0) -> StepId:
    return StepId(RunId("3fa9c1"), Version(version), shard, k)


class Simulation:
    """Clients that make so many samples a second, each with so much to do besides, at one version after another."""

    def __init__(self, rates: Mapping[int, float], *, rule: BySpeed = RULE, steps: int = 1, besides_s: float = 0.0):
        self.rates = dict(rates)
        self.steps = steps
        self.besides_s = besides_s
        self.pacer = Pacer(rule, 64, steps)
        self.classes: dict[int, Sequence[int]] = {}
        self.version = 0
        self.now_s = 1000.0

    def seconds(self, shard: int, size: int) -> float:
        return self.besides_s + size / self.rates[shard]

    def window(self, wait: Callable[[list[float]], float] = max) -> tuple[Slices, dict[int, float]]:
        """One version, which ends after what `wait` makes of the clients' times; its slices, and these times.

        Who is not done by then drops its step.
        """
        slices = self.pacer.began(Version(self.version), sorted(self.rates), self.classes, self.now_s)
        took = {shard: self.seconds(shard, size) * self.steps for shard, (_, size) in slices.items()}
        ends = [
            (self.now_s + (k + 1) * self.seconds(shard, size), shard, k)
            for shard, (_, size) in slices.items()
            for k in range(self.steps)
        ]
        over_s = self.now_s + wait(list(took.values()))
        for end_s, shard, k in sorted(ends):
            if end_s <= over_s:
                self.pacer.arrived(step(shard, self.version, k), end_s)
        self.now_s = over_s
        self.version += 1
        return slices, took

    def sizes(self, windows: int, wait: Callable[[list[float]], float] = max) -> list[dict[int, int]]:
        return [{shard: size for shard, (_, size) in self.window(wait)[0].items()} for _ in range(windows)]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("besides_s", [0.0, 0.05])
def test_a_client_five_times_slower_gets_a_fifth_and_all_take_equally_long(steps: int, besides_s: float) -> None:
    simulation = Simulation({0: 20.0, 1: 100.0, 2: 100.0, 3: 100.0}, steps=steps, besides_s=besides_s)
    slices, took = simulation.window()
    assert {size for _, size in slices.values()} == {64}
    for _ in range(4 if not besides_s else 25):  # what does not depend on the size takes more looks
        slices, took = simulation.window()
    assert sum(size for _, size in slices.values()) == 4 * 64
    assert slices[0][1] < slices[1][1] / 4
    assert max(took.values()) < 1.15 * min(took.values())
    if not besides_s:
        assert slices[0][1] == pytest.approx(slices[1][1] / 5, abs=1)


@given(st.lists(st.floats(5, 500), min_size=1, max_size=6), st.integers(1, 3))
def test_streams_have_no_gap_and_no_overlap(rates: list[float], steps: int) -> None:
    simulation = Simulation(dict(enumerate(rates)), steps=steps)
    following = dict.fromkeys(simulation.rates, 0)
    for _ in range(6):
        for shard, (start, size) in simulation.window()[0].items():
            assert start == following[shard]
            assert RULE.least <= size <= RULE.most
            following[shard] = start + size * steps


def test_a_version_that_is_asked_for_anew_begins_at_the_same_samples() -> None:
    simulation = Simulation({0: 50.0, 1: 150.0})
    simulation.sizes(3)
    began = {
        attempt: simulation.pacer.began(Version(3), shards, {}, simulation.now_s)
        for attempt, shards in enumerate(([0, 1], [0], [0, 1]))
    }
    assert began[0] == began[2]
    assert {shard: start for shard, (start, _) in began[1].items()} == {0: began[0][0][0]}
    simulation.version = 4
    after = simulation.window()[0]
    assert all(after[shard][0] == start + size for shard, (start, size) in began[2].items())


def test_who_joins_counts_as_the_mean_and_who_returns_goes_on_where_it_was() -> None:
    simulation = Simulation({0: 50.0, 1: 150.0})
    simulation.sizes(3)
    simulation.rates[2] = 100.0
    joined = simulation.sizes(1)[0]
    assert joined == {0: 32, 1: 96, 2: 64}
    gone = simulation.rates.pop(1)
    before = simulation.window()[0]
    assert set(before) == {0, 2}
    assert sum(size for _, size in before.values()) == 2 * 64
    simulation.rates[1] = gone
    back = simulation.window()[0]
    assert back[1] == (64 + 96 + 96 + 96, 96)


def test_with_nobody_there_nothing_is_asked() -> None:
    pacer = Pacer(RULE, 64, 1)
    assert pacer.began(Version(0), [], {}, 0.0) == {}
    assert pacer.began(Version(1), [7], {7: ()}, 1.0) == {7: (0, 64)}


def test_one_odd_measurement_moves_a_speed_only_so_far() -> None:
    for seconds in (1e-6, 1e6):
        simulation = Simulation({0: 100.0, 1: 100.0})
        simulation.sizes(5)
        pacer, now_s, version = simulation.pacer, simulation.now_s, simulation.version
        size = pacer.began(Version(version), [0, 1], {}, now_s)[0][1]
        pacer.arrived(step(0, version), now_s + seconds)
        pacer.arrived(step(1, version), now_s + size / 100.0)
        sizes = pacer.began(Version(version + 1), [0, 1], {}, now_s + seconds + 1)
        assert 1 / OUTLIER < sizes[0][1] / sizes[1][1] < OUTLIER / 2


def test_a_client_that_gets_slower_or_faster_is_followed() -> None:
    simulation = Simulation({0: 100.0, 1: 100.0})
    assert simulation.sizes(5)[-1] == {0: 64, 1: 64}
    simulation.rates[0] = 25.0
    slower = simulation.sizes(20)[-1]
    assert slower[1] == pytest.approx(4 * slower[0], rel=0.1)
    simulation.rates[0] = 100.0
    again = simulation.sizes(20)[-1]
    assert again[0] == pytest.approx(64, abs=2)


def test_who_is_always_too_late_gets_less_until_it_is_in_time() -> None:
    simulation = Simulation({0: 100.0, 1: 100.0, 2: 100.0, 3: 10.0})

    def quorum(took: list[float]) -> float:
        return 1.5 * sorted(took)[2]

    first = simulation.window(quorum)
    assert first[1][3] > quorum(list(first[1].values()))
    for _ in range(20):
        simulation.window(quorum)
    for _ in range(10):
        slices, took = simulation.window(quorum)
        assert took[3] <= quorum(list(took.values()))
        assert slices[3][1] < slices[0][1] / 4


def test_a_client_that_was_still_busy_is_measured_from_when_it_was_free() -> None:
    pacer = Pacer(RULE, 64, 1)
    pacer.began(Version(0), [0, 1], {}, 0.0)
    pacer.arrived(step(0, 0), 0.64)
    slices = pacer.began(Version(1), [0, 1], {}, 1.0)
    pacer.arrived(step(1, 0), 3.2)  # 64 samples at 20 a second
    known = pacer.state()["speeds"]["1"]
    pacer.arrived(step(1, 1), 3.2 + slices[1][1] / 20)  # and these too, though version 1 began long before
    assert known > 40
    assert pacer.state()["speeds"]["1"] == pytest.approx(known + 0.3 * (20 - known))


def test_steps_that_nobody_was_asked_for_say_nothing() -> None:
    pacer = Pacer(RULE, 64, 1)
    pacer.began(Version(3), [0], {}, 10.0)
    for stranger in (step(1, 3), step(0, 2), step(0, 9)):
        pacer.arrived(stranger, 11.0)
    pacer.arrived(step(0, 3), 10.0)  # in no time: nothing can be learned of it
    assert pacer.state()["speeds"] == {}
    for version in range(4, 5 + REMEMBERED):
        pacer.began(Version(version), [0], {}, 10.0 + version)
    pacer.arrived(step(0, 3), 200.0)
    assert pacer.state()["speeds"] == {}


def test_a_checkpoint_keeps_speeds_and_positions() -> None:
    simulation = Simulation({0: 30.0, 1: 100.0, 12: 60.0})
    simulation.sizes(4)
    restored = Pacer(RULE, 64, 1)
    restored.restore(json.loads(json.dumps(simulation.pacer.state())))
    there = [0, 1, 12]
    expected = simulation.pacer.began(Version(4), there, {}, simulation.now_s)
    assert restored.began(Version(4), there, {}, 5.0) == expected


def test_the_merged_batch_keeps_the_mix_of_all_data_of_those_who_are_absent_too() -> None:
    classes = {0: (100, 0), 1: (0, 100), 2: (0, 200)}
    rule = by_speed(least=4, most=400, mix=1e6)
    pacer = Pacer(rule, 60, 1)
    assert {shard: size for shard, (_, size) in pacer.began(Version(0), [0, 1], classes, 0.0).items()} == {0: 30, 1: 90}
    there = {shard: classes[shard] for shard in (0, 1)}
    assert {shard: size for shard, (_, size) in pacer.began(Version(1), [0, 1], there, 0.0).items()} == {0: 60, 1: 60}


def test_speed_and_mix_are_weighed_against_one_another() -> None:
    rates, shares = {0: 100.0, 1: 25.0}, []
    for mix in (0.0, 1.0, 100.0):
        simulation = Simulation(rates, rule=by_speed(least=4, most=400, mix=mix))
        simulation.classes = {0: (100, 0), 1: (0, 100)}
        last = simulation.sizes(8)[-1]
        shares.append(last[1] / sum(last.values()))
    assert shares[0] == pytest.approx(0.2, abs=0.02)
    assert shares[0] + 0.1 < shares[1] < shares[2]
    assert shares[2] == pytest.approx(0.5, abs=0.02)
