"""Whose shards are whose, where machines have keys: decisions only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping

from zsfl.errors import ConfigError
from zsfl.ids import NodeCard, PublicKey
from zsfl.keys.machine import machine_id
from zsfl.words import number_of


class Holders:
    """The key by which each shard joined: it stays that machine's while the key is trusted, unless a person says so.

    Without keys a node can say of any shard that it holds it.
    """

    def __init__(
        self,
        known: Mapping[str, Iterable[int]],
        *,
        keyed: bool,
        most: int = 0,
        reassign: Collection[int] = (),
        trusts: Callable[[str], bool] = lambda _: True,
    ) -> None:
        """`known`: shards by key. Of one key `most` can be held; those to `reassign` may go to another one once.

        `trusts`: whether clients with a key are still let in.
        """
        self._keyed = keyed
        self._most = most
        self._free = set(reassign)
        self._trusts = trusts
        self._key_of = {shard: key for key, shards in known.items() for shard in shards}

    def check(self, card: NodeCard, shards: Collection[int]) -> None:
        """ConfigError where these shards are not for this client's machine."""
        if not self._keyed:
            return
        for shard in shards:
            key = self._key_of.get(shard, card.key)
            if key != card.key and shard not in self._free and self._trusts(key):
                raise ConfigError(
                    f"shard {shard} is of the machine {machine_id(PublicKey(key))} in this run, and {card.name} is on "
                    f"{machine_id(PublicKey(card.key))}: give this client another shard; or, if that machine will not "
                    "come back, revoke its key where the run is aggregated, or start the aggregator there again with "
                    f"--resume --reassign {shard}"
                )
        held = {shard for shard, key in self._key_of.items() if key == card.key} | set(shards)
        if len(held) > self._most:
            raise ConfigError(
                f"the machine of {card.name} would hold {number_of(len(held), 'shard')}, and clients with one key may "
                f"hold {self._most}: start fewer clients there, or the aggregator with a higher --clients-per-key"
            )

    def take(self, key: str, shards: Iterable[int]) -> bool:
        """A client with this key joined with these shards; whether that is news."""
        new = {shard for shard in shards if self._key_of.get(shard) != key} if self._keyed else set[int]()
        self._free -= new & self._key_of.keys()
        self._key_of |= dict.fromkeys(new, key)
        return bool(new)

    def key_of(self, shard: int) -> str:
        """Of the machine that holds a shard; empty where none has joined with it, or no keys are used."""
        return self._key_of.get(shard, "")

    def revoked(self) -> frozenset[int]:
        """Shards of machines whose keys are not trusted any more."""
        return frozenset(shard for shard, key in self._key_of.items() if self._keyed and not self._trusts(key))

    def machines_of(self, shards: Iterable[int], but: str) -> list[str]:
        """The ids of the machines whose these are, but for the one with that key."""
        keys = dict.fromkeys(self._key_of[shard] for shard in shards if shard in self._key_of and self._keyed)
        return [machine_id(PublicKey(key)) for key in keys if key != but]

    def largest(self) -> tuple[str, int]:
        """The machine that holds most shards, and how many; none and 0 where nothing is known."""
        found = Counter(self._key_of.values()).most_common(1)
        return (machine_id(PublicKey(found[0][0])), found[0][1]) if found else ("", 0)

    def by_key(self) -> dict[str, tuple[int, ...]]:
        """Shards by key."""
        found: dict[str, list[int]] = {}
        for shard, key in sorted(self._key_of.items()):
            found.setdefault(key, []).append(shard)
        return {key: tuple(shards) for key, shards in found.items()}

    def believed(self, card: NodeCard, shards: Iterable[int]) -> tuple[int, ...]:
        """Of the shards that a client says it speaks for, those that are its machine's, or may be by now."""
        return tuple(shard for shard in shards if not self._keyed or self._may_speak(card.key, shard))

    def _may_speak(self, key: str, shard: int) -> bool:
        held = self._key_of.get(shard)
        return held is not None and (held == key or shard in self._free or not self._trusts(held))
