"""What an audit finds in a store, and says where it finds nothing."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import torch

from zsfl.aggregator.audit_store import look_in_store
from zsfl.aggregator.commit import record_of
from zsfl.ids import Cid, NodeId, RunId, Version, step_cid
from zsfl.settings import NodeSettings
from zsfl.spill.layout import SpillMeta, encode
from zsfl.spill.objects import Place, name_of, store_for
from zsfl.spill.segments import joined

RUN = RunId("3fa9c1")


def run_in(folder: Path, spill: str) -> Path:
    """The folder of a run with one version."""
    folder.mkdir()
    node = {"spill": spill, "run": "", "durability": "process"}
    (folder / "settings.json").write_text(json.dumps({"node": node, "job": {"name": "job"}}))
    record = msgspec.structs.replace(record_of(Version(0), [], {}, "w"), counted=[step_cid(RUN, 0, Version(0))])
    (folder / "ledger.jsonl").write_bytes(msgspec.json.encode(record) + b"\n")
    return folder


def put(url: str, *cids: Cid) -> None:
    metas = [
        SpillMeta(cid=cid, part="body", version=Version(1), n=1.0, samples=1, loss_sum=None, client="c", node="s")
        for cid in cids
    ]
    data, _ = joined([encode(meta, {"grad/a": torch.zeros(1)}) for meta in metas])
    store = store_for(NodeSettings(spill=url), "job")
    assert store is not None
    asyncio.run(store.put(Place(RUN, NodeId("00112233aabb"), name_of(1, data)), data))
    store.close()


def test_steps_that_are_pending_in_the_store_are_found(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    cids = [step_cid(RUN, shard, Version(1)) for shard in range(3)]
    put(url, *cids)
    found = look_in_store(run_in(tmp_path / "run", url))
    assert found == (frozenset(cids), f"in {url}: spills of 3 steps", "")
    for path in (tmp_path / "store").rglob("*.spills"):
        path.write_bytes(path.read_bytes()[:-1])  # of what is half written nobody was told
    again = look_in_store(tmp_path / "run")
    assert again is not None
    assert again.cids == frozenset()


def test_a_store_that_cannot_be_looked_into_is_said_so(tmp_path: Path) -> None:
    assert look_in_store(run_in(tmp_path / "without", "")) is None
    said = look_in_store(run_in(tmp_path / "unknown", "nothing://bucket/x"))
    assert said is not None
    assert said.said.startswith("what is pending in nothing://bucket/x is not known: spills cannot go to")
    assert said.fault == ""
