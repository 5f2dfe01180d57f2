"""The commit records of a run, and what must always be true of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zsfl.ids import StepId, parse_cid

Record = dict[str, Any]


def ledger(folder: Path) -> list[Record]:
    """All records: each names the one before, and no step is settled twice."""
    raw = (folder / "ledger.jsonl").read_bytes().splitlines()
    records = [json.loads(line) for line in raw]
    assert [record["version"] for record in records] == list(range(1, len(records) + 1))
    digests = [hashlib.sha256(line).hexdigest() for line in raw[:-1]]
    assert [record["predecessor"] for record in records] == ["", *digests]
    settled = [cid for record in records for cid in (*record["counted"], *record["dropped"])]
    assert len(settled) == len(set(settled))
    return records


def counted(records: list[Record]) -> Iterator[tuple[StepId, int, float, float]]:
    """Every counted step: its id, how many versions late it came, and how its (S, n) and its S alone were scaled."""
    for record in records:
        for cid in record["counted"]:
            step = parse_cid(cid)
            yield step, record["version"] - 1 - step.version, *record["weighed"].get(cid, (1.0, 1.0))


def shards(record: Record) -> set[int]:
    """Whose steps a version counts."""
    return {parse_cid(cid).shard for cid in record["counted"]}


def versions(folder: Path) -> int:
    """How many versions a run has made so far."""
    path = folder / "ledger.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
