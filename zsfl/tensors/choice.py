"""Which codecs a link is used with: those seen to be quicker. Pure decisions: no sockets, the clock handed in.

What a codec costs is not computed from the parts that are known of it, since the others decide as often: who waits for
whom, what the peer's processor does meanwhile, who else uses the link. Two ways to pack are tried by turns, and each
costs the time during which this link had requests under way for each byte of tensor that they moved. The codecs in
use stay until others were clearly quicker. What is known of bytes only saves trials: if bytes alone would make a codec
slower than what is in use, it is not tried.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from zsfl.tensors.codec import Codec
from zsfl.tensors.spec import FLOATS, element_bytes

Role = Literal["activation", "output", "gradient", "spill", "weights"]
ROLES: tuple[Role, ...] = get_args(Role)
Use = tuple[Role, tuple[Codec, ...]]
"""Tensors of one role that have the same codecs to choose from."""
Codecs = Mapping[Use, Codec]

BLOCK, BLOCK_S = 12, 0.025
"""Answers from which one figure is made at least, and what they take together at least: turns of a scheduler."""
TURNS = (False, True, True, False)
"""Whether the rival has its turn: so that what changes steadily meanwhile falls on both. The quicker of two blocks
counts, as queues and busy cores only ever add."""
CLEARLY, FAR = 0.93, 0.8
"""A rival wins when it costs less than such a part of what is in use: when far less at once, else at a second time."""
REST_S = 1.5
"""Seconds with requests under way from one trial to the next once all were tried."""
HOPELESS = 1.6
"""A rival that cost so many times as much is left out, until all are tried anew."""
SLOWER = 1.15
"""A codec that cost so many times as much when everything was packed with it is not tried for one role alone."""
CHANGED, CHANGED_BLOCKS = 1.5, 8
"""So many times more or less than it cost, for so many blocks in a row: the link changed, and all are tried anew."""
BYTES_APART = 0.1
"""Shares of bytes that are less apart tell nothing about what a byte costs."""
KEPT = 24
"""Packings by one codec that count."""
GUESSED_LZ4 = 0.95
"""Share of the bytes that lz4 leaves, until it was measured."""


@dataclass(slots=True)
class _Trial:
    """The codecs in use against a rival."""

    rival: Codecs
    costs: list[float] = field(default_factory=list[float])

    @property
    def turn(self) -> bool:
        """Whether it is the rival's."""
        return TURNS[len(self.costs)]


@dataclass(slots=True)
class _Link:
    used: dict[Use, Codec] = field(default_factory=dict[Use, Codec])
    open: int = 0
    """Requests under way."""
    since_s: float = 0.0
    """Of the last answer, or of the first request since nothing was under way."""
    answers: int = 0
    busy_s: float = 0.0
    moved: int = 0
    """Of the block that is being measured, the latter two in seconds and bytes of tensor."""
    skipped: int = 0
    """Answers yet to come to what was packed before the last turn."""
    trial: _Trial | None = None
    rivals: Iterator[Codecs] = field(default_factory=lambda: iter(()))
    """Those yet to be tried in this round."""
    rest_s: float = 0.0
    """Until the next trial."""
    learning: bool = True
    """The first round: one trial after another."""
    cost: float | None = None
    """Seconds a byte of the codecs in use, as of the last trial."""
    per_byte: float = 0.0
    """Seconds that one byte on the wire costs at least, as far as trials have shown."""
    changed: int = 0
    """Blocks in a row that cost something else."""
    won: Codecs | None = None
    """A rival that won, but not by far."""
    hopeless: list[Codecs] = field(default_factory=list[Codecs])
    slower: set[Codec] = field(default_factory=set[Codec])
    """When everything was packed with it, as of the last trial of that."""


