"""MicroSFL's workload on MNIST in one process, every tensor really packed and unpacked by the codecs of a plan.

The arithmetic is that of jobs/microsfl.py over 20 clients and 2 split servers, done for all clients of a window at
once; what crosses the cut is packed and unpacked for each client by itself, and each client's and each server's spills
as they would be.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

import zsfl
from zsfl.ids import RunId, Version, step_cid
from zsfl.spill.coded import SpillCoder, uncoded
from zsfl.spill.layout import SpillMeta, encode
from zsfl.tensors.codec import Codec, unpack
from zsfl.tensors.plan import CodecPlan

CLIENTS, SERVERS, BATCH, NOISE, RATE, MOMENTUM = 20, 2, 64, 0.1, 0.5, 0.9
RUN = RunId("000000")


@dataclass(slots=True)
class Outcome:
    """One training run."""

    codec: str
    seed: int
    accuracy: list[float] = field(default_factory=list[float])
    """Of the 10,000 test images after each epoch."""
    steps: int = 0
    payload_bytes: Counter[str] = field(default_factory=Counter[str])
    """All steps together, by kind of tensor: what the codecs made of the tensors."""
    spill_file_bytes: int = 0
    """Of the spills of one step as they are stored, names and checksum included."""
    codec_s: float = 0.0
    """CPU seconds of packing and unpacking, all steps together."""

    @property
    def bytes_per_step(self) -> float:
        """Payload."""
        return sum(self.payload_bytes.values()) / self.steps


class Trainer:
    """Head (frozen, with noise), body and tail, and what is done to all that travels."""

    def __init__(self, codec: str, seed: int) -> None:
        self.outcome = Outcome(codec, seed)
        self._plan = CodecPlan.parse(codec)
        torch.manual_seed(seed)
        self._head, self._body, self._tail = (torch.nn.Linear(*size) for size in ((784, 64), (64, 64), (64, 10)))
        self._weights = [*self._body.parameters(), *self._tail.parameters()]
        self._optimizer = torch.optim.SGD(self._weights, lr=RATE, momentum=MOMENTUM)
        coder = self._plan.spill[0], self._plan.feedback
        self._client_coder = SpillCoder(coder[0], feedback=coder[1])
        self._server_coders = [SpillCoder(coder[0], feedback=coder[1]) for _ in range(SERVERS)]

    def train(self, epochs: int) -> Outcome:
        """Train and test."""
        x, y, test_x, test_y = _mnist()
        version = 0
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(CLIENTS * BATCH):
                self._window(x[rows], y[rows], version)
                version += 1
            self.outcome.accuracy.append(self._test(test_x, test_y))
        return self.outcome

    def _activations(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            hidden = self._head(x)
            return hidden + NOISE * torch.randn_like(hidden)

    def _window(self, x: torch.Tensor, y: torch.Tensor, version: int) -> None:
        """One step of every client, and the optimizer's."""
        sizes = [len(part) for part in x.split(BATCH)]
        hidden = self._sent("activation", self._activations(x), self._plan.activation[0])
        with torch.no_grad():
            before = F.linear(hidden, self._body.weight, self._body.bias)
            output = self._sent("output", before.relu(), self._plan.output[0])
            error = torch.softmax(self._tail(output), 1)
            error[torch.arange(len(y)), y] -= 1
            gradient = self._sent("gradient", error @ self._tail.weight, self._plan.gradient[0]) * (before > 0)
        totals = [torch.zeros_like(weight) for weight in self._weights]
        pieces = zip(*(tensor.split(sizes) for tensor in (hidden, output, error, gradient)), strict=True)
        for client, (h, o, e, g) in enumerate(pieces):
            body = {"grad/body.0.weight": g.T @ h, "grad/body.0.bias": g.sum(0)}
            tail = {"grad/tail.weight": e.T @ o, "grad/tail.bias": e.sum(0)}
            found = [
                *self._spilled("body", self._server_coders[client % SERVERS], body, client, version).values(),
                *self._spilled("client", self._client_coder, tail, client, version).values(),
            ]
            for total, tensor in zip(totals, found, strict=True):
                total += tensor
        for weight, total in zip(self._weights, totals, strict=True):
            weight.grad = total / len(y)
        self._optimizer.step()
        self.outcome.steps += len(sizes)

    def _sent(self, kind: str, tensor: torch.Tensor, codec: Codec) -> torch.Tensor:
        """What comes of a tensor that each client sends or is sent its part of."""
        begun_s, parts = time.thread_time(), list[torch.Tensor]()
        for part in tensor.split(BATCH):
            spec, data = codec.pack(kind, part)
            self.outcome.payload_bytes[kind] += spec.nbytes
            parts.append(unpack(spec, bytearray(data) if codec == Codec() else data))
        self.outcome.codec_s += time.thread_time() - begun_s
        return torch.cat(parts)

    def _spilled(
        self, part: Any, coder: SpillCoder, tensors: dict[str, torch.Tensor], client: int, version: int
    ) -> dict[str, torch.Tensor]:
        """What comes of a contribution."""
        cid, n = step_cid(RUN, client, Version(version)), float(BATCH)
        meta = SpillMeta(
            cid=cid,
            part=part,
            version=Version(version),
            n=n,
            samples=BATCH,
            loss_sum=1.0,
            client="client-0",
            node="node-0",
        )
        begun_s = time.thread_time()
        stored = coder.coded(meta, tensors)
        back = uncoded(dict(stored))
        self.outcome.codec_s += time.thread_time() - begun_s
        self.outcome.payload_bytes[f"spill of the {part}"] += sum(tensor.nbytes for tensor in stored.values())
        if version == 0 and client == 0:
            self.outcome.spill_file_bytes += len(encode(meta, stored))
        return {name: back[name] for name in tensors}

    def _test(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """Activations and outputs travel as the plan has it for tests, in batches of 500."""
        codec, right = self._plan.test[0], 0
        with torch.no_grad():
            for rows, target in zip(x.split(500), y.split(500), strict=True):
                hidden = unpack(*codec.pack("input", self._activations(rows)))
                output = unpack(*codec.pack("output", self._body(hidden).relu()))
                right += int((self._tail(output).argmax(1) == target).sum())
        return right / len(y)


def run(codec: str, seed: int, epochs: int) -> Outcome:
    """One training run, in whichever process this is."""
    torch.set_num_threads(1)
    return Trainer(codec, seed).train(epochs)


@cache
def _mnist() -> tuple[torch.Tensor, ...]:
    train, test = zsfl.mnist(flat=True)
    return (*train.take(torch.arange(len(train))).tensors, *test.take(torch.arange(len(test))).tensors)
