"""The same run with other numbers of split servers: how many it needs, and what bounds it then."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zsfl.client.role import AT_ONCE
from zsfl.planning.figures import Figures
from zsfl.planning.simulation import Outcome, Place, simulate
from zsfl.words import number_of

ENOUGH = 0.9
"""Of the most that split servers can bring: with so much of it there are enough."""
LARGE_STEPS = 500
"""A version of more steps takes long to simulate: fewer numbers of split servers are tried."""
FIRST = 8
EVENTS_A_STEP, LEAST_EVENTS, MOST_EVENTS = 30, 200_000, 1_000_000

SAID: dict[Place, str] = {
    "clients": "the clients' own computing",
    "client links": "the clients' links",
    "split servers": "the split servers",
    "server links": "the split servers' links",
    "aggregator": "the aggregator's computing",
    "aggregator link": "the aggregator's link",
    "cores": "this machine's cores",
}
HELP: dict[Place, str] = {
    "clients": "a smaller head and tail, or more clients",
    "client links": "fewer bytes a step (codec=), or clients nearer to the split servers",
    "split servers": "faster split servers",
    "server links": "more split servers, or fewer bytes a step (codec=)",
    "aggregator": "larger batches, or more steps a version (steps=)",
    "aggregator link": "larger batches, packed spills (codec='..., spill=...'), or more steps a version (steps=)",
    "cores": "more cores, or other machines",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What becomes of one job."""

    asked: Outcome
    """With as many split servers as were asked for."""
    tried: Sequence[Outcome]
    """With fewest first; `asked` among them."""
    needed: Outcome
    """With the fewest that are enough."""

    @property
    def says(self) -> str:
        """What bounds the run, and what would help, in some sentences."""
        asked, needed = self.asked, self.needed
        said = f"With {_servers(asked)}: {shown(asked.steps_per_s)} steps/s, bound by {SAID[asked.bottleneck]}"
        if needed.split_servers > asked.split_servers:
            after = self.tried[-1].bottleneck
            said += f"; with {_servers(needed)}: {shown(needed.steps_per_s)} steps/s"
            if after == "split servers":
                return f"{said}, and more bring little: what would help then is {HELP[after]}."
            return f"{said}, then bound by {SAID[after]}."
        if needed.split_servers < asked.split_servers:
            said += f"; {_servers(needed)} would do: {shown(needed.steps_per_s)} steps/s"
        return f"{said}. What would help is {HELP[asked.bottleneck]}."


def compare(figures: Figures, told: Callable[[Outcome], object] = lambda _: None) -> Comparison:
    """Simulate what was asked for and others; `told` of each as soon as it is known."""
    was_collecting = gc.isenabled()
    gc.disable()  # it would go through millions of objects again and again, of which none are garbage
    try:
        return _compare(figures, told)
    finally:
        if was_collecting:
            gc.enable()


def _compare(figures: Figures, told: Callable[[Outcome], object]) -> Comparison:
    of_version = figures.clients * figures.steps
    most_events = min(MOST_EVENTS, LEAST_EVENTS + 2 * EVENTS_A_STEP * of_version)
    known: dict[int, Outcome] = {}

    def at(servers: int) -> Outcome:
        if servers not in known:
            known[servers] = simulate(figures.with_servers(servers), most_events)
            told(known[servers])
        return known[servers]

    asked = at(figures.split_servers)
    if of_version > LARGE_STEPS:
        for part in (8, 4, 2):
            at(max(1, figures.split_servers // part))
        at(2 * figures.split_servers)
    else:
        _double(figures, at)
    tried = [known[servers] for servers in sorted(known)]
    needed = _needed(tried)
    if of_version <= LARGE_STEPS:
        needed = _fewest(tried, needed, at)
    tried = sorted([*tried, needed] if needed not in tried else tried, key=lambda one: one.split_servers)
    return Comparison(asked=asked, tried=tried, needed=needed)


def _double(figures: Figures, at: Callable[[int], Outcome]) -> None:
    """1, 2, 4 and so on, until more bring little, or there is one for every step that is under way."""
    servers, most = 1, figures.clients * min(AT_ONCE, figures.steps)
    while True:
        now = at(servers)
        if servers >= most or (
            servers >= max(FIRST, figures.split_servers) and now.steps_per_s * ENOUGH <= at(servers // 2).steps_per_s
        ):
            return
        servers *= 2


def _needed(tried: Sequence[Outcome]) -> Outcome:
    most = max(one.steps_per_s for one in tried)
    return next(one for one in tried if one.steps_per_s >= ENOUGH * most)


def _fewest(tried: Sequence[Outcome], needed: Outcome, at: Callable[[int], Outcome]) -> Outcome:
    """Between the largest number that is not enough and the smallest that is, the fewest that are."""
    most = max(one.steps_per_s for one in tried)
    low = max((one.split_servers for one in tried if one.split_servers < needed.split_servers), default=0)
    while needed.split_servers - low > 1:
        middle = at((low + needed.split_servers) // 2)
        if middle.steps_per_s >= ENOUGH * most:
            needed = middle
        else:
            low = middle.split_servers
    return needed


def _servers(outcome: Outcome) -> str:
    return number_of(outcome.split_servers, "split server")


def shown(value: float) -> str:
    """A rate with as many digits as say something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
