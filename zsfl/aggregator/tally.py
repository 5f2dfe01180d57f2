"""Sums over the windows of a round, and the report they make. Pure; the clock is handed in."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from statistics import median_low

from zsfl.ids import Cid, NodeId, Version, parse_cid
from zsfl.learning.averaging import Contribution
from zsfl.metrics import difference
from zsfl.reports import RoundReport, WindowReport
from zsfl.wire.messages import Evaluated

WINDOW_REPORT_S = 0.1
"""Progress inside a round is reported no more often."""
MOST_COUNTED = 4096
"""Nodes whose counters are remembered, also of such as are gone: between two rounds nobody is forgotten."""


class Tally:
    """What one round adds up to."""

    def __init__(self, *, node: str, round_: int, rounds: int, windows: int, now_s: float) -> None:
        self._node = node
        self._round, self._rounds, self._windows = round_, rounds, windows
        self._begun_s = now_s
        self._reported_s = now_s
        self._loss_sum = self._weight = 0.0
        self._losses: dict[int, tuple[float, float]] = {}
        """The same two by shard."""
        self._steps = self._late = self._behind = self._dropped = 0
        self.samples = self._refused = 0
        self._served: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._last: dict[str, str] = {}

    def counted(
        self, window: Iterable[Contribution], at: Version, dropped: Collection[Cid] = (), refused: int = 0
    ) -> None:
        """The version after `at` was made of this window; these steps were dropped meanwhile, of which those that were
        refused had so many samples.
        """
        self._dropped += len(dropped)
        self._refused += refused
        for contribution in window:
            if contribution.part == "body":
                for client in [step.client for step in contribution.members] or [contribution.client]:
                    self._served[client][contribution.node] += 1
                    self._last[client] = contribution.node
            else:
                self._steps += 1
                self._late += contribution.version < at
                self._behind += at - contribution.version
                self.samples += contribution.samples
                self._weight += contribution.n
                self._loss_sum += contribution.loss_sum or 0.0
                shard = parse_cid(contribution.cid).shard
                loss_sum, weight = self._losses.get(shard, (0.0, 0.0))
                self._losses[shard] = loss_sum + (contribution.loss_sum or 0.0), weight + contribution.n

    @property
    def gone_through(self) -> int:
        """Samples of steps that came in time, be it that they were refused."""
        return self.samples + self._refused

    @property
    def train_loss(self) -> float:
        """Weighted mean of the training loss so far."""
        return self._loss_sum / self._weight if self._weight else 0.0

    def window_report(self, window: int, version: Version, now_s: float) -> WindowReport | None:
        """Progress, if some is due."""
        if now_s - self._reported_s < WINDOW_REPORT_S:
            return None
        self._reported_s = now_s
        return WindowReport(
            node=self._node,
            round=self._round,
            rounds=self._rounds,
            window=window,
            windows=self._windows,
            version=version,
            loss=self.train_loss,
            steps_per_s=self._steps / max(now_s - self._begun_s, 1e-9),
            serving=dict(self._last),
        )

    def round_report(
        self,
        version: Version,
        peers: dict[str, dict[str, float]],
        now_s: float,
        label: Callable[[int], str] = str,
    ) -> RoundReport:
        """The whole round, but for its held-out test; `peers` is what nodes added to their counters, `label` says who
        has a shard.
        """
        seconds = now_s - self._begun_s
        return RoundReport(
            node=self._node,
            round=self._round,
            rounds=self._rounds,
            version=version,
            train_loss=self.train_loss,
            train_losses={label(shard): mean_loss(*sums) for shard, sums in sorted(self._losses.items())},
            loss=None,
            accuracy=None,
            steps=self._steps,
            samples=self.samples,
            seconds=seconds,
            steps_per_s=self._steps / max(seconds, 1e-9),
            late=self._late,
            dropped=self._dropped,
            staleness=self._behind / max(self._steps, 1),
            bytes_sent=int(sum(peer.get("bytes_sent", 0.0) for peer in peers.values())),
            serving={client: dict(servers) for client, servers in sorted(self._served.items())},
            peers=peers,
        )


def mean_loss(loss_sum: float, weight: float) -> float | None:
    """Over the samples; None where there is no such number, which JSON would not have."""
    loss = loss_sum / weight if weight else math.nan
    return loss if math.isfinite(loss) else None


FAR = 1e6
"""A held-out loss so many times as far from 0 as half of the shards' (and 1) says nothing of the model."""
FAR_UNTRUSTED = 1e3
"""The same where clients are not trusted."""
MOST_SUMMED = 1e300
"""A larger sum of losses is taken for infinite, so that those of all shards together are not."""


