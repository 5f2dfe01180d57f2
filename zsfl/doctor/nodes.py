"""Decisions about each node by itself: does it answer, can its ports be reached, is its machine as it should be?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from zsfl.doctor.machine import LITTLE_BYTES
from zsfl.doctor.seen import Finding, Keys, Reach, Seen, SeenNode

CLOCK_S = 3.0
"""Clocks that are further apart than this are worth a word."""
NO_ROOM_BYTES = 1 << 20
MOST_NAMED = 6
"""Nodes that one line names."""
PORTS = {"control": "control_port", "data": "data_port", "heartbeats": "pub_port", "news": "news_port"}
"""What a node's ports are for, and how its card calls them."""


def judge_silent(seen: Seen, nodes: Iterable[SeenNode]) -> Iterator[Finding]:
    """Why those who did not say how they are did not."""
    for node in nodes:
        if node.silence and (finding := _silence(seen, node)):
            yield finding


def _silence(seen: Seen, node: SeenNode) -> Finding | None:
    here, told = seen.here.keys, _told_by(node)
    match node.silence:
        case "refused":
            return _refused(node, told)
        case "silent":
            sure = bool(told) or any(_answers(other) for other in seen.nodes if _same_host(other, node))
            why = "a firewall drops what goes there" if sure else "a firewall drops it, or no machine has that address"
            what = f"{node.name}: no answer at all from its control port{told}: {why}"
            do = (
                f"let TCP through to port {node.address.rpartition(':')[2]} there, and to the node's other ports; or "
                "start it with --behind-nat, so that it dials"
            )
            return Finding(check="nodes", what=what, do=do)
        case "behind NAT":
            what = f"{node.short} is behind NAT, and heard by those that it dials; it is not asked from here"
            return Finding(check="nodes", state="good", what=what)
        case "unreachable":
            what = f"{node.name}: the network knows no way there{told}"
            return Finding(check="nodes", what=what, do="correct the address, routes, or the --host of that node")
        case "stranger":
            what = f"what listens at {node.address} is no zsfl node"
            return Finding(check="nodes", what=what, do="give the address in the first line of a node")
        case "mute":
            what = f"{node.name} takes connections and does not answer{told}"
            return Finding(
                check="nodes",
                what=what,
                do="is that the address in its first line, and not another of its ports? A node that hangs has to be "
                "killed and started again",
            )
        case "keys":
            what = f"{node.name} uses keys, and this machine has none in {here.folder}"
            return Finding(
                check="trust",
                what=what,
                do="pair the two machines: `zsfl invite` on one of them; or name the folder of its keys with --keys",
            )
        case "unknown":
            what = f"{node.name} is on no machine that this one, {here.machine}, trusts"
            do = "pair the two: `zsfl invite` on one of them, and what it prints on the other"
            return Finding(check="trust", what=what, do=do)
        case "turned away":
            what = f"{node.name} is on {_machine_of(here, node)}, which does not trust this machine, {here.machine}"
            return Finding(check="trust", what=what, do="have it do so: `zsfl invite` there, and here what it prints")
        case "forbidden":
            do = "have that machine trust this one as observer too: `zsfl keys trust` there"
            return Finding(check="trust", state="warn", what=f"{node.name} does not tell: {node.said}", do=do)
        case "old":
            what = f"{node.name} cannot be examined, as zsfl is another version there: {node.said}"
            return Finding(check="versions", what=what, do="install the same zsfl on all machines")
        case _:
            return None


def _refused(node: SeenNode, told: str) -> Finding | None:
    what, do = f"nobody listens at {node.address}{told}", "start it, or correct the address: a node's first line has it"
    if node.sources == frozenset({"run"}):
        do = "start the run again, or name a node with --peer HOST:PORT"
        return Finding(check="nodes", state="warn", what=f"{what}, where the newest run's aggregator was", do=do)
    if node.sources == frozenset({"mdns"}):
        what = f"a node is announced at {node.address}, and nobody listens there: it was killed, or a firewall rejects"
        return Finding(check="nodes", state="warn", what=what, do="mDNS forgets who was killed in 20 minutes at most")
    return Finding(check="nodes", what=what, do=f"{do}; a firewall that rejects looks the same")


def _told_by(node: SeenNode) -> str:
    told = sorted(node.sources - {"mdns", "dns", "folder", "peer", "run"})
    if told:
        return f", though the node at {told[0]} hears it"
    return ", though it is announced" if "mdns" in node.sources else ""


def _same_host(one: SeenNode, other: SeenNode) -> bool:
    return one.address.rpartition(":")[0] == other.address.rpartition(":")[0]


def _answers(node: SeenNode) -> bool:
    """Whether anything at all came back from its machine."""
    answers: tuple[Reach, ...] = ("open", "refused")
    return node.silence not in ("silent", "unreachable") or any(reach in answers for reach in node.ports.values())


