"""Decisions about this machine: what was seen of it in, findings out."""

from __future__ import annotations

from collections.abc import Iterator

from zsfl.doctor.seen import Disk, Finding, Here, Multicast, Seen, SeenNode, Store
from zsfl.wire.door import is_loopback

LITTLE_BYTES = 1 << 30
"""Less room on a disk than that is soon used up."""


def judge_machine(seen: Seen) -> Iterator[Finding]:
    """In the order in which things have to work."""
    here = seen.here
    yield judge_interfaces(here)
    yield from judge_multicast(seen)
    yield judge_disk(here.disk)
    if here.store is not None:
        yield judge_store(here.store)
    yield from judge_torch(here)
    yield from judge_keys(here)


def judge_interfaces(here: Here) -> Finding:
    """Is the address that is to be used one of this machine?"""
    listed = ", ".join(f"{one.address} ({one.name})" for one in here.interfaces) or "none"
    others = [one.address for one in here.interfaces if not is_loopback(one.address)]
    if here.host not in [one.address for one in here.interfaces] and not is_loopback(here.host):
        what = f"{here.host} is no address of this machine, which has: {listed}"
        return Finding(check="interface", what=what, do="give --host one of these")
    if is_loopback(here.host) and others:
        what = f"{here.host} is used, which serves this machine alone; there are: {listed}"
        return Finding(
            check="interface",
            state="good",
            what=what,
            do=f"where nodes run on several machines, give this and them --host, here --host {others[0]}",
        )
    return Finding(check="interface", state="good", what=f"{here.host} is used, of: {listed}")


def judge_multicast(seen: Seen) -> Iterator[Finding]:
    """Does what is announced here arrive, and does what others announce?"""
    here = seen.here
    if not here.mdns:
        what = "mDNS is off: nodes find one another by --peer, --dns and --meet, and are looked for by those here"
        yield Finding(check="multicast", state="good", what=what)
        return
    by_peer = "name one node to all others: --peer HOST:PORT, which its first line says"
    for one in here.multicast:
        if one.error:
            yield Finding(check="multicast", what=f"on {one.host}: {one.error}", do=by_peer)
        elif not one.came_back:
            what = f"what this machine multicasts on {one.host} does not even come back to itself"
            yield Finding(check="multicast", what=what, do=f"let UDP port 5353 through its firewall, or {by_peer}")
        else:
            yield _judge_passage(seen, one, by_peer)


def _judge_passage(seen: Seen, one: Multicast, by_peer: str) -> Finding:
    own = {interface.address for interface in seen.here.interfaces}
    near = is_loopback(one.host)
    there = [node for node in seen.nodes if is_loopback(_host(node)) == near]
    heard = [node for node in there if "mdns" in node.sources]
    unheard = [node for node in there if node.condition and node.condition.mdns and "mdns" not in node.sources]
    if unheard:
        names = ", ".join(node.name for node in unheard[:4]) + (" and others" if len(unheard) > 4 else "")
        return Finding(
            check="multicast",
            what=f"blocked between {one.host} and {names}: TCP gets there, and what is announced there does not get "
            "here",
            do=f"have the network pass multicast (Wi-Fis, VPNs and containers often do not), or {by_peer}",
        )
    afar = [node for node in heard if _host(node) not in own]
    what = f"works on {one.host}: {_count(len(heard), 'node')} heard"
    if near or afar:
        return Finding(
            check="multicast", state="good", what=what + ("" if near else f", {len(afar)} of other machines")
        )
    return Finding(
        check="multicast",
        state="good",
        what=f"{what}, none of other machines, so nothing shows yet whether the network passes it",
        do="if nodes run on others, name one to see more: zsfl doctor --peer HOST:PORT",
    )


