"""What a plan is made from: how many there are of whom, and what each thing they do costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Self

from zsfl.errors import ConfigError
from zsfl.learning.modes import Async, Exact, Mode

MOST_NODES = 1_000_000
"""Of one kind: more are a slip of the pen."""
MOST_COST = 1e12
"""Seconds or bytes of anything."""
AT_ONCE = 192
"""Requests that a split server admits, unless it is told otherwise: the default of `--slots`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Seconds and bytes are of one step unless something else is said. ConfigError where one makes no sense."""

    clients: int
    """Shards, each with steps of its own."""
    split_servers: int = 1
    client_nodes: int = 0
    """Processes that share the clients; 0: one each."""
    mode: Mode = field(default_factory=Exact)
    steps: int = 1
    """Of each client at one version, as `Job.steps`."""
    batch: int = 1
    samples: int = 0
    """Training samples of one client, which make its round; 0: nothing is said of rounds."""
    slots: int = AT_ONCE
    u_shaped: bool = True
    """Whether the tail is at the client, so that forward and backward are two requests."""

    head_s: float = 0.0
    tail_s: float = 0.0
    """With the loss, and backward to the cut."""
    back_s: float = 0.0
    """Backward of the head, and the client's spill."""
    forward_s: float = 0.0
    """Of the body, while nothing else is done there; without a tail all of it."""
    backward_s: float = 0.0
    """The same, with the spill."""
    on_device: bool = True
    """Whether the body computes without the processor of its machine, which matters only with `cores`."""
    client_message_s: float = 0.0
    """What a client's processor has to do with one request, and with one spill that it offers."""
    server_message_s: float = 0.0
    part_s: float = 0.0
    """Of the aggregator, with one contribution: half a step."""
    version_s: float = 0.0
    """Of the aggregator with one version: to step, record and publish."""
    follow_s: float = 0.0
    """Of every other node with one version: to take its weights."""

    activation_bytes: float = 0.0
    output_bytes: float = 0.0
    """From the body to the tail; the gradient that comes back is as long."""
    input_grad_bytes: float = 0.0
    """Sent back by the body; none where the head is frozen."""
    client_spill_bytes: float = 0.0
    body_spill_bytes: float = 0.0
    client_weights_bytes: float = 0.0
    """Of one version."""
    body_weights_bytes: float = 0.0

    link_bytes_per_s: float = math.inf
    """Of one client node, each way."""
    server_link_bytes_per_s: float = math.inf
    """Of one split server, and of the aggregator, each way."""
    latency_s: float = 0.0
    """One way, between any two nodes."""
    cores: float = 0.0
    """All nodes share a machine with so many; 0: each has a machine of its own."""
    jitter: float = 0.0
    """Whatever a client or server computes takes up to this share more or less, at random."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, most in _WHOLE.items():
            value, least = getattr(self, name), _LEAST.get(name, 1)
            if type(value) is not int or not least <= value <= most:
                raise ConfigError(f"{_said(name)} is {value!r}: use a whole number from {least} to {most}")
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name.endswith("bytes_per_s"):
                if not value > 0:
                    raise ConfigError(f"{_said(one.name)} is {value!r}: a link carries more than nothing")
            elif one.name.endswith(("_s", "_bytes", "cores")) and not 0 <= value <= MOST_COST:
                raise ConfigError(f"{_said(one.name)} is {value!r}: use a number from 0 to {MOST_COST:g}")
        if self.client_nodes > self.clients:
            raise ConfigError(f"{self.client_nodes} processes cannot share {self.clients} clients: use as many at most")
        if not 0 <= self.jitter < 1:
            raise ConfigError(f"jitter is {self.jitter!r}: use a share from 0 up to, but not, 1")
        if isinstance(self.mode, Async) and self.steps > 1:
            raise ConfigError("steps are the steps of a window, and mode async has none: leave them at 1")
        if not self.client_s + self.server_s + self.latency_s + self.wire_s:
            raise ConfigError("a step that costs nothing ends at once: say what a client, a server or a link takes")

    @property
    def client_s(self) -> float:
        """What a step takes a client's processor."""
        messages = 3 if self.u_shaped else 2
        return self.head_s + self.tail_s + self.back_s + messages * self.client_message_s

    @property
    def server_s(self) -> float:
        """What a step takes a split server."""
        messages = 3 if self.u_shaped else 2
        return self.forward_s + self.backward_s + messages * self.server_message_s

    @property
    def up_bytes(self) -> float:
        """What a client sends."""
        there = self.activation_bytes + (self.output_bytes if self.u_shaped else 0.0)
        return there + self.client_spill_bytes

    @property
    def down_bytes(self) -> float:
        """What a client is sent."""
        return self.input_grad_bytes + (self.output_bytes if self.u_shaped else 0.0)

    @property
    def wire_s(self) -> float:
        """What a step takes a client's link, one way after the other."""
        return (self.up_bytes + self.down_bytes) / self.link_bytes_per_s

    @property
    def nodes(self) -> int:
        """Processes that the clients are in."""
        return self.client_nodes or self.clients

    def with_servers(self, split_servers: int) -> Self:
        """The same with another number of split servers."""
        return replace(self, split_servers=split_servers)


_WHOLE = {
    "clients": MOST_NODES, "split_servers": MOST_NODES, "client_nodes": MOST_NODES, "steps": 1000, "batch": 2**31,
    "samples": 2**40, "slots": 2**31, "seed": 2**63 - 1,
}  # fmt: skip
_LEAST = {"client_nodes": 0, "samples": 0, "seed": 0}


def _said(name: str) -> str:
    return f"the plan's {name}"
