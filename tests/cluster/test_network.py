"""A node on another machine takes part as any other, also one that no other machine can dial."""

from __future__ import annotations

from pathlib import Path

from helpers.jobs import write_job
from helpers.namespaces import Machine, machines
from helpers.processes import command

from zsfl.aggregator.audit import audit
from zsfl.reports import Finished, RoundReport

__all__ = ["machines"]


async def test_a_split_server_on_another_machine_is_found_and_one_behind_nat_takes_part(
    tmp_path: Path, machines: tuple[Machine, Machine]
) -> None:
    here, there = machines

    def on(machine: Machine) -> tuple[str, ...]:
        return ("--host", machine.host, "--insecure")

    job, port = write_job(tmp_path), ("--port", "7710")
    # It listens at its loopback alone: nothing that comes from outside gets there.
    hidden = ("--name", "hidden", "--behind-nat", "--peer", f"{here.host}:7710", "--no-mdns", "--insecure")
    async with (
        command("node", "split-server", job, "--name", "far", *on(there), cwd=tmp_path, prefix=there.inside) as server,
        command("node", "client", job, "--shards", "0", *on(here), cwd=tmp_path, prefix=here.inside) as client,
        command("node", "aggregator", job, *on(here), *port, cwd=tmp_path, prefix=here.inside) as aggregator,
        command("node", "client", job, "--shards", "1", *hidden, cwd=tmp_path, prefix=there.inside) as behind,
    ):
        for node in (aggregator, client, server, behind):
            assert await node.ended() == 0, node.text
    for node in (aggregator, client, server, behind):
        assert len([line for line in node.out if "INSECURE: whoever reaches" in line]) == 1
    *_, last, finished = (r for r in aggregator.reports() if isinstance(r, RoundReport | Finished))
    assert isinstance(last, RoundReport)
    assert {server for servers in last.serving.values() for server in servers} == {"far"}
    assert "hidden" in last.serving
    assert audit(tmp_path / "runs" / "tiny").faults == []
    assert isinstance(finished, Finished)
    assert finished.rounds == 3
