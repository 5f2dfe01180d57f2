"""How messages count and name things, and what somebody may have meant."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable

FEWER = "†"
"""Marks a figure that some clients are not in."""


def number_of(number: int, noun: str, nouns: str = "") -> str:
    """`1 client`, `2 clients`, `1,200 clients`; `nouns` where that is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def meant(given: str, known: Iterable[str]) -> str:
    """`: did you mean rounds?`, with the nearest of what is known; empty where nothing is near."""
    import difflib  # only where somebody mistyped something

    near = difflib.get_close_matches(given, list(known), 1, 0.6)
    return f": did you mean {near[0]}?" if near else ""


def spans(numbers: Iterable[int]) -> list[str]:
    """Sorted numbers, those that follow one another together: `0-3`, `7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return [str(a) if a == b else f"{a}-{b}" for a, b in runs]


def short_names(names: Iterable[str]) -> str:
    """`client-[0-3,7], other` for names that differ in the number at their end."""
    numbers: defaultdict[str, list[int]] = defaultdict(list)
    rest: list[str] = []
    for name in sorted(set(names)):
        if found := re.fullmatch(r"(.*?)(0|[1-9][0-9]{0,8})", name):
            numbers[found[1]].append(int(found[2]))
        else:
            rest.append(name)
    shorts = [(prefix, ",".join(spans(sorted(found))), len(found)) for prefix, found in numbers.items()]
    grouped = [f"{prefix}[{short}]" if many > 1 else f"{prefix}{short}" for prefix, short, many in shorts]
    return ", ".join([*grouped, *rest])


def percent(share: float | None, without: Collection[str] = (), nothing: str = "-") -> str:
    """`97.78%`; `97.78%†` where it is without the samples of some clients, of whom `fewer` tells."""
    return nothing if share is None else f"{share:.2%}" + FEWER * bool(without)


def fewer(without: Iterable[str]) -> str:
    """What the mark means: who is not in a figure."""
    return f"{FEWER} without {short_names(without)}"
