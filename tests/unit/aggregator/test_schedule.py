"""Which steps make which version."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from zsfl.aggregator.schedule import Schedule
from zsfl.ids import RunId, Version, parse_cid, step_cid
from zsfl.learning.batches import batch_indices

RUN = RunId("3fa9c1")
sizes = st.dictionaries(st.integers(0, 40), st.integers(1, 50), min_size=1, max_size=5)


@given(sizes, st.integers(1, 20), st.integers(0, 3))
def test_every_sample_of_every_shard_is_used_exactly_once_a_round(
    samples: dict[int, int], batch_size: int, round_: int
) -> None:
    schedule = Schedule(run=RUN, samples=samples, batch_size=batch_size)
    used: Counter[tuple[int, int]] = Counter()
    for version in range(round_ * schedule.windows, (round_ + 1) * schedule.windows):
        found_round, window = schedule.place(Version(version))
        assert found_round == round_
        for shard in schedule.expected(Version(version)).values():
            batches = batch_indices(0, shard, round_, samples[shard], batch_size, True)
            used.update((shard, int(index)) for index in batches[window])
    assert used == Counter({(shard, index): 1 for shard, count in samples.items() for index in range(count)})


@given(sizes, st.integers(1, 20), st.integers(0, 500))
def test_expected_steps_are_named_by_their_version_and_shard_in_order(
    samples: dict[int, int], batch_size: int, version: int
) -> None:
    schedule = Schedule(run=RUN, samples=samples, batch_size=batch_size)
    found = schedule.expected(Version(version))
    assert list(found) == sorted(found)
    assert found  # no version is made of nothing
    for cid, shard in found.items():
        assert parse_cid(cid) == (RUN, version, shard)
    for shard in range(42):
        cid = step_cid(RUN, shard, Version(version))
        assert schedule.expects(cid) == (cid in found)
        assert not schedule.expects(step_cid(RunId("000000"), shard, Version(version)))


@given(sizes, st.integers(1, 20))
def test_the_last_window_is_of_the_largest_shards_only(samples: dict[int, int], batch_size: int) -> None:
    schedule = Schedule(run=RUN, samples=samples, batch_size=batch_size)
    last = schedule.expected(Version(schedule.windows - 1)).values()
    most = max(len(torch.arange(count).split(batch_size)) for count in samples.values())
    assert set(last) == {shard for shard, count in samples.items() if -(-count // batch_size) == most}
    assert set(schedule.expected(Version(0)).values()) == set(samples)
