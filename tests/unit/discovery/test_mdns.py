"""mDNS with real zeroconf, on loopback only."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator

import msgspec
import pytest
import zeroconf as zc
from helpers.waiting import HANG_S, eventually
from zeroconf.asyncio import AsyncZeroconf

from zsfl.discovery import mdns
from zsfl.discovery.announced import opaque
from zsfl.discovery.events import Candidate
from zsfl.discovery.mdns import MAX_OTHERS, MAX_QUEUED, Mdns, read_announcement
from zsfl.errors import Unavailable
from zsfl.ids import Address, NodeCard, NodeId, Role

HOST = "127.0.0.1"
JOB = "job-under-test"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever else announces himself on this machine, such as the nodes of another test, is not heard."""
    monkeypatch.setattr(mdns, "SERVICE", f"_zsfl-{secrets.token_hex(4)}._tcp.local.")


def card(node_id: str, port: int, role: Role = Role.CLIENT) -> NodeCard:
    return NodeCard(id=NodeId(node_id), name=f"name-{node_id}", role=role, host=HOST, control_port=port)


def node(node_id: str, port: int, *, role: Role = Role.CLIENT, job: str = JOB, protocol: int = 1) -> Mdns:
    return Mdns(card(node_id, port, role), job, protocol)


def seen_as(mdns_card: NodeCard) -> Candidate:
    return Candidate(mdns_card.address, "mdns", mdns_card.role, mdns_card.id)


async def soon(one: Mdns) -> Candidate:
    async with asyncio.timeout(HANG_S):
        return await anext(one.events())


async def next_of(events: AsyncIterator[Candidate], wanted: Candidate) -> None:
    """Read until `wanted` comes."""
    async with asyncio.timeout(HANG_S):
        async for candidate in events:
            if candidate == wanted:
                return


async def test_nodes_see_one_another_whoever_starts_first() -> None:
    first, second, third = card("a1", 4001), card("b1", 4002, Role.SPLIT_SERVER), card("c1", 4003)
    async with Mdns(first, JOB, 1) as one, Mdns(second, JOB, 1) as two, Mdns(third, JOB, 1) as three:
        for mine, others in ((one, (second, third)), (two, (first, third)), (three, (first, second))):
            found = {await soon(mine) for _ in others}
            assert found == {seen_as(other) for other in others}
            assert not mine.others
            assert mine.ignored == 0


async def test_a_node_that_runs_is_seen_by_one_that_comes_later() -> None:
    running = card("a2", 4011)
    async with Mdns(running, JOB, 1) as one, node("b2", 4012) as early:
        await next_of(one.events(), Candidate(Address(f"{HOST}:4012"), "mdns", Role.CLIENT, NodeId("b2")))
        await next_of(early.events(), seen_as(running))
        async with node("c2", 4013) as late:
            await next_of(late.events(), seen_as(running))


@pytest.mark.parametrize(("job", "protocol"), [("another", 1), (JOB, 7)])
async def test_a_node_of_another_job_or_protocol_is_told_of_and_no_candidate(job: str, protocol: int) -> None:
    of = "of another job, --cluster (each `zsfl up` is one of its own) or version of the protocol,"
    text = f"mDNS sees a node {of} at 127.0.0.1:4022"
    ours = card(f"ours{protocol}", 4023)
    stranger = node(f"s{protocol}", 4022, role=Role.SPLIT_SERVER, job=job, protocol=protocol)
    async with node(f"a{protocol}", 4021) as one, stranger:
        await eventually(lambda: one.others)
        assert one.others == {Address("127.0.0.1:4022"): text}
        async with Mdns(ours, JOB, 1):
            assert await soon(one) == seen_as(ours)


async def test_a_restarted_node_is_seen_again() -> None:
    old, new = card("a4", 4031), card("a5", 4031)
    async with node("b4", 4032) as watcher:
        events = watcher.events()
        async with Mdns(old, JOB, 1):
            await next_of(events, seen_as(old))
        async with Mdns(new, JOB, 1):
            await next_of(events, seen_as(new))


async def test_malformed_announcements_are_counted_and_do_no_harm() -> None:
    network = AsyncZeroconf(interfaces=[HOST], ip_version=zc.IPVersion.V4Only)
    bad = service("bad", {"job": b"\xff\xfe"})
    honest = card("b7", 4052)
    try:
        async with node("a7", 4051) as one:
            register = network.async_register_service  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            await register(bad, cooperating_responders=True)
            await eventually(lambda: one.ignored)
            async with Mdns(honest, JOB, 1):
                await next_of(one.events(), seen_as(honest))
            assert not one.others
    finally:
        await network.async_close()


def service(name: str, about: dict[str, str | bytes], *, host: str = HOST, port: int | None = 4000) -> zc.ServiceInfo:
    return zc.ServiceInfo(
        mdns.SERVICE, f"{name}.{mdns.SERVICE}", port=port, properties=about, parsed_addresses=[host] if host else None
    )


