"""Machine ids: short, told apart, and hard to mistype."""

from __future__ import annotations

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from zsfl.errors import ConfigError
from zsfl.ids import PublicKey
from zsfl.keys.machine import GROUP, LETTERS, check_letter, machine_id, read_machine_id

KEY = PublicKey("rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7")  # of the documentation of libzmq
ID = machine_id(KEY)
groups = st.text(LETTERS, min_size=GROUP, max_size=GROUP)


def test_an_id_is_four_groups_of_seven_letters_and_always_the_same() -> None:
    assert machine_id(KEY) == ID
    assert [len(group) for group in ID.split("-")] == [7, 7, 7, 7]
    public, _ = zmq.curve_keypair()
    assert machine_id(PublicKey(public.decode())) != ID


@pytest.mark.parametrize("typed", [ID, ID.lower(), ID.replace("-", " "), ID.replace("-", ""), f"  {ID}\n"])
def test_an_id_is_read_however_it_is_typed(typed: str) -> None:
    assert read_machine_id(typed) == ID


def test_digits_that_no_id_has_are_read_as_what_they_look_like() -> None:
    group = "OIBOIB"
    whole = "-".join([group + check_letter(group)] * 4)
    assert read_machine_id(whole.replace("O", "0").replace("I", "1").replace("B", "8")) == whole


@given(groups, st.integers(0, GROUP), st.sampled_from(LETTERS))
def test_any_one_mistyped_letter_is_found(group: str, place: int, letter: str) -> None:
    right = group + check_letter(group)
    wrong = right[:place] + letter + right[place + 1 :]
    assert (check_letter(wrong[:-1]) == wrong[-1]) == (wrong == right)


@given(groups, st.integers(0, GROUP - 1))
def test_two_letters_that_changed_places_are_found(group: str, place: int) -> None:
    right = group + check_letter(group)
    one, other = right[place], right[place + 1]
    wrong = right[:place] + other + one + right[place + 2 :]
    same = one == other or {one, other} == {LETTERS[0], LETTERS[-1]}  # the one pair that this sum does not tell apart
    assert (check_letter(wrong[:-1]) == wrong[-1]) == same


def test_what_is_wrong_with_an_id_is_said() -> None:
    third = ID.split("-")[2]
    other = "A" if third[0] != "A" else "B"
    with pytest.raises(ConfigError, match=f"group 3 of the machine id, {other}{third[1:]}, is mistyped"):
        read_machine_id(ID.replace(third, other + third[1:]))
    for text in ("", "ABCDEFG", ID + "A", ID.replace(ID[0], "!")):
        with pytest.raises(ConfigError, match="no machine id"):
            read_machine_id(text)
