"""What the folder of a run proves: that every step was counted once, dropped with a reason, or is still pending."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from zsfl.aggregator.commit import Record, RecordLine, read_record
from zsfl.aggregator.journal import Journal, Kept, found_in
from zsfl.aggregator.progress import Place, checkpoints, place_of
from zsfl.aggregator.replay import CannotReplay, replay, window_of
from zsfl.aggregator.run_folder import CHECKPOINT, JOURNAL, LEDGER, whole_lines
from zsfl.errors import BadShape, ConfigError, StorageError, ZsflError
from zsfl.ids import Cid, Version, parse_cid
from zsfl.learning.job import Job
from zsfl.learning.master import Master, saved_state, state_digest
from zsfl.spill.segments import SUFFIX
from zsfl.words import number_of


@dataclass(slots=True)
class Audit:
    """What was found."""

    versions: int = 0
    counted: int = 0
    dropped: int = 0
    pending: int = 0
    """Steps that a spill is there of, and that may still be counted."""
    void: int = 0
    """Steps of a run that failed, beyond the last version that was any good: a resume has them made again."""
    samples: int = 0
    verified: int = 0
    """Versions of which all contributions are kept, whole and as recorded."""
    without: Counter[int] = field(default_factory=Counter[int])
    """By shard, the versions that were made while its client was away."""
    faults: list[str] = field(default_factory=list[str])


def audit(
    folder: Path, looked: Callable[[int, int], None] = lambda _done, _all: None, stored: Collection[Cid] = ()
) -> Audit:
    """Check ledger, contributions, checkpoints and spills of one run; `ConfigError` when it is no run's folder.

    Nothing is changed, so that a run in progress may be looked at, too. `looked` is told how many versions of how many
    were looked at. `stored` are steps of which there are spills elsewhere.
    """
    found = Audit()
    # Before the ledger, which in a run in progress has then at least what came of them.
    kept = Journal(folder / JOURNAL).kept()
    acknowledged = {cid for cid, _ in kept} | set(_spilled(folder)) | set(stored)
    lines = list(_records(folder, found.faults.append))
    records = [line.record for line in lines]
    settled = _settled(records, found.faults.append)
    found.versions, found.samples = len(records), sum(record.samples for record in records)
    found.counted = sum(len(record.counted) for record in records)
    found.without = Counter(shard for record in records for shard in record.without)
    found.dropped = sum(len(record.dropped) for record in records)
    places = _check_checkpoints(folder, lines, found.faults.append)
    since = min((place.version for place in places), default=Version(0))
    for number, record in enumerate(records, 1):
        found.verified += _is_verified(record, kept, since, folder, found.faults.append)
        looked(number, len(records))
    counted = [cid for record in records for cid in record.counted if cid in settled]
    last = parse_cid(counted[-1]).run if counted else ""
    left = [cid for cid in acknowledged - settled if parse_cid(cid).run == last]
    if places and not places[-1].run:
        found.void = len(left)
        return found
    found.pending, version = len(left), Version(len(records))
    found.faults += [f"{cid} is of a later version than any" for cid in left if parse_cid(cid).version > version]
    return found


def _records(folder: Path, fault: Callable[[str], None]) -> Iterator[RecordLine]:
    path = folder / LEDGER
    if not path.is_file():
        raise ConfigError(f"{folder} has no {LEDGER}: name the folder of a run, such as runs/mnist")
    before, version = "", 0
    for number, line in enumerate(whole_lines(path), 1):
        try:
            found = read_record(line, f"line {number} of {path}")
        except StorageError as error:
            fault(str(error))
            return
        version += 1
        if found.record.predecessor != before:
            fault(
                f"the record of version {found.record.version} does not follow the one before it: the chain is broken"
            )
        if found.record.version != version:
            fault(
                f"version {version} has no record of its own; line {number} is that of version {found.record.version}"
            )
            version = found.record.version
        before = found.digest
        yield found


def _settled(records: Sequence[Record], fault: Callable[[str], None]) -> set[Cid]:
    """All steps that were counted or dropped; each may have been once."""
    fates: dict[Cid, str] = {}
    for record in records:
        ways = [(cid, f"counted in version {record.version}") for cid in record.counted]
        ways += [(cid, f"dropped in version {record.version}") for cid in record.dropped]
        for cid, fate in ways:
            if cid in fates:
                fault(f"{cid} was {fates[cid]}, and {fate}")
            try:
                step = parse_cid(cid)
            except BadShape as error:
                fault(f"the record of version {record.version} names what is no step: {error}")
                continue
            fates[cid] = fate
            if fate.startswith("counted") and step.version >= record.version:
                fault(f"{cid} was {fate}, before it can have been made")
    return set(fates)


def _oldest(folder: Path) -> Version:
    """Of the checkpoints that are kept, the version."""
    versions: list[Version] = []
    for path in checkpoints(folder / CHECKPOINT):
        with suppress(ZsflError):  # it is told elsewhere, or was dropped meanwhile
            versions.append(place_of(path).version)
    return min(versions, default=Version(0))


def _is_verified(record: Record, kept: Kept, since: Version, folder: Path, fault: Callable[[str], None]) -> bool:
    """Whether what the record counts is here, as it must be of versions after `since`, and adds up to what it says."""
    try:
        window = window_of(record, kept)
    except CannotReplay as error:
        # A run in progress drops what is older than its checkpoints: they are looked at again before a fault is told.
        if error.is_damaged or (record.version > since and record.version > _oldest(folder)):
            fault(f"version {record.version}: {error}")
        return False
    steps = [one for one in window if one.part == "client"]
    if sum(one.samples for one in steps) != record.samples or not math.isclose(sum(o.n for o in steps), record.n):
        fault(f"version {record.version} counts {number_of(record.samples, 'sample')}, its contributions have others")
        return False
    return True


def _spilled(folder: Path) -> Iterator[Cid]:
    """Steps of which nodes that keep their runs in the same folder hold a spill."""
    for path in (folder.parent / "spills").glob("*/*/*"):
        with suppress(OSError, BadShape):
            if path.suffix == SUFFIX:
                yield from (cid for cid, _ in found_in(path))
            elif path.suffix == ".safetensors":
                parse_cid(cid := path.name.partition(".")[0])
                yield Cid(cid)


def _check_checkpoints(folder: Path, lines: Sequence[RecordLine], fault: Callable[[str], None]) -> list[Place]:
    """Those that are kept, oldest first."""
    weights = {line.record.version: line.record.weights for line in lines}
    digests = {line.record.version: line.digest for line in lines}
    places: list[Place] = []
    for path in checkpoints(folder / CHECKPOINT):
        try:
            place, digest = place_of(path), state_digest(saved_state(path))
        except ZsflError as error:
            if path.exists():  # one that a run in progress has dropped meanwhile is no fault
                fault(str(error))
            continue
        places.append(place)
        if place.version and (weights.get(place.version), digests.get(place.version)) != (digest, place.commit):
            fault(f"the checkpoint {path.name} is not of version {place.version} as the ledger has it")
    if lines and not places:
        fault(f"there is no checkpoint in {folder / CHECKPOINT} that a resume could go on from")
    return places


def replay_versions(folder: Path, job: Job, first: int, last: int) -> Iterator[Version]:
    """Make these versions again from the nearest checkpoint, each as it is proven equal to the record, bit for bit.

    `ConfigError` when one of them is not there (any more), `StorageError` when one comes out otherwise.
    """
    records = {line.record.version: line.record for line in _records(folder, _refuse)}
    if not 1 <= first <= last <= len(records):
        raise ConfigError(f"versions {first} to {last} cannot be made again: the ledger has 1 to {len(records)}")
    before = [path for path in checkpoints(folder / CHECKPOINT) if place_of(path).version < first]
    if not before:
        oldest = min((place_of(path).version for path in checkpoints(folder / CHECKPOINT)), default=len(records))
        later = f"{oldest + 1} to {len(records)}" if oldest < len(records) else "none"
        raise ConfigError(
            f"no checkpoint from before version {first} is kept: of this run versions {later} can be made again. Have "
            "more kept with --keep-mib when the run is started"
        )
    place, kept = place_of(before[-1]), Journal(folder / JOURNAL).kept()
    again = {place_of(path).version: path for path in checkpoints(folder / CHECKPOINT)}
    master = Master(job.build(), job.optimizer, job.average, frozen_norms=job.batch_norm == "frozen")
    for version in range(place.version + 1, last + 1):
        try:
            if (
                version - 1 in again
            ):  # where it begins; and later ones, as the optimizer's options may have changed there
                master.restore(again[Version(version - 1)])
            replay(master, records[Version(version)], kept, sequential=job.local_lr is not None)
        except CannotReplay as error:
            raise StorageError(f"version {version} cannot be made again: {error}") from error
        if version >= first:
            yield Version(version)


def _refuse(fault: str) -> None:
    raise StorageError(fault)
