"""Tokens survive being copied, and nothing else."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsfl.errors import ConfigError
from zsfl.keys.tokens import Invitation, from_token, to_token

INVITATION = Invitation(("192.168.1.10:7700", "10.0.0.1:7700"), bytes(range(32)), bytes(16), 1_800_000_000)
TOKEN = to_token(INVITATION)


def test_a_token_comes_back_whole_also_where_it_was_broken_over_lines() -> None:
    assert from_token(TOKEN) == INVITATION
    assert from_token(f"  {TOKEN[:40]}\n  {TOKEN[40:]}\n") == INVITATION


def test_no_shell_minds_it() -> None:
    assert set(TOKEN) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")


@given(st.integers(0, len(TOKEN) - 1), st.sampled_from("ABCXYZabc019-_."))
def test_one_wrong_letter_is_found(place: int, letter: str) -> None:
    typed = TOKEN[:place] + letter + TOKEN[place + 1 :]
    if typed == TOKEN:
        return
    with pytest.raises(ConfigError, match="no token"):
        from_token(typed)


@given(
    st.text(max_size=300) | st.binary(max_size=300).map(lambda raw: "zsfl1." + base64.urlsafe_b64encode(raw).decode())
)
def test_nonsense_is_a_clear_error(text: str) -> None:
    with pytest.raises(ConfigError, match="no token"):
        from_token(text)


@pytest.mark.parametrize("text", [TOKEN[:-1], TOKEN[:-6], TOKEN[1:], TOKEN * 50, "", "zsfl1.\u00e9"])
def test_a_part_is_no_token(text: str) -> None:
    with pytest.raises(ConfigError, match="no token"):
        from_token(text)
