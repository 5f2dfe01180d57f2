"""Nodes that DNS leads to one another, by a real name server, in a network of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import write_job
from helpers.names import NameServer, needs_dnsmasq
from helpers.namespaces import machine_that_asks
from helpers.processes import Command, command
from helpers.waiting import eventually

from zsfl.reports import Note, RoundReport

pytestmark = needs_dnsmasq
NAME = "nodes.zsfl.test"


def named(host: str) -> str:
    """What the node there is called."""
    return host.replace(".", "-")


@pytest.fixture
def names(tmp_path: Path) -> Iterator[tuple[NameServer, tuple[str, ...]]]:
    with machine_that_asks("127.0.0.1") as machine:
        server = NameServer(NAME, machine.inside, tmp_path)
        try:
            yield server, machine.inside
        finally:
            server.close()


async def test_nodes_follow_the_records_of_a_name_as_they_change(
    tmp_path: Path, names: tuple[NameServer, tuple[str, ...]]
) -> None:
    (server, inside), job = names, write_job(tmp_path)

    def node(role: str, host: str, *flags: str, dns: bool = True) -> Any:
        """Each at an address of its own, all at one port."""
        found = ("--dns", f"{NAME}:7700") if dns else ()
        place = ("--host", host, "--port", "7700", "--name", named(host), "--no-mdns", "--runs", host)
        return command("node", role, job, *place, *found, *flags, cwd=tmp_path, prefix=inside)

    def notes(of: Command) -> list[str]:
        return [said.message for said in of.reports() if isinstance(said, Note) and said.level == "warning"]

    def served(by: str) -> bool:
        said = [said for said in aggregator.reports() if isinstance(said, RoundReport)]
        return any(named(by) in servers for one in said for servers in one.serving.values())

    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(node("client", "127.0.0.2", "--shards", "0-1"))
        first = await stack.enter_async_context(node("split-server", "127.0.0.3"))
        aggregator = await stack.enter_async_context(node("aggregator", "127.0.0.4", "--rounds", "100000", dns=False))
        await eventually(lambda: client.process.returncode is not None or (notes(client) and notes(first)))
        assert notes(client)[0].startswith(f"looking up {NAME}: ")
        await aggregator.address()
        server.says("127.0.0.4", "127.0.0.9")  # at the second one there is nobody
        await eventually(lambda: aggregator.process.returncode is not None or served("127.0.0.3"))
        second = await stack.enter_async_context(node("split-server", "127.0.0.5", dns=False))
        await second.address()
        server.says("127.0.0.9", "127.0.0.5")
        await eventually(lambda: aggregator.process.returncode is not None or served("127.0.0.5"))
        assert aggregator.failed() is None, aggregator.text
        assert (len(notes(client)), len(notes(first)), notes(second)) == (1, 1, [])
