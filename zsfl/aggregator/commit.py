"""The ledger: which steps made which weights, one record a version, each naming the one before."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from zsfl.aggregator.run_folder import RunFolder
from zsfl.errors import RemoteProtocolError, RunFailed, StorageError
from zsfl.ids import Cid, Version
from zsfl.learning.averaging import Contribution, is_loss


class Clipped(msgspec.Struct, frozen=True, kw_only=True):
    """A step whose gradient was longer than the job allows."""

    by: float
    """What the gradient was multiplied by."""
    norm: float
    """How long it was: the L2 norm of the step's mean gradient."""
    client: str
    """Whose step it is."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One commit."""

    version: Version
    """The version that this commit made."""
    predecessor: str
    """SHA-256 of the record before; empty for the first."""
    counted: list[Cid]
    dropped: dict[Cid, str]
    """Reason by cid: came too late, never came whole, or was refused."""
    weighed: dict[Cid, tuple[float, float]]
    """What a counted step's gradient was multiplied by, for its client's share and for being late, where not by 1."""
    samples: int
    n: float
    weights: str
    """Digest of the weights this commit made."""
    clipped: dict[Cid, Clipped] = {}
    """Counted steps that were made shorter."""
    chosen: list[int] = []
    """Shards whose gradients were taken, where the job's average is one that chooses among them."""
    refused: int = 0
    """Samples of the dropped steps that were refused."""
    merged: list[Cid] = []
    """First cids of the merged contributions that were counted: the body parts of several of these steps."""
    round: int = 0
    """Rounds that were done before the one that this commit is part of."""
    window: int = 0
    """Its place in that round."""
    epoch: int = 0
    """How often another aggregator had taken over, and one more; 0: nobody stood by."""
    without: list[int] = []
    """Shards whose clients had left by then."""
    memory: dict[str, Any] = {}
    """What the mode's rules knew after it, for a restart; empty in the modes whose rules know nothing."""


class RecordLine(NamedTuple):
    """A record as it stands in the file."""

    record: Record
    digest: str
    """SHA-256 of its line, which the next record names."""


def read_record(line: bytes, place: str) -> RecordLine:
    """A line of a ledger; `StorageError`, naming its place, when it is none."""
    try:
        return RecordLine(msgspec.json.decode(line, type=Record), hashlib.sha256(line).hexdigest())
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StorageError(f"{place} is no commit record: {error}") from error


def read_chain(data: bytes, last: str, version: Version) -> tuple[str, Version]:
    """Digest and version of the last of these lines, which go on from such ones; RemoteProtocolError if they do not."""
    for line in data[:-1].split(b"\n"):
        try:
            record, digest = read_record(line, "what follows the ledger here")
        except StorageError as error:
            raise RemoteProtocolError(str(error)) from error
        if record.predecessor != last or record.version <= version:
            raise RemoteProtocolError(f"the record of version {record.version} does not follow the last one here")
        last, version = digest, record.version
    return last, version


def check_losses(window: Sequence[Contribution], place: str) -> None:
    """RunFailed, naming the step, when one has a loss that is no finite number."""
    for step in window:
        if step.loss_sum is not None and not is_loss(step.loss_sum):
            raise RunFailed(
                f"the loss became {step.loss_sum} at {place}, in the step {step.cid} of {step.whose}. "
                "Lower the learning rate, or look for bad samples there"
            )


class Elsewhere(Protocol):
    """Where a record is to be before it is in the file."""

    async def record(self, version: Version, line: bytes) -> None:
        """Returns once it is there; it may be tried again."""
        ...


class Ledger:
    """Appends records to the run's ledger file. Committing blocks on the disk."""

    def __init__(self, folder: RunFolder, *, sync: bool = False) -> None:
        """With `sync` a record would outlast a loss of power when `commit` returns."""
        self._folder = folder
        self._sync = sync
        self.elsewhere: Elsewhere | None = None
        self.last = ""

    def records(self) -> list[RecordLine]:
        """All of them, in order."""
        path = self._folder.ledger_path
        return [read_record(line, f"line {number} of {path}") for number, line in enumerate(self._folder.commits(), 1)]

    def resume(self, last: str) -> list[RecordLine]:
        """Go on after the record with this digest, or from the start; the records that follow it."""
        records = self.records()
        self.last = last
        if not last:
            return records
        for number, line in enumerate(records, 1):
            if line.digest == last:
                return records[number:]
        raise StorageError(f"{self._folder.ledger_path} has no record of the checkpoint beside it; start the run anew")

    def cut(self) -> None:
        """Remove what follows the last record: it names versions that are lost and will be made again."""
        self._folder.cut_commits(lambda line: hashlib.sha256(line).hexdigest() == self.last, whole=not self.last)

    def cut_after(self, version: Version) -> None:
        """Remove the records of later versions."""
        kept = [line for line in self.records() if line.record.version <= version]
        self.last = kept[-1].digest if kept else ""
        self.cut()

    async def put(self, record: Record) -> None:
        """As `commit`; before that it is elsewhere, where that is asked for."""
        if self.elsewhere is not None:
            line = msgspec.json.encode(msgspec.structs.replace(record, predecessor=self.last))
            await self.elsewhere.record(record.version, line)
        self.commit(record)

    def commit(self, record: Record) -> None:
        """Append a record, which names the one before."""
        record = msgspec.structs.replace(record, predecessor=self.last)
        self._folder.append_commit(msgspec.to_builtins(record), sync=self._sync)
        self.last = hashlib.sha256(msgspec.json.encode(record)).hexdigest()


def record_of(at: Version, window: Sequence[Contribution], dropped: Mapping[Cid, str], weights: str) -> Record:
    """That the steps in `window` made the version after `at`, and what was dropped meanwhile."""
    steps = [contribution for contribution in window if contribution.part == "client"]
    return Record(
        version=Version(at + 1),
        predecessor="",
        counted=[step.cid for step in steps],
        merged=[one.cid for one in window if one.members],
        dropped=dict(dropped),
        weighed={step.cid: (step.scale, step.damping) for step in steps if (step.scale, step.damping) != (1, 1)},
        samples=sum(step.samples for step in steps),
        n=sum(step.n for step in steps),
        weights=weights,
    )
