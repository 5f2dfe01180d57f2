"""How messages count things, and what somebody may have meant."""

from __future__ import annotations

from collections.abc import Iterable


def number_of(number: int, noun: str, nouns: str = "") -> str:
    """`1 client`, `2 clients`, `1,200 clients`; `nouns` where that is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def meant(given: str, known: Iterable[str]) -> str:
    """`: did you mean rounds?`, with the nearest of what is known; empty where nothing is near."""
    import difflib  # only where somebody mistyped something

    near = difflib.get_close_matches(given, list(known), 1, 0.6)
    return f": did you mean {near[0]}?" if near else ""