def judge_disk(disk: Disk) -> Finding:
    """Can spills be written?"""
    room = "" if disk.free_bytes is None else f"{_size(disk.free_bytes)} free"
    if disk.error:
        what = f"cannot write in {disk.folder}: {disk.error}" + (f" ({room})" if room else "")
        return Finding(check="disk", what=what, do="make room or correct its permissions, or name another with --runs")
    bound = disk.spill_mib << 20
    if bound and disk.spilled_bytes >= bound:
        return Finding(
            check="disk",
            what=f"spills in {disk.folder} take {_size(disk.spilled_bytes)}, and --spill-mib allows {_size(bound)}",
            do="raise --spill-mib; what an ended run has left there may be deleted",
        )
    if bound and disk.free_bytes is not None and disk.free_bytes < bound - disk.spilled_bytes:
        what = f"{room} in {disk.folder}, less than spills may still take by --spill-mib {disk.spill_mib}"
        return Finding(check="disk", state="warn", what=what, do="make room, or lower --spill-mib")
    if disk.free_bytes is not None and disk.free_bytes < LITTLE_BYTES:
        what = f"only {room} in {disk.folder}"
        return Finding(check="disk", state="warn", what=what, do="make room, or name another folder with --runs")
    return Finding(check="disk", state="good", what=f"{disk.folder} can be written to, {room}")


def judge_store(store: Store) -> Finding:
    """Can spills be put there, and a run be kept?"""
    if store.error:
        do = "correct --spill, the credentials or the network; what is there, and who may use it, the store itself says"
        return Finding(check="store", what=store.error, do=do)
    if not store.once:
        what = f"{store.url} can be written to, but does not keep two from writing the same"
        do = "it is good for spills; with --durability store see to it that a run has one aggregator at a time"
        return Finding(check="store", state="warn", what=what, do=do)
    return Finding(check="store", state="good", what=f"{store.url} can be written to")


def judge_torch(here: Here) -> Iterator[Finding]:
    """Can this machine compute, and does it know the job?"""
    torch = here.torch
    listed = ", ".join(f"{name} {version}" for name, version in here.versions.items())
    if torch.error:
        yield Finding(check="torch", what=torch.error, do="correct --device, or install PyTorch anew")
    else:
        gpus = ", ".join(torch.devices) or "no GPU"
        what = f"PyTorch {torch.version} with {gpus}; --device {here.device}"
        yield Finding(check="torch", state="good", what=what)
    yield Finding(check="versions", state="good", what=f"{listed}, protocol {here.protocol}")
    if torch.job_error:
        yield Finding(check="job", what=torch.job_error, do="correct the job file: no node can run it as it is")


def judge_keys(here: Here) -> Iterator[Finding]:
    """Would a node with these settings be able to lock its door, and let somebody in?"""
    keys = here.keys
    for error in keys.errors:
        yield Finding(check="keys", what=error, do="until then nodes here do not start, or trust nobody it names")
    pair = "pair this machine with another: `zsfl invite` here, and what it prints there"
    if not keys.used:
        what = f"none are used on {here.host}: whoever reaches it may join, and nothing is encrypted"
        if is_loopback(here.host):
            what = f"none are used on {here.host}, which this machine alone can reach"
        state = "good" if is_loopback(here.host) else "warn"
        yield Finding(check="keys", state=state, what=what, do="" if is_loopback(here.host) else f"{pair}")
    elif not keys.machine:
        what = f"nodes on {here.host} would use keys, and there are none in {keys.folder}"
        yield Finding(check="keys", what=what, do=f"{pair}; or start all nodes with --insecure")
    elif not keys.trusted:
        what = f"this is machine {keys.machine}, and it trusts no other one"
        alone = is_loopback(here.host)
        yield Finding(check="keys", state="good" if alone else "warn", what=what, do="" if alone else pair)
    else:
        names = ", ".join(sorted(keys.trusted.values())[:8]) + (" and others" if len(keys.trusted) > 8 else "")
        what = f"this is machine {keys.machine}, and it trusts {names}"
        yield Finding(check="keys", state="good", what=what)


def _host(node: SeenNode) -> str:
    return node.address.rpartition(":")[0]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 30 else f"{size / 2**20:.1f} MiB"
