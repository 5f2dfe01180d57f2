"""A real cluster: processes, sockets, files."""

from __future__ import annotations

from pathlib import Path

import zsfl

DIGITS = Path(zsfl.__file__).with_name("demo.py")


async def test_a_cluster_of_processes_trains_and_leaves_its_results(tmp_path: Path) -> None:
    async with zsfl.LocalCluster(DIGITS, clients=3, split_servers=2, runs=tmp_path) as cluster:
        reports = [report async for report in cluster.train(rounds=2)]
    assert [report.round for report in reports] == [1, 2]
    assert all(report.accuracy is not None for report in reports)
    assert cluster.result is not None
    folder = Path(cluster.result.folder)
    left = {path.name for path in folder.iterdir()}
    assert {"metrics.jsonl", "plot.png", "model.safetensors", "load_model.py", "settings.json"} <= left
