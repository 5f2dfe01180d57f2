"""Which versions an aggregator can still hand out."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zsfl.errors import StaleWeights
from zsfl.ids import BODY, Portion, Version
from zsfl.tensors.bits import xor
from zsfl.tensors.codec import Codec, unpack
from zsfl.weights import shelf as shelves
from zsfl.weights.packing import Packed, State
from zsfl.weights.shelf import KEPT_VERSIONS, Shelf
from zsfl.wire.messages import FetchWeights

STATE = {"head.w": torch.arange(6.0).reshape(2, 3), "body.0.w": torch.ones(4, dtype=torch.float64)}
CLIENT, PHONE = Portion("client"), Portion("client/phone")
PORTIONS = {BODY: {"body.0.w"}, CLIENT: {"head.w"}, PHONE: {"head.w", "body.0.w"}}
SIZE_BYTES = 6 * 4 + 4 * 8


def holds(shelf: Shelf, version: int) -> bool:
    try:
        weights, _ = shelf.answer(FetchWeights(portion=BODY, version=Version(version)))
    except StaleWeights:
        return False
    assert weights.version == version
    return True


def filled(shelf: Shelf, versions: int) -> list[int]:
    """Which of so many versions are held in the end."""
    for version in range(versions):
        shelf.put(Version(version), STATE)
    return [version for version in range(versions) if holds(shelf, version)]


@pytest.mark.parametrize("portion", PORTIONS)
def test_each_portion_comes_as_it_was_put(portion: Portion) -> None:
    shelf = Shelf(PORTIONS)
    published = shelf.put(Version(3), STATE)
    for request in (FetchWeights(portion=portion, version=Version(3)), FetchWeights(portion=portion, version=None)):
        weights, buffers = shelf.answer(request)
        assert (weights, buffers) == published[portion]
        assert (weights.portion, weights.version) == (portion, 3)
        assert {spec.name for spec in weights.tensors} == PORTIONS[portion]
        for spec, buffer in zip(weights.tensors, buffers, strict=True):
            assert torch.equal(unpack(spec, buffer), STATE[spec.name])
            assert unpack(spec, buffer).dtype == STATE[spec.name].dtype


def test_a_portion_that_this_job_does_not_have_is_refused() -> None:
    shelf = Shelf(PORTIONS)
    shelf.put(Version(0), STATE)
    with pytest.raises(StaleWeights, match=r"no portion 'client/tablet' of the weights: do all nodes"):
        shelf.answer(FetchWeights(portion=Portion("client/tablet"), version=None))


def test_the_newest_versions_are_kept_and_more_for_those_who_may_be_late() -> None:
    assert filled(Shelf(PORTIONS), 9) == list(range(9 - KEPT_VERSIONS, 9))
    assert filled(Shelf(PORTIONS, max_staleness=5), 9) == list(range(2, 9))
    assert filled(Shelf(PORTIONS, max_staleness=1), 9) == list(range(9 - KEPT_VERSIONS, 9))


@pytest.mark.parametrize(("room", "kept"), [(0, KEPT_VERSIONS), (6, 6), (1000, 12)])
def test_more_than_a_few_are_kept_only_while_there_is_room(
    room: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelves, "KEPT_BYTES", room * SIZE_BYTES + 1)
    assert filled(Shelf(PORTIONS, max_staleness=10), 20) == list(range(20 - kept, 20))


def test_what_is_not_held_is_refused_and_it_is_said_what_is() -> None:
    shelf = Shelf(PORTIONS)
    for version in (None, Version(2)):
        with pytest.raises(StaleWeights, match="is not held, only none"):
            shelf.answer(FetchWeights(portion=BODY, version=version))
    filled(shelf, 9)
    with pytest.raises(
        StaleWeights, match="version 2 is not held, only those from 5 to 8; redo the step at the newest"
    ):
        shelf.answer(FetchWeights(portion=BODY, version=Version(2)))


def moved(times: int) -> dict[str, torch.Tensor]:
    """A little, from a start that is the same each time; `seen` counts."""
    generator = torch.Generator().manual_seed(1)
    states = {
        "head.w": torch.randn(300, 100, generator=generator),
        "body.0.w": torch.randn(20_000, generator=generator),
    }
    for _ in range(times):
        states = {
            name: tensor + 1e-4 * torch.randn(tensor.shape, generator=generator) for name, tensor in states.items()
        }
    return {**states, "body.0.seen": torch.tensor(times), "body.0.nothing": torch.empty(0, 3)}


MOVING = {BODY: {"body.0.w", "body.0.seen", "body.0.nothing"}, CLIENT: {"head.w"}}
PACKING = Codec.parse("raw+shuffle+lz4")


def size(packed: Packed) -> int:
    weights, buffers = packed
    assert [spec.nbytes for spec in weights.tensors] == list(map(len, buffers))
    return sum(map(len, buffers))


def tensors(packed: Packed) -> dict[str, torch.Tensor]:
    return {spec.name: unpack(spec, buffer) for spec, buffer in zip(packed[0].tensors, packed[1], strict=True)}


def assert_same(mine: State, portion: Portion, state: State) -> None:
    assert mine.keys() == MOVING[portion]
    for name, tensor in mine.items():
        assert torch.equal(tensor, state[name])


def test_what_is_published_differs_from_what_was_published_before_and_what_is_asked_for_is_whole() -> None:
    shelf = Shelf(MOVING, codec=PACKING, differences=True)
    for version in range(4, 9):
        state = moved(version)
        published = shelf.put(Version(version), state)
        for portion, packed in published.items():
            weights = packed[0]
            assert (weights.portion, weights.version) == (portion, version)
            assert weights.base == (None if version == 4 else version - 1)
            made = tensors(packed)
            if weights.base is not None:
                made = {name: xor(tensor, moved(version - 1)[name]) for name, tensor in made.items()}
            assert_same(made, portion, state)
    for version in range(8 - KEPT_VERSIONS + 1, 9):
        for portion in MOVING:
            for _ in range(2):
                whole = shelf.answer(FetchWeights(portion=portion, version=Version(version)))
                assert (whole[0].version, whole[0].base) == (version, None)
                assert_same(tensors(whole), portion, moved(version))


def test_differences_are_shorter_than_whole_versions() -> None:
    sizes: dict[str, int] = {}
    for name, shelf in {
        "raw": Shelf(MOVING),
        "packed": Shelf(MOVING, codec=PACKING),
        "differences": Shelf(MOVING, codec=PACKING, differences=True),
    }.items():
        shelf.put(Version(0), moved(0))
        sizes[name] = sum(map(size, shelf.put(Version(1), moved(1)).values()))
    assert sizes["raw"] == sum(tensor.nbytes for tensor in moved(1).values())
    assert sizes["differences"] < 0.8 * sizes["raw"]
    assert sizes["differences"] < 0.8 * sizes["packed"]


def test_without_the_version_before_a_whole_one_is_published() -> None:
    shelf = Shelf(MOVING, codec=PACKING, differences=True)

    def base(version: int) -> int | None:
        (found,) = {weights.base for weights, _ in shelf.put(Version(version), moved(version)).values()}
        return found

    # What a resumed run begins with, a version that is to be tested, and what follows the former.
    assert [base(version) for version in (7, 3, 8, 9, 11, 12, 12)] == [None, None, 7, 8, None, 11, None]


def test_of_what_is_packed_the_tensors_are_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelves, "KEPT_BYTES", 0)
    packing, differing = Shelf(MOVING, codec=PACKING), Shelf(MOVING, codec=PACKING, differences=True)
    held: dict[Shelf, list[weakref.ref[torch.Tensor]]] = {packing: [], differing: []}

    def put(version: int) -> None:
        for shelf, refs in held.items():
            state = {**moved(version), "body.0.w": torch.zeros(20_000)}  # so that it is packed
            refs.append(weakref.ref(state["body.0.w"]))
            shelf.put(Version(version), state)

    def alive(shelf: Shelf) -> list[int]:
        return [version for version, ref in enumerate(held[shelf]) if ref() is not None]

    for version in range(7):
        put(version)
    assert (alive(packing), alive(differing)) == ([], [3, 4, 5, 6])
    for portion in MOVING:
        differing.answer(FetchWeights(portion=portion, version=Version(5)))
    put(7)
    assert (alive(packing), alive(differing)) == ([], [4, 6, 7])


class Keeping(RuleBasedStateMachine):
    """Versions are put, pinned and unpinned in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.shelf = Shelf(PORTIONS, max_staleness=4)
        self.newest = -1
        self.pins: list[int] = []

    @rule()
    def puts(self) -> None:
        self.newest += 1
        self.shelf.put(Version(self.newest), STATE)

    @precondition(lambda self: self.newest >= 0)
    @rule(age=st.integers(0, 9))
    def pins_one(self, age: int) -> None:
        version = max(0, self.newest - age)
        if holds(self.shelf, version):
            self.shelf.pin(Version(version))
            self.pins.append(version)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpins_one(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(self.pins))
        self.pins.remove(version)
        self.shelf.unpin(Version(version))
        self.puts()  # which is when room is made

    @invariant()
    def the_newest_and_the_pinned_are_held(self) -> None:
        newest = range(max(0, self.newest - 5), self.newest + 1)
        held = {version for version in range(self.newest + 1) if holds(self.shelf, version)}
        assert held >= {*newest, *self.pins}

    def teardown(self) -> None:
        for version in self.pins:
            self.shelf.unpin(Version(version))
        self.puts()
        held = {version for version in range(self.newest + 1) if holds(self.shelf, version)}
        assert held == set(range(max(0, self.newest - 5), self.newest + 1))


TestKeeping = Keeping.TestCase
TestKeeping.settings = settings(max_examples=30, stateful_step_count=30)