GOOD: dict[str, str | bytes] = {"job": opaque(NodeId("n"), JOB, 1, Role.CLIENT, "")}


def test_a_well_formed_announcement_is_read_whole() -> None:
    seen = read_announcement(service("n", GOOD))
    assert seen is not None
    assert (seen.address, seen.node_id, seen.job_hash) == ("127.0.0.1:4000", "n", GOOD["job"])


def test_nothing_but_an_address_and_an_opaque_hash_is_announced() -> None:
    mine = msgspec.structs.replace(card("a12", 4091, Role.AGGREGATOR), key="K" * 40, data_port=4092, pub_port=4093)
    said = Mdns(mine, "secret-job", 1)._service()  # pyright: ignore[reportPrivateUsage] - as it is sent
    assert (said.name, said.server, said.port) == (f"a12.{mdns.SERVICE}", "a12.local.", 4091)
    assert list(said.properties) == [b"job"]
    told = bytes(said.text)
    for word in (b"secret-job", b"aggregator", b"name-a12", b"KKKK", b"4092", b"4093"):
        assert word not in told
    other = Mdns(msgspec.structs.replace(mine, id=NodeId("a13")), "secret-job", 1)
    assert other._service().text != said.text  # pyright: ignore[reportPrivateUsage] - nor that they are of one job


async def test_a_node_of_a_machine_is_known_by_its_key_once_that_is_trusted() -> None:
    theirs = msgspec.structs.replace(card("b14", 4095, Role.SPLIT_SERVER), key="K" * 40)
    keys = ["J" * 40]
    watcher = Mdns(card("a14", 4094), JOB, 1, lambda: keys)
    async with watcher, Mdns(theirs, JOB, 1):
        await eventually(lambda: watcher.others)
        (text,) = watcher.others.values()
        assert text == (
            "mDNS sees a node of this job, but not of a machine that this one trusts (or without keys, where this one "
            "has them), at 127.0.0.1:4095"
        )
        keys.append("K" * 40)
        watcher.look_again()
        found = await soon(watcher)
        assert (found.address, found.role, found.key) == (theirs.address, Role.SPLIT_SERVER, "K" * 40)
        assert not watcher.others


@pytest.mark.parametrize(
    "info",
    [
        service("n", {"jobs": GOOD["job"]}),
        service("n", {"job": "a\nb"}),
        service("n", {"job": b"\xc3\x28"}),
        service("n", {}),
        service("n", GOOD, host=""),
        service("n", GOOD, host="::1"),
        service("n", GOOD, host="0.0.0.0"),
        service("n", GOOD, host="224.0.0.251"),
        service("n", GOOD, port=0),
        service("n", GOOD, port=None),
    ],
)
def test_nonsense_is_not_read(info: zc.ServiceInfo) -> None:
    assert read_announcement(info) is None


def test_bounds_are_counted() -> None:
    one = node("a8", 4061)
    take = one._take  # pyright: ignore[reportPrivateUsage] - as many real nodes would take minutes
    for job, bound in ((GOOD["job"], MAX_QUEUED), ("another", MAX_OTHERS)):
        before = one.ignored
        for port in range(1, bound + 3):
            seen = read_announcement(service("n", {**GOOD, "job": job}, port=port))
            assert seen is not None
            take(seen)
        assert one.ignored == before + 2
    assert len(one.others) == MAX_OTHERS


@pytest.mark.parametrize("host", ["192.0.2.77", "localhost", "::1"])
async def test_an_unusable_host_says_what_to_do(host: str) -> None:
    mine = NodeCard(id=NodeId("x"), name="x", role=Role.CLIENT, host=host, control_port=4000)
    with pytest.raises(Unavailable, match="--peer host:port"):
        async with Mdns(mine, JOB, 1):
            pass


async def test_a_denied_port_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(**_: object) -> AsyncZeroconf:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("zsfl.discovery.mdns.AsyncZeroconf", denied)
    with pytest.raises(Unavailable, match=r"Permission denied.*--peer host:port"):
        async with node("a9", 4071):
            pass


async def test_an_interface_without_multicast_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_multicast(*_: object) -> bool:
        return False

    monkeypatch.setattr("zeroconf._utils.net.add_multicast_member", no_multicast)
    with pytest.raises(Unavailable, match=r"no multicast.*--peer host:port"):
        async with node("a10", 4071):
            pass


async def test_leaving_waits_no_longer_than_the_deadline_and_leaves_no_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zeroconf._core._UNREGISTER_TIME", 60_000)
    monkeypatch.setattr("zsfl.discovery.mdns.GOODBYE_S", 0.01)
    async with asyncio.timeout(HANG_S):
        async with node("a11", 4081):
            pass
    assert asyncio.all_tasks() == {asyncio.current_task()}
