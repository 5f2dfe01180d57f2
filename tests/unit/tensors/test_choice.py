"""The chooser on simulated links: what it settles on, how soon, and that it stays."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zsfl.tensors.choice import CodecChooser, Role, guessed_ratio
from zsfl.tensors.codec import Codec

RAW, FP16, INT8, LZ4 = (Codec.parse(name) for name in ("raw", "fp16", "int8", "raw+lz4"))
ALL = (RAW, FP16, INT8, LZ4)
TENSOR_BYTES = 16_384
MBIT_S = 8e-6
"""Seconds a byte takes at 1 Mbit/s."""


@dataclass
class SimulatedLink:
    """Says what sending takes, and adds up what it took."""

    mbit_s: float
    latency_s: float = 2e-4
    noise: float = 0.0
    """Now and then a transfer takes so many times longer, never less long."""
    pack_s: dict[Codec, float] | None = None
    lz4_ratio: float = 1.0

    def __post_init__(self) -> None:
        self.random, self.now_s, self.used = random.Random(0), 0.0, Counter[Codec]()
        self.cpu_s = self.pack_s or {RAW: 4e-6, FP16: 2e-5, INT8: 4e-5, LZ4: 4e-5}

    def nbytes(self, codec: Codec) -> int:
        return int(TENSOR_BYTES * (self.lz4_ratio if codec == LZ4 else guessed_ratio(codec)))

    def seconds(self, codec: Codec) -> float:
        """Of one tensor, without noise and latency."""
        return self.nbytes(codec) * MBIT_S / self.mbit_s + 2 * self.cpu_s[codec]

    @property
    def best(self) -> Codec:
        return min(ALL, key=self.seconds)

    def use(
        self,
        chooser: CodecChooser,
        times: int,
        role: Role = "activation",
        name: str = "link",
        among: Sequence[Codec] = (RAW, FP16, INT8, LZ4),
    ) -> float:
        """Send so many tensors one after another; how long they took."""
        begun_s = self.now_s
        for _ in range(times):
            codec = chooser.choose(name, role, among)
            nbytes = self.nbytes(codec)
            wire_s = self.latency_s + nbytes * MBIT_S / self.mbit_s
            slow = 1 + self.noise * self.random.random() ** 4
            self.now_s += wire_s * slow + 2 * self.cpu_s[codec]
            chooser.packed(role, codec, TENSOR_BYTES, nbytes, self.cpu_s[codec] * slow)
            chooser.unpacked(role, codec, TENSOR_BYTES, self.cpu_s[codec] * slow)
            chooser.transferred(name, nbytes, wire_s * slow)
            self.used[codec] += 1
        return self.now_s - begun_s


def test_a_slow_link_gets_the_smallest_and_a_fast_one_the_quickest() -> None:
    for mbit_s, wanted in ((10, INT8), (100, INT8), (20_000, RAW)):
        link, chooser = SimulatedLink(mbit_s), CodecChooser()
        link.use(chooser, 200)
        link.used.clear()
        link.use(chooser, 300)
        assert link.used.most_common(1)[0][0] == wanted == link.best


@settings(max_examples=25, deadline=None)
@given(st.floats(1, 40_000), st.floats(1e-5, 2e-2), st.floats(0.3, 1.0))
def test_never_much_slower_than_the_best_fixed_choice(mbit_s: float, latency_s: float, lz4_ratio: float) -> None:
    link, chooser = SimulatedLink(mbit_s, latency_s, lz4_ratio=lz4_ratio), CodecChooser()
    link.use(chooser, 300)
    times = 600
    assert link.use(chooser, times) <= 1.1 * times * (link.seconds(link.best) + latency_s)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([10.0, 100.0, 1000.0]), st.integers(0, 20))
def test_noise_that_only_adds_does_not_mislead_it(mbit_s: float, seed: int) -> None:
    link, chooser = SimulatedLink(mbit_s, noise=10.0), CodecChooser()
    link.random.seed(seed)
    link.use(chooser, 300)
    link.used.clear()
    link.use(chooser, 600)
    spent = sum(count * link.seconds(codec) for codec, count in link.used.items())
    assert spent <= 1.25 * 600 * link.seconds(link.best)


def test_a_link_that_changes_is_noticed() -> None:
    link, chooser = SimulatedLink(20_000), CodecChooser()
    link.use(chooser, 500)
    assert chooser.choose("link", "activation", ALL) == RAW
    for mbit_s, wanted in ((50, INT8), (20_000, RAW), (50, INT8)):
        link.mbit_s = mbit_s
        link.use(chooser, 1500)
        link.used.clear()
        link.use(chooser, 200)
        assert link.used[wanted] >= 170


def test_it_does_not_flap_where_two_are_as_good() -> None:
    equal = {RAW: 0.0, FP16: TENSOR_BYTES / 2 * MBIT_S / 100 / 2, INT8: 1.0, LZ4: 1.0}
    link, chooser = SimulatedLink(100, pack_s=equal, noise=0.5), CodecChooser()
    link.use(chooser, 300)
    settled = [chooser.choose("link", "activation", ALL)]
    for _ in range(1000):
        link.use(chooser, 1)
        settled.append(max(link.used, key=lambda codec: link.used[codec]))
    changes = sum(one != other for one, other in pairwise(settled))
    assert changes <= 2


def test_trials_are_rare_and_hopeless_codecs_are_not_tried() -> None:
    link, chooser = SimulatedLink(10), CodecChooser()
    link.use(chooser, 300)
    link.used.clear()
    link.use(chooser, 1000)
    assert link.used[INT8] >= 970
    assert link.used[RAW] <= 24  # it would take four times as long, but tells what a byte takes


def test_roles_are_apart() -> None:
    """One kind of tensor compresses well, the other not at all."""
    chooser = CodecChooser()
    dense, sparse = SimulatedLink(1000), SimulatedLink(1000, lz4_ratio=0.1)
    for _ in range(300):
        dense.use(chooser, 1, "activation", among=(RAW, LZ4))
        sparse.use(chooser, 1, "output", among=(RAW, LZ4))
    assert dense.used.most_common(1)[0][0] == RAW
    assert sparse.used.most_common(1)[0][0] == LZ4


def test_links_are_apart_and_forgotten_when_lost() -> None:
    chooser, slow, fast = CodecChooser(), SimulatedLink(10), SimulatedLink(20_000)
    for _ in range(300):
        slow.use(chooser, 1, name="slow")
        fast.use(chooser, 1, name="fast")
    assert chooser.choose("slow", "activation", ALL) == INT8
    assert chooser.choose("fast", "activation", ALL) == RAW
    chooser.lost("slow")
    assert chooser.s_per_byte("slow") is None
    assert chooser.choose("slow", "activation", ALL) == ALL[0]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(-5, 1 << 40), st.floats(allow_nan=True, allow_infinity=True)),
        max_size=60,
    )
)
def test_whatever_it_is_told_it_chooses_one_of_the_candidates(told: list[tuple[int, float]]) -> None:
    chooser = CodecChooser()
    for nbytes, seconds in told:
        chooser.transferred("link", nbytes, seconds)
        chooser.packed("gradient", RAW, nbytes, nbytes)
        assert chooser.choose("link", "gradient", ALL) in ALL
        per_byte = chooser.s_per_byte("link")
        assert per_byte is None or per_byte >= 0


def test_the_price_of_a_byte_is_told_from_latency() -> None:
    link, chooser = SimulatedLink(100, latency_s=0.02), CodecChooser()
    link.use(chooser, 200)
    assert abs((chooser.s_per_byte("link") or 0) / (MBIT_S / 100) - 1) < 0.05


def test_of_one_candidate_there_is_no_choice() -> None:
    chooser = CodecChooser()
    assert all(chooser.choose("link", "output", (INT8,)) == INT8 for _ in range(50))


def test_other_candidates_begin_anew() -> None:
    link, chooser = SimulatedLink(10), CodecChooser()
    link.use(chooser, 300)
    assert chooser.choose("link", "activation", ALL) == INT8
    assert chooser.choose("link", "activation", (RAW, FP16)) == RAW


def test_transfers_that_share_a_link_have_each_their_part_of_its_time() -> None:
    alone, together = CodecChooser(), CodecChooser()
    for nbytes in (4_000, 16_000) * 20:
        alone.transferred("link", nbytes, nbytes * 1e-7)
        together.transferred("link", nbytes, nbytes * 8e-7, 8)
    assert together.s_per_byte("link") == pytest.approx(alone.s_per_byte("link"))
    assert alone.s_per_byte("link") == pytest.approx(1e-7)
