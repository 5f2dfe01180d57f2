"""Where the time of a step goes: of what nodes counted in a round, the mean over its steps."""

from __future__ import annotations

from collections.abc import Mapping

PARTS = ("head", "pack", "wire", "queue", "body", "tail", "back", "spill", "wait")
"""In the order in which a step goes through them, but for `wait`, which is between them.

head: forward at the client. pack: codecs there. wire: between client and server, both ways. queue: until the server
comes to it. body: forward, backward, codecs and spill there. tail: forward, loss and backward to the cut at the client.
back: backward of the head. spill: of the client's gradients. wait: for a server with room, for others, for another try.
"""


def step_time(peers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Seconds of each part; empty where no steps were timed. `peers` as in `zsfl.reports.RoundReport`."""
    sums: dict[str, float] = {}
    steps = 0.0
    for counters in peers.values():
        if "step_s" in counters:
            steps += counters.get("steps", 0.0)
        for name, amount in counters.items():
            if name.endswith("_s"):
                sums[name] = sums.get(name, 0.0) + amount
    if steps < 1 or not sums.get("step_s"):
        return {}
    mean = {part: sums.get(f"{part}_s", 0.0) / steps for part in PARTS}
    # A server may have counted what a client has not yet: heartbeats come when they come.
    mean["wire"] = max(0.0, sums.get("asked_s", 0.0) / steps - mean["queue"] - mean["body"])
    mean["wait"] = max(0.0, sums["step_s"] / steps - sum(mean.values()) + mean["wait"])
    return mean
