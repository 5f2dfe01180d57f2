"""When a node speaks of what it waits for."""

from __future__ import annotations

from zsfl.waits import FIRST_WORD_S, LONELY_S, Overdue, Waits


def _said(waits: Waits, now_s: float) -> list[tuple[str, bool]]:
    found: list[Overdue] = waits.overdue(now_s)
    return [(wait.what, wait.lonely) for wait in found]


def test_a_wait_is_spoken_of_after_a_while_and_with_hints_once_it_is_lonely() -> None:
    start_s = 1000.0
    waits = Waits(lambda: start_s)
    with waits.waiting(lambda: "an aggregator"):
        assert _said(waits, start_s) == []
        assert _said(waits, start_s + FIRST_WORD_S + 0.1) == [("an aggregator", False)]
        assert _said(waits, start_s + LONELY_S - 0.1) == []
        assert _said(waits, start_s + LONELY_S + 0.1) == [("an aggregator", True)]
        assert _said(waits, start_s + 2 * LONELY_S - 0.1) == []
        assert _said(waits, start_s + 2 * LONELY_S + 0.1) == [("an aggregator", True)]
    assert _said(waits, start_s + 100) == []
