"""Nodes with keys: what travels cannot be read, the run is the same, and who is revoked is let go of at once."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers.doors import Machine
from helpers.jobs import write_job
from helpers.network import Flow, Network, free_port
from helpers.nodes import Nodes
from helpers.processes import finished
from helpers.waiting import HANG_S, eventually
from safetensors.torch import load_file

import zsfl
from zsfl import waits
from zsfl.errors import ConfigError, RemoteProtocolError, Unauthorised, Unavailable
from zsfl.ids import PROTOCOL, NodeCard, Role, RunId, Version, step_cid
from zsfl.keys.machine import machine_id
from zsfl.keys.nodes import new_node_id
from zsfl.lane import soon_in_lane
from zsfl.tensors.spec import TensorSpec
from zsfl.testing import check_equal_weights, check_history
from zsfl.wire.messages import Forward, Hello, Welcome

WINDOW = 48
"""Bytes of a tensor that are looked for in a row."""
SEEN: dict[str, set[bytes]] = defaultdict(set)
"""What a run made that nobody else should see."""


class Recorder(Network):
    """Keeps whatever passes through its proxies, connection by connection."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self.streams: list[bytearray] = []

    async def carry(self, flow: Flow, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = bytearray()
        self.streams.append(stream)
        real = writer.write

        def write(data: bytes) -> None:
            stream.extend(data)
            real(data)

        writer.write = write  # pyright: ignore[reportAttributeAccessIssue]
        await super().carry(flow, reader, writer)

    def found(self) -> set[str]:
        """Of which kinds of tensors some bytes passed."""
        everything = b"|".join(bytes(stream) for stream in self.streams)
        return {kind for kind, pieces in SEEN.items() if any(piece in everything for piece in pieces)}


def _keep(kind: str, tensor: torch.Tensor) -> None:
    raw = bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())
    if len(raw) >= WINDOW:
        SEEN[kind].add(raw[:WINDOW])


