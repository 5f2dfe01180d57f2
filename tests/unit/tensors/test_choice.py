"""The chooser on simulated links: what it settles on, how soon, and that it stays."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from zsfl.tensors.choice import ROLES, CodecChooser, Role, guessed_ratio
from zsfl.tensors.codec import Codec

RAW, FP16, INT8, LZ4 = (Codec.parse(name) for name in ("raw", "fp16", "int8", "raw+lz4"))
ALL = (RAW, FP16, INT8, LZ4)
TENSOR_BYTES = 16_384
MBIT_S = 8e-6
"""Seconds a byte takes at 1 Mbit/s."""
LEARNED_S = 1.0
"""After which it is to know what is best."""


@dataclass
class SimulatedLink:
    """Says what sending takes, and adds up what it took."""

    mbit_s: float
    latency_s: float = 2e-4
    noise: float = 0.0
    """Now and then a transfer takes so many times longer, never less long."""
    cpu_s: dict[Codec, float] = field(default_factory=lambda: {RAW: 4e-6, FP16: 2e-5, INT8: 4e-5, LZ4: 4e-5})
    """Of packing, and as much again of unpacking at the other end."""
    lz4_ratio: float = 1.0
    under_way: int = 1
    """Requests at once; they pass one after the other, and their latencies side by side."""

    def __post_init__(self) -> None:
        self.random, self.now_s, self.used = random.Random(0), 0.0, Counter[Codec]()

    def nbytes(self, codec: Codec) -> int:
        return int(TENSOR_BYTES * (self.lz4_ratio if codec == LZ4 else guessed_ratio(codec)))

    def seconds(self, codec: Codec) -> float:
        """Of one tensor, without noise and latency."""
        return self.nbytes(codec) * MBIT_S / self.mbit_s + 2 * self.cpu_s[codec]

    @property
    def best(self) -> Codec:
        return min(ALL, key=self.seconds)

    def spend(self, chooser: CodecChooser, seconds: float) -> float:
        """Send for so long; how long a tensor took."""
        begun_s, many = self.now_s, 0
        while self.now_s < begun_s + seconds:
            many += 100
            self.use(chooser, 100)
        return (self.now_s - begun_s) / many

    def use(
        self,
        chooser: CodecChooser,
        times: int,
        role: Role = "activation",
        name: str = "link",
        among: Sequence[Codec] = ALL,
    ) -> float:
        """Send so many tensors; how long they took."""
        begun_s, sent = self.now_s, deque[Codec]()
        for number in range(times + self.under_way - 1):
            if number < times:
                chooser.asked(name, self.now_s)
                codec = chooser.choose(name, role, among)
                chooser.packed(role, codec, TENSOR_BYTES, self.nbytes(codec))
                chooser.moved(name, TENSOR_BYTES)
                sent.append(codec)
                self.used[codec] += 1
            if number >= self.under_way - 1:
                slow = 1 + self.noise * self.random.random() ** 4
                self.now_s += slow * self.seconds(sent.popleft()) + self.latency_s / self.under_way
                chooser.answered(name, self.now_s)
        return self.now_s - begun_s


def test_a_slow_link_gets_the_smallest_and_a_fast_one_the_quickest() -> None:
    for mbit_s, wanted in ((10, INT8), (100, INT8), (20_000, RAW)):
        link, chooser = SimulatedLink(mbit_s), CodecChooser()
        link.spend(chooser, LEARNED_S)
        link.used.clear()
        link.spend(chooser, LEARNED_S)
        assert link.used.most_common(1)[0][0] == wanted == link.best


@settings(max_examples=25, deadline=None)
@given(st.floats(1, 40_000), st.floats(2e-4, 2e-2), st.floats(0.3, 1.0))
def test_never_much_slower_than_the_best_fixed_choice(mbit_s: float, latency_s: float, lz4_ratio: float) -> None:
    link, chooser = SimulatedLink(mbit_s, latency_s, lz4_ratio=lz4_ratio), CodecChooser()
    link.spend(chooser, LEARNED_S)
    assert link.spend(chooser, 3 * LEARNED_S) <= 1.1 * (link.seconds(link.best) + latency_s)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([10.0, 100.0, 1000.0]), st.integers(0, 20))
def test_noise_that_only_adds_does_not_mislead_it(mbit_s: float, seed: int) -> None:
    link, chooser = SimulatedLink(mbit_s, noise=10.0), CodecChooser()
    link.random.seed(seed)
    link.spend(chooser, LEARNED_S)
    link.used.clear()
    link.spend(chooser, 2 * LEARNED_S)
    spent = sum(count * link.seconds(codec) for codec, count in link.used.items())
    assert spent <= 1.25 * link.used.total() * link.seconds(link.best)


def test_a_link_that_changes_is_noticed() -> None:
    link, chooser = SimulatedLink(20_000), CodecChooser()
    link.spend(chooser, LEARNED_S)
    assert chooser.settled("link") == {"activation": RAW}
    for mbit_s, wanted in ((50, INT8), (20_000, RAW), (50, INT8)):
        link.mbit_s = mbit_s
        link.spend(chooser, LEARNED_S)
        link.used.clear()
        link.spend(chooser, LEARNED_S)
        assert link.used[wanted] >= 0.85 * link.used.total()


def test_it_does_not_flap_where_two_are_as_good() -> None:
    equal = {RAW: 0.0, FP16: TENSOR_BYTES / 2 * MBIT_S / 100 / 2, INT8: 1.0, LZ4: 1.0}
    link, chooser = SimulatedLink(100, cpu_s=equal, noise=0.5), CodecChooser()
    link.use(chooser, 300)
    settled = [chooser.choose("link", "activation", ALL)]
    for _ in range(1000):
        link.use(chooser, 1)
        settled.append(max(link.used, key=lambda codec: link.used[codec]))
    changes = sum(one != other for one, other in pairwise(settled))
    assert changes <= 2


def test_trials_are_rare_and_hopeless_codecs_are_not_tried() -> None:
    link, chooser = SimulatedLink(10), CodecChooser()
    link.spend(chooser, LEARNED_S)
    link.used.clear()
    link.use(chooser, 1000)
    assert link.used[INT8] >= 970
    assert link.used[RAW] == 0  # it would take four times as long


def test_what_is_slower_for_everything_is_not_tried_for_one_role_alone() -> None:
    link, chooser, together = SimulatedLink(20_000), CodecChooser(), Counter[frozenset[Codec]]()
    for _ in range(2000):
        for role in ROLES[:3]:
            link.use(chooser, 1, role)
        together[frozenset(chooser.choose("link", role, ALL) for role in ROLES[:3])] += 1
    assert set(chooser.settled("link").values()) == {RAW}
    # Half of the bytes at some more work is about as quick here, and may pay for one role.
    assert together.keys() == {
        frozenset([RAW]),
        frozenset([FP16]),
        frozenset([INT8]),
        frozenset([LZ4]),
        frozenset([RAW, FP16]),
    }


def test_roles_are_apart() -> None:
    """One kind of tensor compresses well, the other not at all."""
    chooser = CodecChooser()
    dense, sparse = SimulatedLink(1000, latency_s=0.0), SimulatedLink(1000, latency_s=0.0, lz4_ratio=0.1)
    while dense.now_s < LEARNED_S:
        dense.use(chooser, 1, "activation", among=(RAW, LZ4))
        sparse.use(chooser, 1, "output", among=(RAW, LZ4))
    assert chooser.settled("link") == {"activation": RAW, "output": LZ4}


def test_links_are_apart_and_forgotten_when_lost() -> None:
    chooser, slow, fast = CodecChooser(), SimulatedLink(10), SimulatedLink(20_000)
    for _ in range(3000):
        slow.use(chooser, 1, name="slow")
        fast.use(chooser, 1, name="fast")
    assert chooser.choose("slow", "activation", ALL) == INT8
    assert chooser.choose("fast", "activation", ALL) == RAW
    chooser.lost("slow")
    assert chooser.settled("slow") == {}
    assert chooser.choose("slow", "activation", ALL) == ALL[0]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["asked", "answered", "failed", "moved", "packed", "spent"]),
            st.integers(-5, 1 << 40),
            st.floats(-1e9, 1e9),
        ),
        max_size=200,
    )
)
def test_whatever_it_is_told_it_chooses_one_of_the_candidates(told: list[tuple[str, int, float]]) -> None:
    chooser = CodecChooser()
    for what, nbytes, seconds in told:
        match what:
            case "moved":
                chooser.moved("link", nbytes)
            case "packed":
                chooser.packed("gradient", RAW, nbytes, nbytes)
            case _:
                getattr(chooser, what)("link", seconds)
        assert chooser.choose("link", "gradient", ALL) in ALL


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([20.0, 300.0, 20_000.0]), st.integers(2, 16))
def test_requests_that_share_a_link_do_not_mislead_it(mbit_s: float, under_way: int) -> None:
    link, chooser = SimulatedLink(mbit_s, under_way=under_way), CodecChooser()
    link.spend(chooser, LEARNED_S)
    assert link.spend(chooser, 3 * LEARNED_S) <= 1.1 * (link.seconds(link.best) + link.latency_s / under_way)


def test_the_time_when_nothing_was_under_way_costs_nothing() -> None:
    link, chooser = SimulatedLink(50), CodecChooser()
    for _ in range(400):
        link.now_s += link.random.random()  # a window closes, weights come
        link.use(chooser, 1)
    assert chooser.settled("link") == {"activation": INT8}


def test_where_others_decide_how_long_it_takes_the_first_candidate_stays() -> None:
    """However large they are made, requests wait for the server: nothing is lost that need not be."""
    link = SimulatedLink(1e9, latency_s=5e-3, cpu_s=dict.fromkeys(ALL, 0.0), noise=0.02)
    chooser = CodecChooser()
    link.spend(chooser, 3 * LEARNED_S)
    assert chooser.settled("link") == {"activation": ALL[0]}


def test_of_one_candidate_there_is_no_choice() -> None:
    chooser = CodecChooser()
    assert all(chooser.choose("link", "output", (INT8,)) == INT8 for _ in range(50))


def test_other_candidates_begin_anew() -> None:
    link, chooser = SimulatedLink(10), CodecChooser()
    link.spend(chooser, LEARNED_S)
    assert chooser.choose("link", "activation", ALL) == INT8
    assert chooser.choose("link", "activation", (RAW, FP16)) == RAW
