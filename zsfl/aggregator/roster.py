"""Who holds which shard: decisions only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zsfl.errors import ConfigError
from zsfl.ids import NodeId
from zsfl.wire.messages import ShardInfo


@dataclass(slots=True)
class _Seat:
    info: ShardInfo
    node: NodeId
    name: str
    present: bool = True


class Roster:
    """Every shard of the job has one client. A client that is gone keeps its seat until somebody takes it over."""

    def __init__(self, shards: int) -> None:
        self._shards = shards
        self._seats: dict[int, _Seat] = {}

    def join(self, node: NodeId, name: str, infos: Sequence[ShardInfo]) -> None:
        """Seat a client, or refuse it with ConfigError. Joining again changes nothing."""
        for info in infos:
            if info.shard >= self._shards:
                raise ConfigError(f"shard {info.shard} is out of range: this job has shards 0 to {self._shards - 1}")
            if not info.train_samples:
                raise ConfigError(f"shard {info.shard} holds no samples; use fewer shards or give it some data")
            seat = self._seats.get(info.shard)
            if seat is not None and seat.present and seat.node != node:
                raise ConfigError(
                    f"shard {info.shard} is already held by {seat.name}; give this client another with --shard"
                )
            if seat is not None and seat.info.train_samples != info.train_samples:
                raise ConfigError(
                    f"shard {info.shard} has {info.train_samples} samples at {name} and had "
                    f"{seat.info.train_samples} when the run began; start it with the same data"
                )
        for info in infos:
            self._seats[info.shard] = _Seat(info, node, name)

    def lost(self, node: NodeId) -> None:
        """A client is gone."""
        for seat in self._seats.values():
            if seat.node == node:
                seat.present = False

    def returned(self, node: NodeId) -> None:
        """A client that counted as gone is there after all: it need not join again."""
        for seat in self._seats.values():
            if seat.node == node:
                seat.present = True

    def missing(self) -> list[int]:
        """Shards that no live client holds."""
        return [s for s in range(self._shards) if s not in self._seats or not self._seats[s].present]

    def name(self, shard: int) -> str:
        """Who holds a shard, for people."""
        seat = self._seats.get(shard)
        if seat is None:
            return f"shard {shard} (no client yet)"
        label = seat.name if seat.name.endswith(f"-{shard}") else f"{seat.name} (shard {shard})"
        return label if seat.present else f"{label}, which is gone"

    def samples(self) -> Mapping[int, int]:
        """Training samples by shard."""
        return {shard: seat.info.train_samples for shard, seat in sorted(self._seats.items())}

    def tested(self) -> frozenset[int]:
        """Shards with held-out samples."""
        return frozenset(shard for shard, seat in self._seats.items() if seat.info.test_samples)


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers for people: `0-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
