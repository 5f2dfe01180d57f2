"""Numbers of shards as people write them: single ones, and ranges."""

from __future__ import annotations

import re
from collections.abc import Sequence

from zsfl.errors import ConfigError
from zsfl.words import number_of, spans


def parse_shards(text: str, total: int) -> tuple[int, ...]:
    """Shards in `text` ("3", "0-19" or "1,4-6"), sorted, each once; `ConfigError` unless below `total`."""
    try:
        given = shard_ranges(text)
    except ValueError as err:
        raise ConfigError(f"shards are {text!r}: expected {err}") from None
    beyond = [last for _, last in given if last >= total]
    if beyond:
        raise ConfigError(
            f"shard {max(beyond)} is out of range: the data has {number_of(total, 'shard')}, 0 to {total - 1}; "
            f"shards were given as {text!r}"
        )
    return tuple(sorted({shard for first, last in given for shard in range(first, last + 1)}))


def shard_ranges(text: str) -> list[tuple[int, int]]:
    """First and last shard of each range in `text`; ValueError says what is expected."""
    ranges: list[tuple[int, int]] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,9})(?:\s*-\s*([0-9]{1,9}))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise ValueError("shard numbers and rising ranges, such as 3, 0-19 or 1,4-6")
        ranges.append((first, last))
    return ranges


def clients_for(shards: Sequence[int]) -> str:
    """`a client for shard 3`, `clients for shards 0-3, 7`."""
    return f"{'a client' if len(shards) == 1 else 'clients'} for {shards_named(shards)}"


def shards_named(shards: Sequence[int]) -> str:
    """`shard 3`, `shards 0-3, 7`."""
    return f"{'shard' if len(shards) == 1 else 'shards'} {ranges(shards)}"


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers for people: `0-3, 7`."""
    return ", ".join(spans(numbers))
