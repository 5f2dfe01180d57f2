"""Two people pair two machines by what the README says, and nothing else; then their nodes find one another."""

from __future__ import annotations

import re
from contextlib import AsyncExitStack
from pathlib import Path

from helpers.jobs import write_job
from helpers.namespaces import Machine, machines
from helpers.processes import Command, command
from helpers.waiting import eventually

from zsfl.reports import Finished, Met

__all__ = ["machines"]
README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def as_people_have_it(machine: Machine, home: Path) -> tuple[str, ...]:
    """What to put before a command to run it there, as a user with a home of its own."""
    home.mkdir(exist_ok=True)
    return (*machine.inside, "env", "-u", "XDG_CONFIG_HOME", "-u", "ZSFL_KEYS", f"HOME={home}")


async def token_of(invite: Command) -> str:
    """What it prints for the other machine."""
    await eventually(lambda: re.search(r"zsfl join (\S+)", "".join(invite.out)))
    found = re.search(r"zsfl join (\S+)", "".join(invite.out))
    assert found
    return found[1]


async def test_two_machines_are_paired_and_their_nodes_find_one_another_encrypted(
    tmp_path: Path, machines: tuple[Machine, Machine]
) -> None:
    for said in ("zsfl invite", "zsfl join TOKEN"):
        assert re.search(rf"^{said} *#", README, re.MULTILINE)
    here, there = machines
    in_here, in_there = as_people_have_it(here, tmp_path / "anna"), as_people_have_it(there, tmp_path / "bob")
    async with command("invite", cwd=tmp_path, prefix=in_here) as invite:
        async with command("join", await token_of(invite), cwd=tmp_path, prefix=in_there) as join:
            assert await join.ended() == 0, join.text
        assert await invite.ended() == 0, invite.text
    job = write_job(tmp_path)
    async with (
        AsyncExitStack() as stack,
        command("node", "split-server", job, "--host", there.host, cwd=tmp_path, prefix=in_there) as server,
        command("node", "client", job, "--shards", "0-1", "--host", here.host, cwd=tmp_path, prefix=in_here) as client,
    ):
        # Which of its addresses leads there, a machine that only looks finds out by itself.
        async with command("ls", "--peer", await client.address(), cwd=tmp_path, prefix=in_there) as ls:
            assert await ls.ended() == 0, ls.text
            assert "client-0-1" in ls.text
        aggregating = command("node", "aggregator", job, "--host", here.host, cwd=tmp_path, prefix=in_here)
        aggregator = await stack.enter_async_context(aggregating)
        for node in (aggregator, client, server):
            assert await node.ended() == 0, node.text
    assert next(report for report in aggregator.reports() if isinstance(report, Finished)).rounds == 3
    for node in (aggregator, client, server):
        assert "INSECURE" not in node.text
    for home in ("anna", "bob"):
        assert (tmp_path / home / ".config/zsfl/trusted").stat().st_mode & 0o077 == 0


async def test_a_machine_that_was_not_paired_serves_no_lan_and_comes_into_none(
    tmp_path: Path, machines: tuple[Machine, Machine]
) -> None:
    here, there = machines
    in_here, in_there = as_people_have_it(here, tmp_path / "anna"), as_people_have_it(there, tmp_path / "eve")
    job = write_job(tmp_path)
    async with command("node", "aggregator", job, "--host", here.host, cwd=tmp_path, prefix=in_here) as refused:
        assert await refused.ended() == 2
        assert "zsfl invite" in "".join(refused.err)
    # anna has been paired with somebody; eve has a key that she does not know.
    async with command("keys", "show", cwd=tmp_path, prefix=in_there) as shown:
        assert await shown.ended() == 0
    somebody = ("keys", "trust", "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7", "somebody")
    for inside in (in_here, in_there):
        async with command(*somebody, cwd=tmp_path, prefix=inside) as trusting:
            assert await trusting.ended() == 0, trusting.text
    port = ("--port", "7700")
    async with (
        command("node", "aggregator", job, "--host", here.host, *port, cwd=tmp_path, prefix=in_here) as aggregator,
        command(
            "node", "client", job, "--shards", "0-1", "--host", there.host, "--peer", f"{here.host}:7700",
            cwd=tmp_path, prefix=in_there,
        ) as client,
    ):  # fmt: skip
        await aggregator.address()
        await eventually(lambda: "no machine that this one trusts answers there" in client.text)
        async with command("drain", f"{here.host}:7700", cwd=tmp_path, prefix=in_there) as drain:
            assert await drain.ended() == 1
        assert aggregator.process.returncode is None
        assert not any(isinstance(report, Met) and report.role == "client" for report in aggregator.reports())
