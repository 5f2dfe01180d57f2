"""What the doctor makes of what was seen: no sockets, no files."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from zsfl.discovery.announced import job_hash, opaque
from zsfl.doctor.judging import findings
from zsfl.doctor.seen import Disk, Finding, Here, Interface, Keys, Multicast, Seen, SeenNode, Store, Torch
from zsfl.ids import PROTOCOL, NodeCard, NodeId, Role
from zsfl.wire.examining import Condition, Hearing, Wait

LAN = "10.0.0.1"
GIB = 1 << 30
FACTS = {"name": "tiny", "seed": "0", "shards": "2", "cluster": ""}
OPEN: dict[str, Any] = dict.fromkeys(("control", "data", "heartbeats", "news"), "open")
HERE = Here(
    host=LAN,
    interfaces=[Interface(name="lo", address="127.0.0.1"), Interface(name="eth0", address=LAN)],
    mdns=True,
    multicast=[Multicast(host=LAN, came_back=True), Multicast(host="127.0.0.1", came_back=True)],
    disk=Disk(folder="runs", free_bytes=50 * GIB),
    keys=Keys(used=True, folder="keys", machine="ME", trusted={"k1": "gpu"}),
    torch=Torch(version="2", job="tiny", facts={"name": "tiny", "seed": "0", "shards": "9"}),
    device="auto",
    versions={"python": "3.11", "zsfl": "1", "torch": "2"},
    protocol=PROTOCOL,
)


def card(name: str, role: Role, host: str) -> NodeCard:
    number = 4000 + sum(map(ord, name))
    return NodeCard(
        id=NodeId(name), name=name, role=role, host=host, control_port=number, data_port=1, pub_port=2, news_port=3
    )


CARDS = {
    "chief": card("chief", Role.AGGREGATOR, LAN),
    "gpu": card("gpu", Role.SPLIT_SERVER, "10.0.0.2"),
    "ward": card("ward", Role.CLIENT, "10.0.0.3"),
}


def at(name: str) -> str:
    return CARDS[name].address


def node(name: str, **changed: Any) -> SeenNode:
    """One that is as it should be, but for what is said."""
    mine = changed.pop("card", None) or CARDS[name]
    told: dict[str, Any] = {
        "card": mine,
        "protocol": PROTOCOL,
        "facts": FACTS,
        "clock_s": 0.0,
        "mdns": True,
        "peers": 2,
        "hears": tuple(Hearing(card=other, heard_s=0.2) for other in CARDS.values() if other.name != name),
        "refused": {},
        "waits": (),
        "versions": HERE.versions,
        "free_bytes": 50 * GIB,
        "writable": True,
    }
    told |= {field: changed.pop(field) for field in list(changed) if field in told}
    seen: dict[str, Any] = {
        "address": mine.address, "sources": frozenset({"mdns"}), "condition": Condition(**told), "card": mine,
        "locked": True, "ports": OPEN,
    }  # fmt: skip
    return SeenNode(**seen | changed)


def silent(silence: Any, **more: Any) -> SeenNode:
    """One that does not answer."""
    return SeenNode(**{"address": "10.0.0.9:77", "sources": frozenset({"peer"}), "silence": silence} | more)


ALL = {name: node(name) for name in CARDS}


def judged(*nodes: SeenNode, here: Here = HERE, job: str = "tiny", **more: Any) -> list[Finding]:
    """What is found of these nodes in the place of those with their names."""
    replaced = {one.card.name: one for one in nodes if one.card}
    rest = [one for one in nodes if one.card is None]
    return findings(Seen(here=here, nodes=[*(ALL | replaced).values(), *rest], job=job, **more))


def wrong(found: list[Finding]) -> list[tuple[str, str]]:
    assert all(finding.do for finding in found if finding.state != "good"), "it has to say what to do"
    return [(finding.check, finding.what) for finding in found if finding.state == "bad"]


def minded(found: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.check, finding.what) for finding in found if finding.state == "warn"]


def test_nothing_is_wrong_with_what_is_as_it_should_be() -> None:
    found = judged()
    assert {finding.state for finding in found} == {"good"}
    assert {finding.check for finding in found} == {
        "interface", "multicast", "disk", "torch", "versions", "keys", "nodes", "roles", "trust", "ports", "hearing",
        "clocks",
    }  # fmt: skip


def here(**changed: Any) -> Here:
    return structs.replace(HERE, **changed)


def test_a_store_is_looked_at_where_one_is_named() -> None:
    store = Store(url="s3://x/y")
    [said] = [finding for finding in judged(here=here(store=store)) if finding.check == "store"]
    assert (said.state, said.what) == ("good", "s3://x/y can be written to")
    once = here(store=structs.replace(store, once=False))
    assert minded(judged(here=once)) == [
        ("store", "s3://x/y can be written to, but does not keep two from writing the same")
    ]


def disk(**changed: Any) -> Here:
    return here(disk=structs.replace(HERE.disk, **changed))


def keys(**changed: Any) -> Here:
    return here(keys=structs.replace(HERE.keys, **changed))


def torch(**changed: Any) -> Here:
    return here(torch=structs.replace(HERE.torch, **changed))


MACHINES = [
    (here(host="10.9.9.9"), ("interface", "10.9.9.9 is no address of this machine, which has: 127.0.0.1 (lo)")),
    (here(multicast=[Multicast(host=LAN, error="no multicast")]), ("multicast", f"on {LAN}: no multicast")),
    (here(multicast=[Multicast(host=LAN)]), ("multicast", f"what this machine multicasts on {LAN} does not even")),
    (disk(error="Disk quota exceeded"), ("disk", "cannot write in runs: Disk quota exceeded (50.0 GiB free)")),
    (disk(spill_mib=1, spilled_bytes=GIB), ("disk", "spills in runs take 1.0 GiB, and --spill-mib allows 1.0 MiB")),
    (here(store=Store(url="s3://x/y", error="no bucket")), ("store", "no bucket")),
    (torch(error="device cuda:9 is not there"), ("torch", "device cuda:9 is not there")),
    (torch(job_error="there is no job file"), ("job", "there is no job file")),
    (keys(machine=""), ("keys", f"nodes on {LAN} would use keys, and there are none in keys")),
    (keys(errors=["line 3 trusts nobody"]), ("keys", "line 3 trusts nobody")),
]


@pytest.mark.parametrize(("machine", "expected"), MACHINES, ids=lambda value: value[1] if type(value) is tuple else "")
def test_what_is_wrong_with_this_machine(machine: Here, expected: tuple[str, str]) -> None:
    (found,) = wrong(judged(here=machine))
    assert (found[0], found[1][: len(expected[1])]) == expected


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (disk(free_bytes=1 << 20), ("disk", "only 1.0 MiB free in runs")),
        (disk(spill_mib=100_000), ("disk", "50.0 GiB free in runs, less than spills may still take by --spill-mib")),
        (keys(trusted={}), ("keys", "this is machine ME, and it trusts no other one")),
        (here(versions={"zsfl": "1", "torch": "3"}), ("versions", "torch differs: 3 here; 2 at chief, gpu, ward")),
        (here(versions={"zsfl": "2", "torch": "2"}), ("versions", "zsfl differs: 2 here; 1 at chief, gpu, ward")),
    ],
)
def test_what_to_mind_about_this_machine(machine: Here, expected: tuple[str, str]) -> None:
    found = judged(here=machine)
    assert wrong(found) == []
    ((check, what),) = minded(found)
    assert (check, what[: len(expected[1])]) == expected


def test_without_mdns_nothing_is_expected_of_multicast() -> None:
    found = judged(*(node(name, sources=frozenset({"peer"})) for name in CARDS), here=here(mdns=False, multicast=[]))
    assert wrong(found) == []


def test_multicast_that_works_here_and_does_not_get_through() -> None:
    (found,) = wrong(judged(node("gpu", sources=frozenset({"peer"}))))
    assert found == (
        "multicast",
        f"blocked between {LAN} and gpu at {at('gpu')}: TCP gets there, and what is announced there does not get here",
    )
    assert wrong(judged(node("gpu", sources=frozenset({"peer"}), mdns=False))) == []


SILENT = [
    ("refused", "nodes", "nobody listens at 10.0.0.9:77"),
    ("silent", "nodes", "the node at 10.0.0.9:77: no answer at all from its control port: a firewall drops it, or no"),
    ("unreachable", "nodes", "the node at 10.0.0.9:77: the network knows no way there"),
    ("stranger", "nodes", "what listens at 10.0.0.9:77 is no zsfl node"),
    ("mute", "nodes", "the node at 10.0.0.9:77 takes connections and does not answer"),
    ("keys", "trust", "the node at 10.0.0.9:77 uses keys, and this machine has none in keys"),
    ("unknown", "trust", "the node at 10.0.0.9:77 is on no machine that this one, ME, trusts"),
    ("turned away", "trust", "the node at 10.0.0.9:77 is on a machine, which does not trust this machine, ME"),
    ("old", "versions", "the node at 10.0.0.9:77 cannot be examined, as zsfl is another version there: what?"),
]


@pytest.mark.parametrize(("silence", "check", "said"), SILENT)
def test_why_a_node_does_not_answer(silence: str, check: str, said: str) -> None:
    ((found, what),) = wrong(judged(silent(silence, said="what?")))
    assert (found, what[: len(said)]) == (check, said)


def test_a_dropped_port_is_a_firewalls_where_the_machine_is_known_to_be_there() -> None:
    for more in ({"address": "10.0.0.2:99"}, {"sources": frozenset({at("chief")})}, {"sources": frozenset({"mdns"})}):
        announced = ("x", opaque(NodeId("x"), job_hash("tiny", ""), PROTOCOL, Role.CLIENT, ""))
        ((_, what),) = wrong(judged(silent("silent", announced=announced, **more)))
        assert what.endswith("a firewall drops what goes there")


@pytest.mark.parametrize("source", ["run", "mdns"])
def test_who_was_there_before_is_no_failure(source: str) -> None:
    announced = ("x", opaque(NodeId("x"), job_hash("tiny", ""), PROTOCOL, Role.CLIENT, ""))
    found = judged(silent("refused", sources=frozenset({source}), announced=announced))
    assert wrong(found) == []
    assert len(minded(found)) == 1


def test_one_that_may_not_tell_is_minded() -> None:
    found = judged(silent("forbidden", said="not for you"))
    assert (wrong(found), minded(found)) == ([], [("trust", "the node at 10.0.0.9:77 does not tell: not for you")])


@pytest.mark.parametrize(
    ("reach", "said"),
    [
        ("silent", "gives no answer at all: a firewall drops what goes there"),
        ("refused", "refuses connections: a firewall rejects them, or something forwards only some ports"),
        ("unreachable", "cannot be reached: no way there"),
    ],
)
def test_a_port_that_cannot_be_reached(reach: Any, said: str) -> None:
    found = judged(node("gpu", ports=OPEN | {"data": reach}))
    assert wrong(found) == [("ports", f"the data port of gpu at {at('gpu')}, 1, {said}")]


def test_nodes_of_other_jobs_and_clusters_are_named_as_that() -> None:
    other = card("lost", Role.SPLIT_SERVER, "10.0.0.4")
    strange = node("lost", card=other, facts={"name": "tinny", "cluster": "x"}, hears=(), peers=0)
    found = judged(strange)
    assert wrong(found) == []  # all that is needed is there besides
    assert minded(found) == []
    note = f"not of job tiny: lost at {other.address} (job tinny in cluster x)"
    assert [one.what for one in found if one.check == "jobs"] == [note]
    found = findings(Seen(here=HERE, nodes=[ALL["chief"], ALL["ward"], strange], job="tiny"))
    assert (wrong(found), minded(found)) == ([("roles", "job tiny has no split server")], [("jobs", note)])
    assert f"or correct the job of lost at {other.address}" in next(one.do for one in found if one.check == "roles")
    hears = (Hearing(card=CARDS["chief"], heard_s=0.1), Hearing(card=CARDS["ward"], heard_s=0.1))
    lost = structs.replace(node("gpu", facts=FACTS | {"cluster": "x"}, hears=hears))
    found = wrong(judged(lost))
    assert ("roles", "job tiny has no split server") in found
    assert ("roles", "job tiny in cluster x has no aggregator and no client") in found
    (jobs,) = [what for check, what in found if check == "jobs"]
    assert jobs.startswith("these leave one another alone: job tiny: chief at ")
    found = judged(lost, cluster="y")
    assert wrong(found)[0] == ("nodes", "no node of job tiny in cluster y was found")


def test_what_is_announced_tells_another_job_and_another_protocol() -> None:
    def announced(job: str, protocol: int) -> SeenNode:
        told = ("x", opaque(NodeId("x"), job_hash(job, ""), protocol, Role.CLIENT, "k9"))
        return silent("unknown", sources=frozenset({"mdns"}), announced=told)

    assert wrong(judged(announced("other", PROTOCOL))) == []
    found = wrong(judged(announced("tiny", PROTOCOL - 1)))
    assert ("versions", f"the node at 10.0.0.9:77 announces version {PROTOCOL - 1} of the protocol, and zsfl here "
            f"speaks {PROTOCOL}") in found  # fmt: skip


@pytest.mark.parametrize(("gone", "words"), [("gpu", "split server"), ("chief", "aggregator"), ("ward", "client")])
def test_roles_that_are_missing(gone: str, words: str) -> None:
    left = [structs.replace(ALL[name], sources=frozenset({"mdns"})) for name in CARDS if name != gone]
    found = wrong(findings(Seen(here=HERE, nodes=left, job="tiny")))
    assert found == [("roles", f"job tiny has no {words}")]
    assert wrong(findings(Seen(here=HERE, nodes=[], job="")))[0] == ("nodes", "no node of any job was found")


def test_too_few_clients_are_what_the_aggregator_waits_for() -> None:
    waits = (Wait(what="clients for shards 1-4", seconds=20.0),)
    assert wrong(judged(node("chief", waits=waits))) == [
        ("waits", "chief has been waiting for 20 s for clients for shards 1-4")
    ]
    assert wrong(judged(node("chief", waits=(structs.replace(waits[0], seconds=1.0),)))) == []


def test_the_same_name_for_different_jobs() -> None:
    ((check, what),) = wrong(judged(node("ward", facts=ALL["gpu"].condition.facts | {"seed": "7"})))  # type: ignore[union-attr]
    assert check == "jobs"
    assert what == "ward has another job of the same name than chief: seed is 0 at chief and 7 at ward"
    mine = torch(facts=dict(HERE.torch.facts) | {"seed": "3"})
    assert wrong(judged(here=mine)) == [("jobs", "not the same job: seed is 3 at the job file here and 0 at chief")]


@pytest.mark.parametrize(
    ("off_s", "words"), [(60.0, "60 s ahead of"), (-600.0, "10 min behind"), (9e4, "hours ahead of")]
)
def test_a_clock_that_is_off(off_s: float, words: str) -> None:
    found = judged(node("gpu", off_s=off_s))
    assert minded(found) == [("clocks", f"the clock of gpu is {words} the one here")]
    assert minded(judged(node("gpu", off_s=off_s, within_s=abs(off_s)))) == []  # a slow answer proves nothing


def deaf(name: str, *to: str, **more: Any) -> SeenNode:
    """One that does not hear some others."""
    hears = tuple(one for one in ALL[name].condition.hears if one.card.name not in to)  # type: ignore[union-attr]
    return node(name, hears=hears, peers=len(hears), **more)


def test_who_does_not_hear_whom() -> None:
    assert wrong(judged(deaf("gpu", "chief"))) == [("hearing", "gpu does not hear chief, though both run")]
    both = (deaf("gpu", "chief"), deaf("chief", "gpu"))
    assert wrong(judged(*both)) == [("hearing", "chief and gpu do not hear each other, though both run")]
    stale = tuple(structs.replace(one, heard_s=9.0) for one in ALL["gpu"].condition.hears)  # type: ignore[union-attr]
    assert len(wrong(judged(node("gpu", hears=stale)))) == 2
    cut = structs.replace(deaf("gpu", "chief").condition, peers=300)  # type: ignore[type-var]
    assert wrong(judged(node("gpu", condition=cut))) == []  # there was no room to say


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"refused": {at("chief"): "seed differs"}}, ": seed differs"),
        ({"mdns": False}, ": mDNS is off at gpu, and no --peer leads from one to the other"),
        ({"ports": OPEN | {"data": "silent"}}, ", see the ports above"),
        ({"locked": False}, ", as one of them uses keys and the other does not"),
    ],
)
def test_why_one_does_not_hear_another(changed: dict[str, Any], said: str) -> None:
    found = wrong(judged(deaf("gpu", "chief", **changed)))
    assert ("hearing", f"gpu does not hear chief{said}") in found


def test_one_that_serves_its_own_machine_alone() -> None:
    local = card("gpu", Role.SPLIT_SERVER, "127.0.0.1")
    found = wrong(judged(deaf("gpu", "ward", card=local), deaf("ward", "gpu")))
    assert ("hearing", "gpu and ward do not hear each other, as gpu serves its own machine alone") in found


def test_refusals_at_addresses_where_nobody_is_seen() -> None:
    found = wrong(judged(node("ward", refused={"10.0.0.8:1": "pair the two"})))
    assert found == [("refusals", "ward has no peer at 10.0.0.8:1: pair the two")]


def test_keys_are_for_all_or_none() -> None:
    assert wrong(judged(node("gpu", locked=False))) == [
        ("trust", "gpu uses no keys and chief, ward do: they refuse one another")
    ]
    found = wrong(judged(*(node(name, locked=False) for name in CARDS)))
    assert found == [("trust", "chief, gpu, ward use no keys, and nodes here would: they would refuse one another")]


def test_versions_and_disks_of_others() -> None:
    found = judged(node("gpu", protocol=PROTOCOL - 1, free_bytes=0), node("ward", writable=False, free_bytes=9 << 20))
    assert wrong(found) == [
        ("versions", f"gpu speaks version {PROTOCOL - 1} of the protocol, and zsfl here {PROTOCOL}"),
        ("disk", "gpu has 0.0 MiB of disk left"),
        ("disk", "ward may not write in its folder of runs"),
    ]
    assert minded(judged(node("gpu", free_bytes=9 << 20))) == [("disk", "gpu has 9.0 MiB of disk left")]
    assert minded(judged(left_out=3)) == [("nodes", "3 more addresses are known, and were not asked")]


def test_one_that_others_hear_counts_though_it_does_not_answer() -> None:
    """Its control port is dropped on the way from here alone."""
    gone = structs.replace(
        ALL["gpu"],
        condition=None,
        silence="silent",
        sources=frozenset({at("chief")}),
        ports=OPEN | {"control": "silent"},
    )
    assert wrong(judged(gone)) == [
        (
            "nodes",
            f"gpu at {at('gpu')}: no answer at all from its control port, though the node at {at('chief')} hears it: "
            "a firewall drops what goes there",
        )
    ]


def test_who_is_behind_nat_is_there_and_nobody_asks_it() -> None:
    hidden = structs.replace(CARDS["ward"], host="127.0.0.1", behind_nat=True)
    hears = tuple(Hearing(card=one, heard_s=0.2) for one in (CARDS["chief"], CARDS["gpu"], hidden))
    nodes = [node("chief", hears=hears[1:]), node("gpu", hears=(hears[0], hears[2]))]
    seen = SeenNode(address=hidden.address, sources=frozenset(), silence="behind NAT", card=hidden)
    found = findings(Seen(here=HERE, nodes=[*nodes, seen], job="tiny"))
    assert {finding.state for finding in found} == {"good"}
    assert "ward is behind NAT, and heard by those that it dials; it is not asked from here" in [
        one.what for one in found
    ]