class CodecChooser:
    """Chooses for each link, and learns from what it is told of every request."""

    def __init__(self) -> None:
        self._ratios: dict[tuple[Role, Codec], deque[float]] = {}
        self._links: dict[Hashable, _Link] = {}

    def packed(self, role: Role, codec: Codec, tensor_bytes: int, nbytes: int) -> None:
        """A tensor was packed, here or by a peer."""
        if tensor_bytes > 0:
            self._ratios.setdefault((role, codec), deque(maxlen=KEPT)).append(nbytes / tensor_bytes)

    def asked(self, link: Hashable, now_s: float) -> None:
        """A request is about to be packed."""
        held = self._links.setdefault(link, _Link())
        if not held.open:
            held.since_s = now_s
        held.open += 1

    def moved(self, link: Hashable, tensor_bytes: int) -> None:
        """A tensor was packed for this link, or came by it."""
        if held := self._links.get(link):
            held.moved += max(0, tensor_bytes)

    def spent(self, link: Hashable, seconds: float) -> None:
        """Unpacking took so long: more of the answer before, unless others are under way, whose time it is too."""
        if (held := self._links.get(link)) and not held.open:
            held.busy_s += max(0.0, seconds)

    def failed(self, link: Hashable, now_s: float) -> None:
        """A request got no answer that tells anything."""
        if (held := self._links.get(link)) and held.open:
            held.open -= 1
            held.since_s = now_s

    def answered(self, link: Hashable, now_s: float) -> None:
        """A request was answered."""
        held = self._links.get(link)
        if held is None or not held.open:
            return
        held.open -= 1
        took_s, held.since_s = max(0.0, now_s - held.since_s), now_s
        if held.skipped:
            held.skipped -= 1
            held.busy_s, held.moved = 0.0, 0
            return
        held.busy_s += took_s
        held.answers += 1
        if held.answers >= BLOCK and held.busy_s >= BLOCK_S and held.moved:
            self._measured(held, held.busy_s / held.moved)
            held.answers, held.busy_s, held.moved = 0, 0.0, 0

    def lost(self, link: Hashable) -> None:
        """That link is no more."""
        self._links.pop(link, None)

    def choose(self, link: Hashable, role: Role, candidates: Sequence[Codec]) -> Codec:
        """What to pack the next tensor of this role with: the first candidate until another was seen to be quicker."""
        if len(candidates) == 1:
            return candidates[0]
        held = self._links.setdefault(link, _Link())
        use = role, tuple(candidates)
        if use not in held.used:
            held.used[use] = candidates[0]
            self._begin_anew(held)
        if held.trial is not None and held.trial.turn:
            return held.trial.rival.get(use, held.used[use])
        return held.used[use]

    def settled(self, link: Hashable) -> dict[Role, Codec]:
        """What is used on that link, trials aside."""
        return {role: codec for (role, _), codec in self._links.get(link, _Link()).used.items()}

    # --- trials -----------------------------------------------------------------------------------------

    def _begin_anew(self, link: _Link) -> None:
        link.trial = link.cost = link.won = None
        link.rivals, link.learning = self._all_rivals(link), True
        link.rest_s, link.changed, link.per_byte = 0.0, 0, 0.0
        link.hopeless.clear()
        link.slower.clear()

    def _measured(self, link: _Link, cost: float) -> None:
        """A block is over."""
        if link.trial is None:
            self._look_for_change(link, cost)
            link.rest_s -= link.busy_s
            if link.rest_s <= 0:
                self._begin_trial(link)
            return
        was_rival = link.trial.turn
        link.trial.costs.append(cost)
        if len(link.trial.costs) == len(TURNS):
            self._decide(link, link.trial)
        elif link.trial.turn == was_rival:
            return
        link.skipped = link.open

    def _look_for_change(self, link: _Link, cost: float) -> None:
        if link.cost is None or link.cost / CHANGED < cost < link.cost * CHANGED:
            link.changed = 0
            return
        link.changed += 1
        if link.changed >= CHANGED_BLOCKS:
            self._begin_anew(link)

    def _begin_trial(self, link: _Link) -> None:
        link.rest_s = REST_S
        for rival in link.rivals:
            if any(link.used[use] != codec for use, codec in rival.items()) and self._may_win(link, rival):
                link.trial, link.skipped = _Trial(rival), link.open
                return
        link.rivals, link.learning = self._all_rivals(link), False

    def _decide(self, link: _Link, trial: _Trial) -> None:
        mine = min(cost for cost, rivals in zip(trial.costs, TURNS, strict=True) if not rivals)
        its = min(cost for cost, rivals in zip(trial.costs, TURNS, strict=True) if rivals)
        self._learn(link, trial.rival, mine, its)
        link.trial, link.cost = None, mine
        self._compare(link, trial.rival, mine, its)
        if its < CLEARLY * mine and (its < FAR * mine or trial.rival == link.won):
            link.used.update(trial.rival)
            link.cost, link.won = its, None
        elif its < CLEARLY * mine:
            link.won, link.trial = trial.rival, _Trial(trial.rival)
            return
        elif its > HOPELESS * mine:
            link.hopeless.append(trial.rival)
        link.won = None
        if link.learning:
            self._begin_trial(link)

    def _learn(self, link: _Link, rival: Codecs, mine: float, its: float) -> None:
        """What a byte on the wire costs, where the two differ enough in bytes."""
        here, there = self._share(link, {}), self._share(link, rival)
        if abs(here - there) > BYTES_APART:
            link.per_byte = max(0.0, (mine - its) / (here - there))

    def _compare(self, link: _Link, rival: Codecs, mine: float, its: float) -> None:
        """Mark the loser where everything was packed with one codec and with another."""
        for codecs, cost, other in (({**link.used, **rival}, its, mine), (link.used, mine, its)):
            if len(used := set(codecs.values())) == 1:
                link.slower -= used
                if cost > SLOWER * other:
                    link.slower |= used

    def _may_win(self, link: _Link, rival: Codecs) -> bool:
        if rival in link.hopeless or (len(rival) < len(link.used) and not link.slower.isdisjoint(rival.values())):
            return False
        return link.cost is None or link.per_byte * self._share(link, rival) < CLEARLY * link.cost

    def _share(self, link: _Link, rival: Codecs) -> float:
        """Bytes on the wire over bytes of tensor, if these were in use."""
        codecs = {**link.used, **rival}
        return sum(self._ratio(role, codec) for (role, _), codec in codecs.items()) / len(codecs)

    def _ratio(self, role: Role, codec: Codec) -> float:
        ratios = self._ratios.get((role, codec))
        return sorted(ratios)[len(ratios) // 2] if ratios else guessed_ratio(codec)

    def _all_rivals(self, link: _Link) -> Iterator[Codecs]:
        """First one codec for everything, those of fewest bytes before others; then another for one role alone."""
        uses = tuple(link.used)
        codecs = {codec for _, candidates in uses for codec in candidates}
        for codec in sorted(codecs, key=lambda one: (guessed_ratio(one), str(one))):
            yield {use: codec for use in uses if codec in use[1]}
        if len(uses) > 1:
            for use in uses:
                for codec in use[1]:
                    yield {use: codec}


def guessed_ratio(codec: Codec) -> float:
    """Bytes on the wire over bytes of a float32 tensor, about."""
    return element_bytes(codec.base, "float32") / FLOATS["float32"] * (GUESSED_LZ4 if codec.lz4 else 1.0)
