"""Decisions about nodes together: of which jobs are they, who is missing, who does not hear whom, and why?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations

from zsfl.discovery.announced import job_hash, opaque
from zsfl.discovery.table import wants_of
from zsfl.doctor.nodes import named
from zsfl.doctor.seen import Finding, Seen, SeenNode
from zsfl.ids import PROTOCOL, NodeCard, NodeId, Role
from zsfl.waits import FIRST_WORD_S
from zsfl.wire.door import is_loopback
from zsfl.wire.examining import Condition

STALE_S = 3.0
"""Who was not heard for longer is not heard."""
MOST_PAIRS = 8
"""Of pairs that do not hear each other, as many are explained."""
BY_FLAG = frozenset({"cluster", "shards", "mode", "codec"})
"""Facts of a job that flags may change, so that its file does not say what they are."""
KNOWN_PROTOCOLS = range(1, PROTOCOL + 4)
Group = tuple[str, str]
"""Name of a job, and of the cluster."""


def group_of(node: SeenNode) -> Group | None:
    """Of which job it is, as far as it says."""
    facts = node.condition.facts if node.condition else {}
    return (facts["name"], facts.get("cluster", "")) if "name" in facts else None


def groups_of(seen: Seen) -> tuple[dict[Group, list[SeenNode]], list[SeenNode], list[SeenNode]]:
    """Those that are looked for, by group; those of other jobs; and those of whom that cannot be told."""
    ours: dict[Group, list[SeenNode]] = {}
    others: list[SeenNode] = []
    unknown: list[SeenNode] = []
    for node in seen.nodes:
        group = group_of(node)
        if group is None:
            if node.condition is None:  # somebody who only looks has no job
                (others if _is_foreign(seen, node) else unknown).append(node)
        elif (seen.job and group[0] != seen.job) or (seen.cluster and group[1] != seen.cluster):
            others.append(node)
        else:
            ours.setdefault(group, []).append(node)
    for nodes in ours.values():
        known = {node.address for node in nodes}
        nodes += [node for node in unknown if node.sources & known]
    return ours, others, unknown


def _is_foreign(seen: Seen, node: SeenNode) -> bool:
    """Whether what a node announces is of another job than is looked for."""
    return bool(seen.job and node.announced and node.sources == frozenset({"mdns"}) and protocol_of(seen, node) is None)


def protocol_of(seen: Seen, node: SeenNode) -> int | None:
    """Which protocol a node of our job announces that it speaks; None: it is of another job, or unknown."""
    if node.announced is None:
        return None
    node_id, hashes = node.announced
    clusters = {seen.cluster, *(group[1] for other in seen.nodes if (group := group_of(other)))}
    names = {seen.job} - {""} or {group[0] for other in seen.nodes if (group := group_of(other))}
    for protocol in KNOWN_PROTOCOLS:
        for job in (job_hash(name, cluster) for name in names for cluster in clusters):
            if opaque(NodeId(node_id), job, protocol, Role.CLIENT, "")[:16] == hashes[:16]:
                return protocol
    return None


def judge_protocols(seen: Seen, unknown: Iterable[SeenNode]) -> Iterator[Finding]:
    """Of those that do not answer: is it because they are of another zsfl?"""
    for node in unknown:
        protocol = protocol_of(seen, node)
        if protocol not in (None, PROTOCOL):
            what = f"{node.name} announces version {protocol} of the protocol, and zsfl here speaks {PROTOCOL}"
            yield Finding(check="versions", what=what, do="install the same zsfl on all machines")


# --- jobs and roles ---------------------------------------------------------------------------------------


def is_silent(node: SeenNode) -> bool:
    """Whether somebody who should be there does not answer; not one that was there before."""
    return node.silence not in ("", "behind NAT") and node.sources != frozenset({"run"})


def has_all(nodes: Iterable[SeenNode]) -> bool:
    """Whether there is somebody for everything."""
    return not _missing(nodes)


def _missing(nodes: Iterable[SeenNode]) -> list[Role]:
    roles = {node.card.role for node in nodes if node.card}
    heard = [one.card for node in nodes if node.condition for one in node.condition.hears]
    roles |= {card.role for card in heard if card.behind_nat}
    return [role for role in (Role.AGGREGATOR, Role.SPLIT_SERVER, Role.CLIENT) if role not in roles]


def judge_jobs(seen: Seen, ours: Mapping[Group, Sequence[SeenNode]], others: Sequence[SeenNode]) -> Iterator[Finding]:
    """Who is there, of which job?"""
    named_job = f"job {seen.job}" + (f" in cluster {seen.cluster}" if seen.cluster else "") if seen.job else "any job"
    if not ours:
        known = "; some do not answer, see above" if any(is_silent(node) for node in seen.nodes) else ""
        what = f"no node of {named_job} was found{known}"
        do = "start one, or name one that runs: --peer HOST:PORT, which its first line says"
        yield Finding(check="nodes", what=what, do=do)
    for group, nodes in ours.items():
        names = named([node.name for node in nodes])
        yield Finding(check="nodes", state="good", what=f"{len(nodes)} of {_said(group)}: {names}")
    well = bool(ours) and all(has_all(nodes) for nodes in ours.values())
    if len(ours) > 1:
        listed = "; ".join(f"{_said(group)}: {named([node.name for node in nodes])}" for group, nodes in ours.items())
        what = f"these leave one another alone: {listed}"
        do = "" if well else "if they belong together, start all with the same job file, and the same --cluster or none"
        yield Finding(check="jobs", state="good" if well else "bad", what=what, do=do)
    if others:
        listed = named([f"{node.name} ({_its_job(node)})" for node in others])
        what = f"not of {named_job}: {listed}"
        do = "" if well else "if they belong here, start them with the same job file, and the same --cluster or none"
        yield Finding(check="jobs", state="good" if well else "warn", what=what, do=do)


def _said(group: Group) -> str:
    return f"job {group[0]}" + (f" in cluster {group[1]}" if group[1] else "")


def _its_job(node: SeenNode) -> str:
    group = group_of(node)
    return _said(group) if group else "another job or cluster, by what it announces"


def judge_roles(
    ours: Mapping[Group, Sequence[SeenNode]], others: Sequence[SeenNode], silent: bool
) -> Iterator[Finding]:
    """Is there somebody for everything, and what do they wait for? `silent`: there are some who do not answer."""
    for group, nodes in ours.items():
        if missing := _missing(nodes):
            elsewhere = [node.name for node in others if node.card and node.card.role in missing]
            do = "start " + " and ".join(f"`zsfl node {role} JOB`" for role in missing)
            do += f", or correct the job of {named(elsewhere)}" if elsewhere else ""
            if silent:
                do += "; or find out why those above do not answer"
            else:
                do += "; one that runs and is not found here: zsfl doctor --peer HOST:PORT of it"
            yield Finding(check="roles", what=f"{_said(group)} has no {' and no '.join(map(_words, missing))}", do=do)
        else:
            yield Finding(check="roles", state="good", what=f"{_said(group)} has {_counted(nodes)}")
        for node in nodes:
            for wait in node.condition.waits if node.condition else ():
                if wait.seconds >= FIRST_WORD_S:
                    what = f"{node.short} has been waiting for {wait.seconds:.0f} s for {wait.what}"
                    yield Finding(
                        check="waits", what=what, do="start what it waits for, or see above why it is not found"
                    )


def _words(role: Role) -> str:
    return role.replace("-", " ")


def _counted(nodes: Sequence[SeenNode]) -> str:
    roles = [node.card.role for node in nodes if node.card]
    counts = {role: roles.count(role) for role in (Role.AGGREGATOR, Role.STANDBY, Role.SPLIT_SERVER, Role.CLIENT)}
    return ", ".join(f"{count} {_words(role)}{'s' * (count > 1)}" for role, count in counts.items() if count)


def judge_facts(seen: Seen, ours: Mapping[Group, Sequence[SeenNode]]) -> Iterator[Finding]:
    """Have all the same job under its name?"""
    for nodes in ours.values():
        told = [(node, node.condition) for node in nodes if node.condition]
        first, theirs = next(((n, c) for n, c in told if c.card.role is Role.AGGREGATOR), told[0])
        for node, condition in told:
            if difference := _difference(theirs.facts, condition.facts, first.short, node.short):
                what = f"{node.short} has another job of the same name than {first.short}: {difference}"
                yield Finding(
                    check="jobs", what=what, do="copy the same job file to all machines, and give the same flags"
                )
        mine = {name: fact for name, fact in seen.here.torch.facts.items() if name not in BY_FLAG}
        there = {name: fact for name, fact in theirs.facts.items() if name not in BY_FLAG}
        if mine and (difference := _difference(mine, there, "the job file here", first.short)):
            yield Finding(
                check="jobs", what=f"not the same job: {difference}", do="copy the same job file to all machines"
            )


def _difference(mine: Mapping[str, str], theirs: Mapping[str, str], me: str, them: str) -> str:
    names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    return "; ".join(f"{name} is {mine.get(name, '-')} at {me} and {theirs.get(name, '-')} at {them}" for name in names)


# --- who hears whom ---------------------------------------------------------------------------------------


def hears(told: Condition, card: NodeCard) -> bool | None:
    """Whether a node hears another one; None where its answer had no room to say."""
    for one in told.hears:
        if one.card.id == card.id:
            return one.heard_s <= STALE_S
    return None if told.peers > len(told.hears) else False


def should_meet(one: NodeCard, other: NodeCard) -> bool:
    """Whether these two have anything to say to one another."""
    return wants_of(one.role)(other.role) or wants_of(other.role)(one.role)


def judge_hearing(ours: Mapping[Group, Sequence[SeenNode]]) -> Iterator[Finding]:
    """Who does not hear whom, and why?"""
    for group, nodes in ours.items():
        deaf = list(unheard(nodes))
        once = [pair for number, pair in enumerate(deaf) if pair[::-1] not in deaf[:number]]
        for one, other in once[:MOST_PAIRS]:
            both = (other, one) in deaf
            what = f"{one.short} and {other.short} do not hear" if both else f"{one.short} does not hear"
            why, do = _why_deaf(one, other)
            yield Finding(check="hearing", what=f"{what} {'each other' if both else other.short}{why}", do=do)
        if len(once) > MOST_PAIRS:
            yield Finding(
                check="hearing", what=f"so it is with {len(once) - MOST_PAIRS} more pairs", do="see these first"
            )
        if not deaf and len(nodes) > 1:
            yield Finding(check="hearing", state="good", what=f"all of {_said(group)} hear those that they need to")
        yield from _other_refusals(nodes, deaf)


def unheard(nodes: Sequence[SeenNode]) -> Iterator[tuple[SeenNode, SeenNode]]:
    """Each pair of which the first does not hear the second, and should."""
    told = [(node, node.condition) for node in nodes if node.condition]
    for (one, mine), (other, theirs) in combinations(told, 2):
        if should_meet(mine.card, theirs.card):
            if hears(mine, theirs.card) is False:
                yield one, other
            if hears(theirs, mine.card) is False:
                yield other, one


def _why_deaf(one: SeenNode, other: SeenNode) -> tuple[str, str]:
    mine, theirs = one.condition, other.condition
    if mine is None or theirs is None:
        return "", ""
    if why := mine.refused.get(theirs.card.address) or theirs.refused.get(mine.card.address):
        return f": {why}", "do what that says"
    local = [node.short for node in (one, other) if is_loopback(node.address.rpartition(":")[0])]
    if len(local) == 1:
        return f", as {local[0]} serves its own machine alone", "start it with --host and an address of its LAN"
    if one.locked != other.locked:
        return ", as one of them uses keys and the other does not", "start both with keys, or both with --insecure"
    peer = f"start {one.short} with --peer {theirs.card.address}"
    if not (mine.mdns and theirs.mdns):
        off = one.short if not mine.mdns else other.short
        return f": mDNS is off at {off}, and no --peer leads from one to the other", peer
    if _ports_shut(other) or _ports_shut(one):
        return ", see the ports above", "open the ports"
    return (
        ", though both run",
        f"where multicast is blocked, {peer}; or see what zsfl doctor says on the machine of {other.short}",
    )


def _ports_shut(node: SeenNode) -> bool:
    return any(reach != "open" for reach in node.ports.values())


def _other_refusals(nodes: Sequence[SeenNode], deaf: Sequence[tuple[SeenNode, SeenNode]]) -> Iterator[Finding]:
    """What nodes say of addresses at which none of the others is."""
    explained = {(one.address, other.address) for pair in deaf for one, other in (pair, pair[::-1])}
    for node in nodes:
        for address, why in (node.condition.refused if node.condition else {}).items():
            if (node.address, address) not in explained:
                yield Finding(
                    check="refusals", what=f"{node.short} has no peer at {address}: {why}", do="do what that says"
                )
