"""Makes versions again, from commit records and the contributions that they counted: after a restart, in an audit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zsfl.aggregator.commit import Ledger, Record
from zsfl.aggregator.journal import Kept, Key
from zsfl.aggregator.progress import Place
from zsfl.errors import RunFailed, SpillCorrupt
from zsfl.ids import Version
from zsfl.learning.averaging import Contribution
from zsfl.learning.master import Master


class CannotReplay(Exception):
    """A version cannot be made again; says why."""

    is_damaged = False
    """Whether what it needs is there, but not as it was."""


@dataclass(frozen=True, slots=True)
class Made:
    """A version that was made again."""

    record: Record
    window: Sequence[Contribution]
    """What it counts, without the gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """Where a run stood when its aggregator ended."""

    version: Version
    round: int
    """Rounds that were done."""
    windows: Sequence[Made]
    """Of the round in progress."""
    memory: Mapping[str, Any]
    """What the mode's rules knew."""
    without: frozenset[int] = frozenset()
    """Shards whose clients had left."""
    lost: str = ""
    """Why later versions, of which there are records, are lost."""


def recover(
    place: Place, master: Master, ledger: Ledger, kept: Kept, restore: Callable[[], object], *, sequential: bool
) -> Recovered:
    """Bring `master`, now at the checkpoint of `place`, to the last version that the ledger has, which goes on there.

    `restore` brings it back to the checkpoint.
    """
    records, lost = ledger.resume(place.commit), ""
    windows: list[Made] = []
    for number, line in enumerate(records):
        try:
            windows.append(replay(master, line.record, kept, sequential=sequential))
        except CannotReplay as error:
            lost, records = f"version {line.record.version}: {error}", records[:number]
            restore()
            for made in windows:
                replay(master, made.record, kept, sequential=sequential)
            break
    if records:
        ledger.last = records[-1].digest
    ledger.cut()
    without = frozenset(shard for line in ledger.records()[-1:] for shard in line.record.without)
    if not records:
        return Recovered(
            version=place.version, round=place.round, windows=(), memory=place.memory, without=without, lost=lost
        )
    last = records[-1].record
    return Recovered(
        version=last.version,
        round=last.round,
        windows=[made for made in windows if made.record.round == last.round],
        memory=last.memory,
        without=without,
        lost=lost,
    )


def window_of(record: Record, kept: Kept) -> list[Contribution]:
    """The contributions that a record counts, weighed as it says; `CannotReplay` when one is not there or not whole."""
    found = {cid: _read(kept, (cid, "merged")) for cid in record.merged}
    inside = {member.cid for one in found.values() for member in one.members}
    window: list[Contribution] = []
    for cid in record.counted:
        if cid in found:
            window.append(found[cid])
        elif cid not in inside:
            window.append(_read(kept, (cid, "body")))
        window.append(_read(kept, (cid, "client")))
    return [_weighed(one, record) for one in window]


def _weighed(one: Contribution, record: Record) -> Contribution:
    if one.cid not in record.weighed and one.cid not in record.clipped:
        return one
    scale, damping = record.weighed.get(one.cid, (1.0, 1.0))
    clipped = record.clipped.get(one.cid)
    return replace(one, scale=scale, damping=damping, clip=1.0 if clipped is None else clipped.by)


def _read(kept: Kept, key: Key) -> Contribution:
    cid, kind = key
    try:
        return kept.read(key)
    except KeyError:
        raise CannotReplay(f"the {kind} contribution of {cid} is not kept any more") from None
    except (SpillCorrupt, OSError) as error:
        damaged = CannotReplay(f"the {kind} contribution of {cid} cannot be read: {error}")
        damaged.is_damaged = True
        raise damaged from error


def replay(master: Master, record: Record, kept: Kept, *, sequential: bool) -> Made:
    """Make the version of this record, of the one before it; `CannotReplay` when it comes out otherwise."""
    window = window_of(record, kept)
    if window:
        try:
            master.step(window, version=Version(record.version - 1), sequential=sequential)
        except RunFailed as error:
            raise CannotReplay(str(error)) from error
    if master.digest() != record.weights:
        raise CannotReplay(
            "it comes out with other weights than recorded: is the job, and are the versions of torch and of this "
            "program, the ones of then?"
        )
    return Made(record, [replace(one, grads={}, buffers={}) for one in window])