def _machine_of(here: Keys, node: SeenNode) -> str:
    name = here.trusted.get(node.key)
    return f"the machine {name}" if name else "a machine"


def judge_ports(nodes: Sequence[SeenNode]) -> Iterator[Finding]:
    """Can each port be reached from here?"""
    reached, well = 0, True
    for node in nodes:
        for port, reach in node.ports.items():
            if reach == "open":
                reached += 1
                continue
            if port == "control" and node.silence:
                continue  # said already
            well = False
            number = getattr(node.card, PORTS[port]) if node.card else "?"
            where = f"the {port} port of {node.name}, {number}, "
            match reach:
                case "silent":
                    what = where + "gives no answer at all: a firewall drops what goes there"
                    do = "let TCP through to all ports of that machine from those of the others"
                case "refused":
                    what = where + "refuses connections: a firewall rejects them, or something forwards only some ports"
                    do = "let TCP through to all ports of that machine; where ports are forwarded, forward all"
                case _:
                    what, do = where + "cannot be reached: no way there", "correct routes, or the --host of that node"
            yield Finding(check="ports", what=what, do=do)
    if well and reached:
        yield Finding(check="ports", state="good", what=f"all {reached} can be reached from here")


def judge_clocks(nodes: Sequence[SeenNode]) -> Iterator[Finding]:
    """Do the clocks agree, as far as the time that an answer takes lets that be told?"""
    told = [node for node in nodes if node.condition]
    wrong = [node for node in told if abs(node.off_s) - node.within_s > CLOCK_S]
    for node in wrong:
        way = "ahead of" if node.off_s > 0 else "behind"
        what = f"the clock of {node.short} is {_span(abs(node.off_s))} {way} the one here"
        yield Finding(
            check="clocks", state="warn", what=what, do="set it, or have it set: NTP; invitations expire by it"
        )
    if told and not wrong:
        most_s = max(abs(node.off_s) for node in told)
        what = f"of {len(told)} node{'s' * (len(told) != 1)}, within {most_s:.1f} s of the one here"
        yield Finding(check="clocks", state="good", what=what)


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else "hours"


def judge_keys_of(keys: Keys, nodes: Sequence[SeenNode]) -> Iterator[Finding]:
    """Do all use keys, or none?"""
    locked = [node.short for node in nodes if node.locked]
    open_ = [node.short for node in nodes if node.locked is False]
    do = "start all of them with --keys, or each with --host and its LAN address; or all with --insecure"
    if locked and open_:
        does = "does" if len(locked) == 1 else "do"
        what = (
            f"{named(open_)} use{'s' * (len(open_) == 1)} no keys and {named(locked)} {does}: they refuse one another"
        )
        yield Finding(check="trust", what=what, do=do)
    elif open_ and keys.used:
        what = (
            f"{named(open_)} use{'s' * (len(open_) == 1)} no keys, and nodes here would: they would refuse one another"
        )
        yield Finding(check="trust", what=what, do=do)
    elif locked:
        yield Finding(
            check="trust", state="good", what=f"{len(locked)} with keys that this machine trusts, and vice versa"
        )


def judge_disks(nodes: Sequence[SeenNode]) -> Iterator[Finding]:
    """Have the others room?"""
    for node in nodes:
        told = node.condition
        if told is None:
            continue
        do = "make room there, or start it with another --runs"
        if not told.writable:
            what = f"{node.short} may not write in its folder of runs"
            yield Finding(check="disk", what=what, do="correct its permissions there, or start it with another --runs")
        elif told.free_bytes is not None and told.free_bytes < LITTLE_BYTES:
            full = told.free_bytes < NO_ROOM_BYTES
            what = f"{node.short} has {told.free_bytes / 2**20:.1f} MiB of disk left"
            yield Finding(check="disk", state="bad" if full else "warn", what=what, do=do)


def judge_versions(seen: Seen, nodes: Sequence[SeenNode]) -> Iterator[Finding]:
    """Is the same installed everywhere?"""
    told = [(node, node.condition) for node in nodes if node.condition]
    for node, condition in told:
        if condition.protocol != seen.here.protocol:
            what = (
                f"{node.short} speaks version {condition.protocol} of the protocol, and zsfl here {seen.here.protocol}"
            )
            yield Finding(check="versions", what=what, do="install the same zsfl on all machines")
    for package in ("zsfl", "torch"):
        found: dict[str, list[str]] = {}
        for node, condition in told:
            found.setdefault(condition.versions.get(package, "?"), []).append(node.short)
        mine = seen.here.versions.get(package, "?")
        if found.keys() - {mine}:
            listed = "; ".join(f"{version} at {named(names)}" for version, names in found.items())
            what = f"{package} differs: {mine} here; {listed}"
            do = "install the same everywhere" + (
                "" if package == "zsfl" else ", where runs are to be equal to the last bit"
            )
            yield Finding(check="versions", state="warn", what=what, do=do)


def named(names: Sequence[str]) -> str:
    """Some of them, and how many more."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
