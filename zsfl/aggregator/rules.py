"""What a mode asks of a window, and knows of the clients: how far each has moved the weights, and how fast each is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from zsfl.aggregator.pacing import Pacer
from zsfl.ids import Version, parse_cid
from zsfl.learning.averaging import Contribution
from zsfl.learning.batches import BySpeed
from zsfl.learning.job import Job
from zsfl.learning.modes import Async, Exact
from zsfl.learning.plan import Sizes, attempts_of, steps_of
from zsfl.learning.weighting import Shares, staleness_weight


class Rules:
    """Those of one job."""

    def __init__(self, job: Job) -> None:
        mode, by_speed = job.how, job.batches if isinstance(job.batches, BySpeed) else None
        self.is_async, self.is_exact = isinstance(mode, Async), isinstance(mode, Exact)
        self.merges = job.batch_norm == "merged"
        self.steps = steps_of(job)
        """Of each client at one version, at most."""
        self.attempts = attempts_of(job)
        """At one version, at most."""
        self.shares = Shares(mode.max_correction) if isinstance(mode, Async) else None
        self.pacer = by_speed and Pacer(by_speed, job.batch_size, job.steps)
        self.skipped = 0
        """Async: places in the data at which nobody who was there had anything to do."""

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON takes it; nothing where nothing is known."""
        rules = {"shares": self.shares, "pace": self.pacer}
        known: dict[str, Any] = {name: rule.state() for name, rule in rules.items() if rule is not None}
        return known | ({"skipped": self.skipped} if self.skipped else {})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what was known."""
        if self.shares is not None and "shares" in state:
            self.shares.restore(state["shares"])
        if self.pacer is not None and "pace" in state:
            self.pacer.restore(state["pace"])
        self.skipped = state.get("skipped", 0)

    def there(self, samples: Mapping[int, int]) -> None:
        """These shards take part, with so many training samples each."""
        if self.shares is not None:
            self.shares.there(samples)

    def weigh(self, window: Sequence[Contribution], version: Version, sizes: Sizes) -> Sequence[Contribution]:
        """What is late moves the weights less; in async mode, who contributes beyond its share counts less."""
        if self.shares is not None and window:
            samples: Counter[int] = Counter()
            for one in window:
                if one.part == "client":
                    samples[parse_cid(one.cid).shard] += one.samples
            self.shares.counted(samples, {shard: sum(batches) for shard, batches in sizes.items()})
        weighed = []
        for one in window:
            step = parse_cid(one.cid)
            scale = 1.0 if self.shares is None else self.shares.correction(step.shard)
            damping = staleness_weight(version - step.version)
            weighed.append(one if (scale, damping) == (1, 1) else replace(one, scale=scale, damping=damping))
        return weighed
