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


def test_who_knows_what_to_check_says_it_and_what_is_usual_is_not_spoken_of() -> None:
    now_s, what = [1000.0], [""]
    waits = Waits(lambda: now_s[0])
    with waits.waiting(lambda: what[0], lambda: ("start it again",)):
        assert _said(waits, now_s[0] + LONELY_S + 0.1) == []
        assert waits.now() == []
        what[0] = "the steps of client-3"
        (said,) = waits.overdue(now_s[0] + LONELY_S + 0.2)
        assert (said.what, said.hints) == ("the steps of client-3", ("start it again",))
        assert waits.now() == [("the steps of client-3", 0.0)]
    with waits.waiting("an aggregator", lambda: ("start it again",)):
        (said,) = waits.overdue(now_s[0] + FIRST_WORD_S + 0.1)
        assert said.hints == ()
    with waits.waiting("a split server"), waits.waiting("a split server"):
        assert _said(waits, now_s[0] + FIRST_WORD_S + 0.1) == [("a split server", False)]
        assert _said(waits, now_s[0] + FIRST_WORD_S + 0.2) == []