def outliers(evaluated: Mapping[int, Evaluated], trusting: bool = True) -> frozenset[int]:
    """Shards whose loss is not finite or out of all proportion; where clients are trusted, unless most say so: then it
    is the model.
    """
    losses = {
        shard: abs(one.loss_sum) / (one.weight or 1.0) if abs(one.loss_sum) <= MOST_SUMMED else math.inf
        for shard, one in evaluated.items()
        if one.samples
    }
    finite = [loss for loss in losses.values() if loss < math.inf]
    most = (FAR if trusting else FAR_UNTRUSTED) * max(1.0, median_low(finite)) if finite else 0.0
    strange = {shard for shard, loss in losses.items() if not loss <= most}
    return frozenset(strange) if not trusting or 2 * len(strange) <= len(losses) else frozenset()


def pooled(
    evaluated: Mapping[int, Evaluated], trusting: bool = True, wrong: int = 0
) -> tuple[float | None, float | None]:
    """Loss and accuracy over all held-out samples of all shards; None where there is nothing to pool.

    How many a shard has is for its client to say. Where clients are not trusted it counts for as many as the middle
    one at most, so that nobody is all of the test; and of the `wrong` shards with the highest losses, and the lowest,
    each counts with the loss of the next one: so many liars move the loss no further than honest ones say.
    """
    results = [result for result in evaluated.values() if result.samples]
    most = math.inf if trusting or not results else median_low(result.samples for result in results)
    shares = [min(1.0, most / result.samples) for result in results]
    samples = sum(share * result.samples for share, result in zip(shares, results, strict=True))
    weight = sum(share * result.weight for share, result in zip(shares, results, strict=True))
    if not samples or not weight:
        return None, None
    sums = [result.loss_sum for result in results]
    if wrong:
        losses = [result.loss_sum / (result.weight or 1.0) for result in results]
        usual = sorted(losses)[wrong : len(losses) - wrong]
        sums = [
            min(max(loss, usual[0]), usual[-1]) * result.weight for loss, result in zip(losses, results, strict=True)
        ]
    loss = sum(share * loss_sum for share, loss_sum in zip(shares, sums, strict=True)) / weight
    right = [s * result.correct for s, result in zip(shares, results, strict=True) if result.correct is not None]
    return loss, sum(right) / samples if len(right) == len(results) else None


class PeerCounters:
    """What every node added to its counters in a round."""

    def __init__(self) -> None:
        self._names: dict[NodeId, str] = {}
        self._now: dict[NodeId, Mapping[str, float]] = {}
        self._before: dict[NodeId, Mapping[str, float]] = {}
        self._unheard: set[NodeId] = set()
        """Those who were there before, and have not told how far they had counted."""

    def heard(self, node: NodeId, name: str, counters: Mapping[str, float]) -> None:
        """A node told its counters."""
        if node in self._unheard:
            self._unheard.discard(node)
            self._before[node] = counters
        self._names[node] = name
        self._now.pop(node, None)
        self._now[node] = counters
        while len(self._now) > MOST_COUNTED:
            del self._now[longest_silent := next(iter(self._now))], self._names[longest_silent]
            self._before.pop(longest_silent, None)

    def begin(self, present: Callable[[NodeId], bool], before: Collection[NodeId] = ()) -> None:
        """A round begins: nodes that are gone are forgotten, one that comes later counts from zero.

        Of those who were there `before` with another aggregator, what they tell first is not of this round.
        """
        self._now = {node: counters for node, counters in self._now.items() if present(node)}
        self._names = {node: self._names[node] for node in self._now}
        self._before = dict(self._now)
        self._unheard = set(before) - self._now.keys()

    def added(self) -> dict[str, dict[str, float]]:
        """What was added in this round by each node's name: all starts of one node together."""
        sums: dict[str, Counter[str]] = {}
        for node, now in self._now.items():
            sums.setdefault(self._names[node], Counter()).update(difference(now, self._before.get(node, {})))
        return {name: dict(added) for name, added in sorted(sums.items())}
