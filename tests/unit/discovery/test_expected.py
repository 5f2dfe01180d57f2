"""Which keys are tried at an address."""

from __future__ import annotations

from zsfl.discovery.expected import MAX_KEYS_TRIED, ExpectedKeys
from zsfl.ids import Address

HERE = Address("10.0.0.1:7700")


def test_an_expected_key_comes_first_and_all_others_soon_after_the_newest_before_the_oldest() -> None:
    keys = ExpectedKeys()
    assert keys.next_of(HERE, ("own", "old", "new")) == ((), ["own", "new", "old"])
    keys.hinted(HERE, "old")
    assert keys.next_of(HERE, ("own", "old", "new")) == (("old",), ["own", "new"])
    assert keys.next_of(HERE, ("own", "new")) == ((), ["own", "new"]), "it is trusted no more"
    assert keys.next_of(HERE, ("",)) == ((), [""]), "no keys are used"


def test_no_hint_takes_the_place_of_a_key_that_was_answered_to() -> None:
    keys = ExpectedKeys()
    keys.hinted(HERE, "lie")
    keys.answered(HERE, "right")
    keys.hinted(HERE, "lie")
    assert keys.next_of(HERE, ("own", "lie", "right")) == (("right",), ["own", "lie"])
    keys.answered(HERE, "own")
    assert keys.next_of(HERE, ("own", "lie", "right"))[0] == ("own",)


def test_where_more_are_trusted_than_are_tried_at_once_each_has_its_turn() -> None:
    keys, trusted = ExpectedKeys(), [f"key-{number}" for number in range(3 * MAX_KEYS_TRIED + 5)]
    keys.hinted(HERE, "key-7")
    tries = [keys.next_of(HERE, trusted) for _ in range(4)]
    assert {known for known, _ in tries} == {("key-7",)}
    assert all(len(others) == MAX_KEYS_TRIED for _, others in tries)
    assert tries[0][1][:2] == ["key-0", trusted[-1]]
    assert {key for _, others in tries for key in others} == {*trusted} - {"key-7"}
