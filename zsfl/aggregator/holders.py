"""Whose shards are whose, where machines have keys: decisions only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from zsfl.ids import NodeCard


class Holders:
    """The key by which each shard joined last. Without keys a node can say of any shard that it holds it."""

    def __init__(self, known: Mapping[str, Iterable[int]], *, keyed: bool) -> None:
        """`known`: shards by key."""
        self._keyed = keyed
        self._key_of = {shard: key for key, shards in known.items() for shard in shards}

    def take(self, key: str, shards: Iterable[int]) -> bool:
        """A client with this key joined with these shards; whether that is news."""
        before = dict(self._key_of)
        if self._keyed:
            self._key_of |= dict.fromkeys(shards, key)
        return self._key_of != before

    def by_key(self) -> dict[str, tuple[int, ...]]:
        """Shards by key."""
        found: dict[str, list[int]] = {}
        for shard, key in sorted(self._key_of.items()):
            found.setdefault(key, []).append(shard)
        return {key: tuple(shards) for key, shards in found.items()}

    def believed(self, card: NodeCard, shards: Iterable[int]) -> tuple[int, ...]:
        """Of the shards that a client says it speaks for, those that are its machine's."""
        return tuple(shard for shard in shards if not self._keyed or self._key_of.get(shard) == card.key)
