"""A node on another machine takes part as any other."""

from __future__ import annotations

from pathlib import Path

from helpers.jobs import write_job
from helpers.namespaces import Machine, machines
from helpers.processes import command

from zsfl.reports import Finished, RoundReport

__all__ = ["machines"]


async def test_a_split_server_on_another_machine_is_found_and_used(
    tmp_path: Path, machines: tuple[Machine, Machine]
) -> None:
    here, there = machines

    def on(machine: Machine) -> tuple[str, ...]:
        return ("--host", machine.host, "--insecure")

    job = write_job(tmp_path)
    async with (
        command("node", "split-server", job, "--name", "far", *on(there), cwd=tmp_path, prefix=there.inside) as server,
        command("node", "client", job, "--shards", "0-1", *on(here), cwd=tmp_path, prefix=here.inside) as client,
        command("node", "aggregator", job, *on(here), cwd=tmp_path, prefix=here.inside) as aggregator,
    ):
        for node in (aggregator, client, server):
            assert await node.ended() == 0, node.text
    for node in (aggregator, client, server):
        assert len([line for line in node.out if "INSECURE: whoever reaches" in line]) == 1
    *_, last, finished = (r for r in aggregator.reports() if isinstance(r, RoundReport | Finished))
    assert isinstance(last, RoundReport)
    assert {server for servers in last.serving.values() for server in servers} == {"far"}
    assert isinstance(finished, Finished)
    assert finished.rounds == 3
