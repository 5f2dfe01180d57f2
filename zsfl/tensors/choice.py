"""Which codec to use next on a link, from what sending took so far. Pure decisions: no sockets, no clock.

For each tensor role a codec costs its bytes times what a byte takes on this link, and the time of packing and
unpacking. Bytes and that time are measured wherever the codec is used; what a byte takes is the slope of wire time over
bytes, so one estimate predicts all codecs, and a link that changes is noticed by whatever is sent.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from zsfl.tensors.codec import Codec
from zsfl.tensors.spec import FLOATS, element_bytes

Role = Literal["activation", "output", "gradient", "spill", "weights"]
ROLES: tuple[Role, ...] = get_args(Role)

KEPT = 24
"""Transfers of about one size, and packings by one codec, that count."""
STALE = 2048
"""Transfers on a link after which an earlier one no longer counts."""
SIZES_PER_OCTAVE = 4
"""How finely transfers are told apart by size."""
MOST_SIZES = 64
QUICK = 0.1
"""Of what is measured several times, so many are quicker than what counts: queues and busy cores only ever add."""
LOOK_EVERY = 16
"""Choices from one look at what the codecs cost to the next: it takes much longer than a choice without."""
ENOUGH = 12
"""Transfers of one size that are believed even where larger ones were quicker: then bytes cost nothing."""
SWITCH_BELOW, SWITCH_AFTER = 0.93, 2
"""Another codec is taken when it costs at most such a part of the present one, at so many looks in a row."""
TRY_EVERY, TRY_NEW_EVERY, TRY_BELOW = 512, 16, 1.6
"""Choices from one trial of another codec to the next, and while there are some never tried; only of codecs that should
cost less than so many times the best."""
TRIAL = 12
"""Choices that a trial lasts: one transfer may have been held up, and the first few wait behind others."""
PROBE_EVERY = 1024
"""Choices from one trial of the largest codec to the next, whatever it should cost: that tells bytes from latency."""
GUESSED_S_PER_BYTE = 2e-9
"""Of packing or unpacking, until it was measured."""
GUESSED_LZ4 = 0.95
"""Share of the bytes that lz4 leaves, until it was measured."""


_Transfer = tuple[int, int, float, float]
"""Which one it was, bytes both ways, seconds on the wire, its part of these."""
_Point = tuple[float, float, int]
"""Bytes and seconds of transfers of about one size, and how many there were."""


@dataclass(slots=True)
class _Work:
    """What one codec did to the tensors of one role, each by the byte of the tensor."""

    ratios: deque[float] = field(default_factory=lambda: deque[float](maxlen=KEPT))
    pack_s: deque[float] = field(default_factory=lambda: deque[float](maxlen=KEPT))
    unpack_s: deque[float] = field(default_factory=lambda: deque[float](maxlen=KEPT))


_NONE = _Work()


@dataclass(slots=True)
class _Use:
    """The codec of one role on one link."""

    codec: Codec
    choices: int = 0
    rival: Codec | None = None
    wins: int = 0
    """Looks in a row at which the rival was clearly better."""
    trials: int = 0
    trial: Codec | None = None
    trial_left: int = 0


@dataclass(slots=True)
class _Link:
    transfers: int = 0
    by_size: dict[int, deque[_Transfer]] = field(default_factory=dict[int, deque[_Transfer]])
    uses: dict[Role, _Use] = field(default_factory=dict[Role, _Use])


class CodecChooser:
    """Chooses for each link and role, and learns from what it is told of every use."""

    def __init__(self) -> None:
        self._work: dict[tuple[Role, Codec], _Work] = {}
        self._links: dict[Hashable, _Link] = {}

    def packed(self, role: Role, codec: Codec, tensor_bytes: int, nbytes: int, seconds: float | None = None) -> None:
        """A tensor was packed; without seconds when that was done by the peer."""
        if tensor_bytes > 0:
            work = self._of(role, codec)
            work.ratios.append(nbytes / tensor_bytes)
            if seconds is not None:
                work.pack_s.append(seconds / tensor_bytes)

    def unpacked(self, role: Role, codec: Codec, tensor_bytes: int, seconds: float) -> None:
        """A tensor was unpacked here."""
        if tensor_bytes > 0:
            self._of(role, codec).unpack_s.append(seconds / tensor_bytes)

    def transferred(self, link: Hashable, nbytes: int, seconds: float, open_at_once: float = 1.0) -> None:
        """So many bytes, both ways together, took so long on the wire, beside others: so many with them in the mean.

        They shared the link, so each of them had its part of the time; but each also waited for those before it, and of
        that, its own bytes say nothing.
        """
        if nbytes <= 0 or not 0 <= seconds < math.inf:
            return
        held = self._links.setdefault(link, _Link())
        size = int(math.log2(nbytes) * SIZES_PER_OCTAVE)
        if size not in held.by_size and len(held.by_size) == MOST_SIZES:
            del held.by_size[min(held.by_size, key=lambda one: held.by_size[one][-1][0])]
        held.transfers += 1
        held.by_size.setdefault(size, deque(maxlen=KEPT)).append(
            (held.transfers, nbytes, seconds, seconds / max(open_at_once, 1.0))
        )

    def lost(self, link: Hashable) -> None:
        """That link is no more."""
        self._links.pop(link, None)

    def choose(self, link: Hashable, role: Role, candidates: Sequence[Codec]) -> Codec:
        """What to pack the next tensor of this role with: the first candidate until something is known."""
        if len(candidates) == 1:
            return candidates[0]
        held = self._links.setdefault(link, _Link())
        use = held.uses.get(role)
        if use is None or use.codec not in candidates:
            use = held.uses[role] = _Use(candidates[0])
        use.choices += 1
        if use.trial_left:
            use.trial_left -= 1
            return use.trial or use.codec
        if use.choices % LOOK_EVERY == 0:
            per_byte = self.s_per_byte(link)
            if per_byte is not None:
                costs = {codec: self._cost(role, codec, per_byte) for codec in candidates}
                self._consider(use, min(costs, key=lambda codec: costs[codec]), costs)
                use.trial = self._trial(use, role, costs)
                use.trial_left = 0 if use.trial is None else TRIAL
        return use.codec

    def settled(self, link: Hashable) -> dict[Role, Codec]:
        """What is used on that link, trials aside."""
        return {role: use.codec for role, use in self._links.get(link, _Link()).uses.items()}

    def s_per_byte(self, link: Hashable) -> float | None:
        """What one byte more takes on this link, as far as it shows; None while nothing is known."""
        held = self._links.get(link)
        if held is None or not held.transfers:
            return None
        points, most = list[_Point](), math.inf
        for transfers in held.by_size.values():
            fresh = [one for one in transfers if one[0] > held.transfers - STALE]
            if fresh:
                mean = statistics.fmean(nbytes for _, nbytes, _, _ in fresh)
                points.append((mean, _quick(seconds for _, _, seconds, _ in fresh), len(fresh)))
                most = min(most, _quick(part_s for _, _, _, part_s in fresh) / mean)
        return min(most, _slope(points, most))

    def _of(self, role: Role, codec: Codec) -> _Work:
        return self._work.setdefault((role, codec), _Work())

    @staticmethod
    def _consider(use: _Use, best: Codec, costs: dict[Codec, float]) -> None:
        """Take the best one once it was clearly better at several looks."""
        if costs[best] > SWITCH_BELOW * costs[use.codec]:
            use.rival, use.wins = None, 0
            return
        use.wins = use.wins + 1 if best == use.rival else 1
        use.rival = best
        if use.wins >= SWITCH_AFTER:
            use.codec, use.rival, use.wins = best, None, 0

    def _trial(self, use: _Use, role: Role, costs: dict[Codec, float]) -> Codec | None:
        """Now and then another codec: one that may be as good, those never tried first, or the one that sends most."""
        if use.choices % PROBE_EVERY == 0:
            return max(costs, key=lambda codec: self._ratio(role, codec))
        limit = TRY_BELOW * min(costs.values())
        others = [codec for codec in costs if codec != use.codec and costs[codec] <= limit]
        new = [codec for codec in others if (role, codec) not in self._work]
        if not others or use.choices % (TRY_NEW_EVERY if new else TRY_EVERY):
            return None
        use.trials += 1
        return new[0] if new else others[use.trials % len(others)]

    def _cost(self, role: Role, codec: Codec, per_byte: float) -> float:
        """Seconds for each byte of the tensor."""
        work = self._work.get((role, codec), _NONE)
        pack_s = self._time(codec, work.pack_s, "pack_s")
        unpack_s = self._time(codec, work.unpack_s, "unpack_s")
        return self._ratio(role, codec) * per_byte + pack_s + unpack_s

    def _ratio(self, role: Role, codec: Codec) -> float:
        ratios = self._work.get((role, codec), _NONE).ratios
        return statistics.median(ratios) if ratios else guessed_ratio(codec)

    def _time(self, codec: Codec, own: deque[float], what: Literal["pack_s", "unpack_s"]) -> float:
        """Of packing or unpacking, from this role's tensors, else those of other roles, else a guess."""
        if own:
            return _quick(own)
        others = [one for role in ROLES if (found := self._work.get((role, codec))) for one in getattr(found, what)]
        if others:
            return _quick(others)
        return 0.0 if codec == Codec() else GUESSED_S_PER_BYTE


