"""What a store has of the run whose folder is audited: steps that are pending there, and the run itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from zsfl.aggregator.commit import read_record
from zsfl.aggregator.run_folder import LEDGER, whole_lines
from zsfl.aggregator.stored_restore import look
from zsfl.errors import BadShape, ConfigError, SpillCorrupt, StorageError
from zsfl.ids import Cid, RunId, parse_cid
from zsfl.settings import NodeSettings
from zsfl.spill.index import cids_of, offer_of
from zsfl.spill.layout import decode_meta
from zsfl.spill.objects import ObjectStore, Place
from zsfl.spill.segments import parted
from zsfl.spill.shared import Shared, opened
from zsfl.words import number_of

CALL_S = 15.0
MOST_READ_BYTES = 1 << 30
"""Of all objects together: a run in progress has no more than its nodes spill between two versions."""


class InStore(NamedTuple):
    """What was found."""

    cids: frozenset[Cid]
    """Steps of which a spill is there."""
    said: str
    """For people."""
    fault: str = ""


def look_in_store(folder: Path) -> InStore | None:
    """None where the run was started without one."""
    try:
        started = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        told: Mapping[str, Any] = {
            name: str(started["node"].get(name) or "") for name in ("spill", "run", "durability")
        }
        job = str(started["job"]["name"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # a run of before there were stores, or what else says nothing of one
    if not told["spill"]:
        return None
    try:
        settings = NodeSettings(spill=told["spill"])
        files, root = opened(settings)
        objects = ObjectStore(files, root, settings.spill, job, CALL_S)
        run = Shared(files, f"{root}/{job}/runs/{told['run'] or job}", settings.spill, CALL_S, "the run")
        return asyncio.run(_look(folder, objects, run if told["durability"] == "store" else None))
    except (ConfigError, StorageError) as error:
        return InStore(frozenset(), f"what is pending in {told['spill']} is not known: {error}")


async def _look(folder: Path, objects: ObjectStore, run: Shared | None) -> InStore:
    lines = whole_lines(folder / LEDGER)
    cids, said, fault = set[Cid](), "", ""
    try:
        if (last := _run_of(lines)) is not None:
            places = await objects.found(last)
            left_bytes = MOST_READ_BYTES
            for at in places:
                left_bytes -= at.size_bytes
                if left_bytes < 0:
                    said = f", and more that is not looked at: {number_of(len(places), 'object')} are there"
                    break
                cids |= set(await _steps_in(objects, at))
        said = f"in {objects.url}: spills of {number_of(len(cids), 'step')}{said}"
        if run is not None:
            there = await look(run)
            said += "; of the run itself nothing" if there is None else f"; the run, up to version {there.version}"
            mine = b"".join(line + b"\n" for line in lines)
            if there is not None and not (mine.startswith(there.ledger) or there.ledger.startswith(mine)):
                fault = f"the run in {run.url} is another one than that in {folder}"
    finally:
        for store in (objects, run):
            if store is not None:
                store.close()
    return InStore(frozenset(cids), said, fault)


def _run_of(lines: list[bytes]) -> RunId | None:
    """Whose steps the newest version counts."""
    for line in reversed(lines):
        with suppress(StorageError, BadShape):
            if counted := read_record(line, "").record.counted:
                return parse_cid(counted[-1]).run
    return None


async def _steps_in(objects: ObjectStore, at: Place) -> Iterator[Cid]:
    """What is half written, or deleted meanwhile, has none."""
    found: list[Cid] = []
    with suppress(SpillCorrupt, BadShape):
        for _, record in parted(await objects.get(at) or b""):
            meta = decode_meta(record)
            found += cids_of(offer_of(meta, len(record)))
    return iter(found)
