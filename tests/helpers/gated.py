"""A job whose first client can be held up: its samples cannot be read while a file, the gate, is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from helpers.waiting import HANG_S, eventually

_JOB = """
import pathlib, time
import torch
import torch.nn as nn
import torch.nn.functional as F
import zsfl

GATE, REACHED = pathlib.Path({gate!r}), pathlib.Path({reached!r})


class Gated(torch.utils.data.TensorDataset):
    # A subclass is read sample by sample.
    def __getitem__(self, index):
        deadline = time.monotonic() + {hang_s}  # of a test that failed
        while GATE.exists() and time.monotonic() < deadline:
            REACHED.touch()
            time.sleep(0.005)
        time.sleep({read_s})
        return super().__getitem__(index)


def model():
    return zsfl.SplitModel(head=nn.Linear(6, 8), body=nn.Sequential(nn.Linear(8, 8), nn.Tanh()), tail=nn.Linear(8, 3))


def data(shard, shards):
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(shard))
    y = x[:, :3].argmax(1)
    plain = torch.utils.data.TensorDataset
    if {tests}:
        return plain(x, y), (plain if shard else Gated)(x[:8], y[:8])
    return (plain if shard else Gated)(x, y), (plain(x[:8], y[:8]) if shard else None)


job = zsfl.Job(
    name="gated", model=model, loss=F.cross_entropy, data=data, optimizer=zsfl.sgd(lr=0.1), batch_size=10,
    rounds=3, shards=4, mode={mode},
)
"""

VERSIONS = 4
"""That a round has."""


@dataclass(frozen=True, slots=True)
class Gate:
    """Holds up what comes to it, in whatever process."""

    path: Path
    reached: Path

    def close(self) -> None:
        """From now on."""
        self.reached.unlink(missing_ok=True)
        self.path.touch()

    def open(self) -> None:
        """Let go."""
        self.path.unlink()

    async def is_reached(self) -> None:
        """Returns once something is held up."""
        await eventually(self.reached.exists)


def gated_job(folder: Path, mode: str, *, tests: bool = False, read_s: float = 0.0) -> tuple[Path, Gate]:
    """A job file of four shards of 40 samples, and the gate before the first one's training samples or `tests`, each of
    which takes `read_s` to read besides.

    That client has held-out samples only where these are what is gated: its one thread for tensors is held up whole.
    """
    gate = Gate(folder / "gate", folder / "reached")
    path = folder / "gated.py"
    places = {"gate": str(gate.path), "reached": str(gate.reached)}
    path.write_text(_JOB.format(**places, tests=tests, mode=mode, read_s=read_s, hang_s=2 * HANG_S))
    return path, gate