def guessed_ratio(codec: Codec) -> float:
    """Bytes on the wire over bytes of a float32 tensor, about."""
    return element_bytes(codec.base, "float32") / FLOATS["float32"] * (GUESSED_LZ4 if codec.lz4 else 1.0)


def _slope(points: Sequence[_Point], unknown: float) -> float:
    """Seconds a byte: how much longer larger transfers take; `unknown` where all are of one size.

    The median over all pairs, those counting most that are far apart and known well: a line that outliers hardly move.
    """
    quickest = math.inf
    level: list[_Point] = []
    for nbytes, seconds, many in sorted(points, reverse=True):
        if seconds < quickest or many >= ENOUGH:  # what is smaller and took longer was held up
            quickest = min(quickest, seconds)
            level.append((nbytes, quickest, many))
    slopes = sorted(
        ((there - here) / (larger - nbytes), min(many, more) * (larger - nbytes))
        for nbytes, here, many in level
        for larger, there, more in level
        if larger > nbytes
    )
    return max(0.0, _weighted_median(slopes)) if slopes else unknown


def _quick(times: Iterable[float]) -> float:
    ordered = sorted(times)
    return ordered[int(QUICK * (len(ordered) - 1))]


def _weighted_median(values: Sequence[tuple[float, float]]) -> float:
    """Of values in order, each with its weight."""
    half, passed = sum(weight for _, weight in values) / 2, 0.0
    for value, weight in values:
        passed += weight
        if passed >= half:
            return value
    return values[-1][0]
