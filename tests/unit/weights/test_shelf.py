"""Which versions an aggregator can still hand out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zsfl.errors import StaleWeights
from zsfl.ids import BODY, Portion, Version
from zsfl.tensors.codec import unpack
from zsfl.weights import shelf as shelves
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