class _Head(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        h = super().forward(input)
        _keep("activations", h)
        return h


def _model() -> zsfl.SplitModel:
    """Without a tail, so that labels travel."""
    return zsfl.SplitModel(head=_Head(6, 8).double(), body=nn.Linear(8, 3).double())


def _data(shard: int, shards: int) -> tuple[torch.utils.data.TensorDataset, torch.utils.data.TensorDataset]:
    draw = torch.Generator().manual_seed(shard)
    x = torch.randn(40, 6, generator=draw, dtype=torch.float64)
    y = torch.randint(3, (40,), generator=draw)
    return torch.utils.data.TensorDataset(x, y), torch.utils.data.TensorDataset(x[:8], y[:8])


def _loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    _keep("labels", target)
    return F.cross_entropy(output, target)


JOB = zsfl.Job(
    name="watched", model=_model, loss=_loss, data=_data, optimizer=zsfl.sgd(lr=0.1, momentum=0.9), batch_size=10,
    rounds=2, shards=1,
)  # fmt: skip


@asynccontextmanager
async def recorded(monkeypatch: pytest.MonkeyPatch, folder: Path, **flags: Any) -> AsyncIterator[Recorder]:
    """A whole run, all connections of which are recorded."""
    SEEN.clear()
    network = Recorder(monkeypatch)
    nodes = Nodes(JOB, folder, network)
    try:
        seed = await nodes.start("aggregator", Role.AGGREGATOR, **flags)
        await nodes.start("server", Role.SPLIT_SERVER, peers=(seed,), **flags)
        await nodes.start("client", Role.CLIENT, peers=(seed,), shards="0", **flags)
        async with asyncio.timeout(HANG_S):
            await nodes.tasks["aggregator"]
        for tensor in load_file(folder / "nodes/model.safetensors").values():
            _keep("weights", tensor)
        yield network
    finally:
        await nodes.close()
        await network.close()


async def test_a_capture_of_an_encrypted_run_holds_none_of_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with recorded(monkeypatch, tmp_path / "plain") as network:
        assert set(SEEN) == {"activations", "labels", "weights"}
        assert network.found() == {"activations", "labels", "weights"}
        assert b"watched" in b"".join(map(bytes, network.streams))
    monkeypatch.undo()
    async with recorded(monkeypatch, tmp_path / "locked", keys=str(tmp_path / "keys")) as network:
        assert sum(map(len, network.streams)) > 50_000
        assert set(SEEN) == {"activations", "labels", "weights"}
        assert network.found() == set()
        assert b"watched" not in b"".join(map(bytes, network.streams))
    check_equal_weights(tmp_path / "plain/nodes", tmp_path / "locked/nodes")


async def test_an_encrypted_run_of_processes_equals_an_unencrypted_one_bit_for_bit(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    folders: list[Path] = []
    for name, flags in (("plain", {}), ("locked", {"keys": str(tmp_path / "keys"), "io_threads": 2})):
        async with zsfl.LocalCluster(job, split_servers=2, mdns=False, runs=tmp_path / name, **flags) as cluster:
            async for _ in cluster.train():
                pass
            assert cluster.result
            folders.append(Path(cluster.result.folder))
    check_history(folders[1])
    check_equal_weights(*folders)


async def test_who_is_revoked_is_let_go_of_at_once_and_stays_out(tmp_path: Path) -> None:
    anna, bob = Machine(tmp_path, "anna"), Machine(tmp_path, "bob")
    anna.trusts(bob)
    bob.trusts(anna)
    job = write_job(tmp_path, rounds=100_000, shards=1)
    nodes = Nodes(zsfl.load_job(job), tmp_path / "runs")
    quick: dict[str, Any] = {"beat_s": 0.2, "lost_after_s": 3.0, "patience_s": 100.0}
    at_annas, at_bobs = quick | {"keys": str(anna.folder)}, quick | {"keys": str(bob.folder)}
    try:
        seed = await nodes.start("aggregator", Role.AGGREGATOR, **at_annas)
        await nodes.start("server", Role.SPLIT_SERVER, peers=(seed,), **at_bobs)
        await nodes.start("client", Role.CLIENT, peers=(seed,), shards="0", **at_annas)
        await eventually(lambda: nodes.rounds)
        ids = {machine: machine_id(machine.key) for machine in (anna, bob)}
        assert nodes.machines == {"aggregator": ids[anna], "client": ids[anna], "server": ids[bob]}
        met = {(one.node, one.peer): one for one in nodes.met}
        assert met["aggregator", "server"].machine == ids[bob]
        assert (met["aggregator", "server"].known_as, met["aggregator", "server"].here) == ("bob", False)
        assert met["server", "aggregator"].machine == met["aggregator", "client"].machine == ids[anna]
        assert met["aggregator", "client"].here
        anna.revokes(bob)
        await eventually(lambda: any("its key is not trusted any more" in note for note in nodes.notes))
        await eventually(lambda: any("was turned away, as its key is not trusted" in note for note in nodes.notes))
        rounds = len(nodes.rounds)
        anna.trusts(bob)  # and it comes back by itself
        await eventually(lambda: len(nodes.rounds) > rounds + 1)
    finally:
        await nodes.close()
        for machine in (anna, bob):
            machine.context.destroy(linger=0)


async def test_orders_need_a_key_that_may_give_them(tmp_path: Path) -> None:
    anna, bob, eve = (Machine(tmp_path, name) for name in ("anna", "bob", "eve"))
    anna.trusts(bob)
    for machine in (bob, eve):
        machine.trusts(anna)
    nodes = Nodes(zsfl.load_job(write_job(tmp_path, shards=1)), tmp_path / "runs")
    try:
        address = await nodes.start("server", Role.SPLIT_SERVER, keys=str(anna.folder), beat_s=0.1)

        async def drained(*flags: str | Path) -> tuple[int, str]:
            code, said = await finished("drain", address, *flags, cwd=tmp_path)
            return code, "".join(said.err)

        code, said = await drained("--keys", tmp_path / "nowhere")
        assert (code, "uses keys, and this machine has none" in said) == (1, True), said
        code, said = await drained("--keys", eve.folder)
        assert (code, "does not trust this machine" in said) == (1, True), said
        anna.trusts(bob, frozenset({Role.CLIENT}))
        said = "does not trust this machine"
        while "does not trust this machine" in said:  # until the node has read the file again
            code, said = await drained("--keys", bob.folder)
        assert "Drain is not for a key that is trusted for client to say to server" in said
        assert code == 1
        assert not nodes.tasks["server"].done()
        code, said = await drained("--keys", anna.folder)
        assert (code, said) == (0, ""), (said, nodes.notes, nodes.tasks["server"])
    finally:
        await nodes.close()
        for machine in (anna, bob, eve):
            machine.context.destroy(linger=0)


async def test_one_key_after_another_is_cut_off_whatever_the_node_computes(tmp_path: Path) -> None:
    anna, bob, carl = (Machine(tmp_path, name) for name in ("anna", "bob", "carl"))
    nodes, computed = Nodes(zsfl.load_job(write_job(tmp_path, shards=1)), tmp_path / "runs"), threading.Event()
    for other in (bob, carl):
        anna.trusts(other)

    def computes() -> None:
        computed.wait()

    async def met(machine: Machine) -> None:
        connection = machine.dial(server, anna.key, watch=True)
        try:
            await connection.met
        finally:
            connection.close()

    async def until_turned_away(machine: Machine) -> None:
        with suppress(Unauthorised):
            while True:
                await met(machine)

    try:
        server = await nodes.start("server", Role.SPLIT_SERVER, keys=str(anna.folder), beat_s=0.1)
        soon_in_lane(computes)
        async with asyncio.timeout(HANG_S):
            for one in (bob, carl):
                await met(one)
                anna.revokes(one)
                await until_turned_away(one)
    finally:
        computed.set()
        await nodes.close()
        for machine in (anna, bob, carl):
            await machine.close()


async def test_where_keys_are_named_no_order_goes_without(tmp_path: Path) -> None:
    nodes = Nodes(zsfl.load_job(write_job(tmp_path, shards=1)), tmp_path / "runs")
    try:
        address = await nodes.start("server", Role.SPLIT_SERVER)
        assert nodes.machines == {"server": ""}
        code, said = await finished("drain", address, "--keys", tmp_path / "keys", cwd=tmp_path)
        assert (code, "uses no keys, and those in" in said.text) == (1, True), said.text
        code, said = await finished("drain", address, "--keys", tmp_path / "keys", "--insecure", cwd=tmp_path)
        assert (code, "--insecure says not to" in said.text) == (1, True), said.text
        assert not nodes.tasks["server"].done()
        code, said = await finished("drain", address, cwd=tmp_path)
        assert code == 0, said.text
        assert nodes.met == []
    finally:
        await nodes.close()


@pytest.mark.parametrize("locked", ["aggregator", "client"])
async def test_nodes_with_and_without_keys_say_why_they_do_not_talk(tmp_path: Path, locked: str) -> None:
    nodes = Nodes(zsfl.load_job(write_job(tmp_path, shards=1)), tmp_path / "runs")
    keys = {"keys": str(tmp_path / "keys")}
    try:
        seed = await nodes.start("aggregator", Role.AGGREGATOR, **(keys if locked == "aggregator" else {}))
        await nodes.start("client", Role.CLIENT, peers=(seed,), shards="0", **(keys if locked == "client" else {}))
        says = {
            "aggregator": "that node uses keys, and this one does not",
            "client": "that node uses no keys, and this one does",
        }
        await eventually(lambda: any(says[locked] in note for note in nodes.notes))
        if locked == "aggregator":
            await eventually(lambda: any("uses no keys tried to connect" in note for note in nodes.notes))
    finally:
        await nodes.close()


async def test_nobody_makes_the_steps_of_another_machines_shard(tmp_path: Path) -> None:
    """bob's machine, which has a client of its own in the run, asks for steps of anna's."""
    anna, bob = Machine(tmp_path, "anna"), Machine(tmp_path, "bob")
    anna.trusts(bob, frozenset({Role.CLIENT}))
    bob.trusts(anna)
    job = zsfl.load_job(write_job(tmp_path, rounds=100_000))
    nodes, bobs = Nodes(job, tmp_path / "runs"), Nodes(job, tmp_path / "bobs")
    at_annas, at_bobs = {"keys": str(anna.folder)}, {"keys": str(bob.folder)}
    try:
        seed = await nodes.start("aggregator", Role.AGGREGATOR, **at_annas)
        server = await nodes.start("server", Role.SPLIT_SERVER, peers=(seed,), **at_annas)
        await nodes.start("client-0", Role.CLIENT, peers=(seed,), shards="0", **at_annas)
        await bobs.start("client-1", Role.CLIENT, peers=(seed,), shards="1", **at_bobs)
        await eventually(lambda: nodes.rounds)

        own_id = new_node_id(bob.key)
        card = NodeCard(id=own_id, name="more", role=Role.CLIENT, host="127.0.0.1", control_port=1, key=bob.key)
        hello = Hello(protocol=PROTOCOL, facts=job.facts(job.build_cuts()) | {"cluster": ""}, card=card, codecs=())
        asking = bob.dial(server, anna.key, own_id)
        welcome = (await asking.request(hello, deadline_s=HANG_S)).expect(Welcome).card
        asking = bob.dial(welcome.endpoint(welcome.data_port).removeprefix("tcp://"), anna.key, own_id)
        first = (tmp_path / "runs/nodes/ledger.jsonl").read_text(encoding="utf-8").partition("\n")[0]
        run = RunId(json.loads(first)["counted"][0][:6])
        spec = TensorSpec(name="input", dtype="float64", shape=(1, 8), codec="raw", nbytes=64)
        for version in range(3):
            cid = step_cid(run, 0, Version(version))
            request = Forward(cid=cid, version=Version(version), seed=0, input=spec)
            with pytest.raises(Unauthorised, match="the steps of shard 0 are another machine's to make"):
                await asking.request(request, [bytes(64)], deadline_s=HANG_S)
        assert sum("a request was turned away: the steps of shard 0" in note for note in nodes.notes) == 1
        for k, of, error in ((999, run, RemoteProtocolError), (0, RunId("000000"), Unavailable)):  # its own, of no use
            cid = step_cid(of, 1, Version(0), k)
            request = Forward(cid=cid, version=Version(0), seed=0, input=spec)
            with pytest.raises(error, match="no step 999 at a version" if k else f"steps of the run {run}, not of"):
                await asking.request(request, [bytes(64)], deadline_s=HANG_S)
        rounds = len(nodes.rounds)
        await eventually(lambda: len(nodes.rounds) > rounds + 1)
    finally:
        await bobs.close()
        await nodes.close()
        for machine in (anna, bob):
            await machine.close()
    check_history(tmp_path / "runs/nodes", may_be_pending=True)


async def test_no_machine_keeps_nodes_of_another_out_by_their_names_or_addresses(tmp_path: Path) -> None:
    """eve says again and again, before they are there, that she is where the server will be, called as the client."""
    anna, eve = Machine(tmp_path, "anna"), Machine(tmp_path, "eve")
    anna.trusts(eve, frozenset({Role.OBSERVER}))
    eve.trusts(anna)
    job = zsfl.load_job(write_job(tmp_path, rounds=2, shards=1))
    nodes, at_annas, port = Nodes(job, tmp_path / "runs"), {"keys": str(anna.folder)}, free_port()
    try:
        seed = await nodes.start("aggregator", Role.AGGREGATOR, **at_annas)
        own_id = new_node_id(eve.key)
        card = NodeCard(
            id=own_id, name="client-0", role=Role.OBSERVER, host="127.0.0.1", control_port=port, key=eve.key
        )
        hello = Hello(protocol=PROTOCOL, facts=job.facts(job.build_cuts()) | {"cluster": ""}, card=card, codecs=())
        asking = eve.dial(seed, anna.key, own_id)

        async def claim() -> None:
            while True:
                await asking.request(hello, deadline_s=HANG_S)
                await asyncio.sleep(0.2)

        claiming = asyncio.ensure_future(claim())
        await eventually(lambda: any(one.peer == "client-0" for one in nodes.met))
        await nodes.start("server", Role.SPLIT_SERVER, peers=(seed,), port=port, **at_annas)
        await nodes.start("client-0", Role.CLIENT, peers=(seed,), shards="0", **at_annas)
        await eventually(lambda: len(nodes.rounds) == 2)
        assert not claiming.done()
        assert any(note.startswith("two nodes are called client-0, one at") for note in nodes.notes)
        claiming.cancel()
    finally:
        await nodes.close()
        for machine in (anna, eve):
            await machine.close()


async def test_a_shard_stays_with_the_machine_that_joined_with_it_also_when_the_run_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "FIRST_WORD_S", 0.2)
    monkeypatch.setattr("zsfl.node.LOOK_S", 0.1)
    anna, bob, eve = (Machine(tmp_path, name) for name in ("anna", "bob", "eve"))
    for one in (anna, bob, eve):
        for other in (anna, bob, eve):
            if one is not other:
                one.trusts(other)
    nodes = Nodes(zsfl.load_job(write_job(tmp_path, rounds=100_000, shards=2)), tmp_path / "runs")
    quick: dict[str, Any] = {"beat_s": 0.2, "lost_after_s": 3.0, "patience_s": 100.0, "mode": "elastic"}

    async def start(name: str, role: Role, machine: Machine, **flags: Any) -> str:
        return await nodes.start(name, role, keys=str(machine.folder), **quick, **flags)

    async def refused(name: str, machine: Machine, shards: str) -> str:
        await start(name, Role.CLIENT, machine, peers=(seed,), shards=shards)
        async with asyncio.timeout(HANG_S):
            with pytest.raises(ConfigError) as raised:
                await nodes.tasks[name]
        return str(raised.value)

    async def lost(*names: str) -> None:
        for name in names:
            nodes.tasks[name].cancel()
        await asyncio.gather(*(nodes.tasks[name] for name in names), return_exceptions=True)

    try:
        seed = await start("aggregator", Role.AGGREGATOR, anna, clients_per_key=1)
        await start("server", Role.SPLIT_SERVER, anna, peers=(seed,))
        await start("bob-0", Role.CLIENT, bob, peers=(seed,), shards="0")
        said = await refused("eve-both", eve, "0-1")
        assert "shard 0 is already held" in said or "shard 0 is of the machine" in said or "would hold 2" in said
        await start("eve-1", Role.CLIENT, eve, peers=(seed,), shards="1")
        await eventually(lambda: nodes.rounds)
        await lost("bob-0", "aggregator", "server", "eve-1")
        seed = await start("aggregator", Role.AGGREGATOR, anna, resume=True)
        assert "shard 0 is of the machine" in await refused("eve-0", eve, "0")
        await start("server", Role.SPLIT_SERVER, anna, peers=(seed,))
        await start("eve-1", Role.CLIENT, eve, peers=(seed,), shards="1")
        bobs, before = machine_id(bob.key), len(nodes.rounds)
        what = f"a client for shard 0 (of machine {bobs}; to go on without, run here: zsfl keys revoke {bobs} --keys "
        await eventually(lambda: any(what in awaited for awaited in nodes.awaited))
        anna.revokes(bob)
        await eventually(lambda: len(nodes.rounds) > before)
        assert any("going on without a client for shard 0: the key of whose" in note for note in nodes.notes)
        assert nodes.rounds[-1].without == ("shard 0 (no client yet)",)
        anna.trusts(bob)
        await lost("aggregator", "server", "eve-1")
        seed = await start("aggregator", Role.AGGREGATOR, anna, resume=True, reassign="0")
        before = len(nodes.rounds)
        await start("server", Role.SPLIT_SERVER, anna, peers=(seed,))
        await start("eve-all", Role.CLIENT, eve, peers=(seed,), shards="0-1")
        await eventually(lambda: len(nodes.rounds) > before)
    finally:
        await nodes.close()
        for machine in (anna, bob, eve):
            machine.context.destroy(linger=0)


@pytest.mark.parametrize("how", ["reassigned", "revoked"])
async def test_a_shard_of_a_replaced_machine_has_a_say_again_where_others_stood_by(tmp_path: Path, how: str) -> None:
    """Whoever resumes asks the clients first, and most of them cannot be without the new machine."""
    anna, bob, _ = everybody = [Machine(tmp_path, name) for name in ("anna", "bob", "eve")]
    for one in everybody:
        for other in everybody:
            if one is not other:
                one.trusts(other)
    nodes = Nodes(zsfl.load_job(write_job(tmp_path, rounds=100_000)), tmp_path / "runs")
    quick: dict[str, Any] = {"beat_s": 0.2, "lost_after_s": 3.0, "patience_s": HANG_S}
    at_annas, at_bobs, at_eves = (quick | {"keys": str(machine.folder)} for machine in everybody)
    try:
        seed = await nodes.start("aggregator", Role.AGGREGATOR, **at_annas)
        await nodes.start("server", Role.SPLIT_SERVER, peers=(seed,), **at_annas)
        await nodes.start("client-0", Role.CLIENT, peers=(seed,), shards="0", **at_bobs)
        await nodes.start("client-1", Role.CLIENT, peers=(seed,), shards="1", **at_eves)
        await nodes.start("standby", Role.STANDBY, peers=(seed,), **at_annas)
        await eventually(lambda: any("may take over from now on" in note for note in nodes.notes) and nodes.rounds)
        for task in nodes.tasks.values():
            task.cancel()
        await asyncio.gather(*nodes.tasks.values(), return_exceptions=True)
        if how == "revoked":
            anna.revokes(bob)
        rounds, flags = len(nodes.rounds), {"reassign": "0"} if how == "reassigned" else {}
        seed = await nodes.start("aggregator", Role.AGGREGATOR, resume=True, **at_annas, **flags)
        await nodes.start("server", Role.SPLIT_SERVER, peers=(seed,), **at_annas)
        await nodes.start("clients", Role.CLIENT, peers=(seed,), shards="0-1", **at_eves)
        await eventually(lambda: len(nodes.rounds) > rounds)
    finally:
        await nodes.close()
        for machine in everybody:
            await machine.close()
