"""What nodes tell the people who watch them: one JSON object a line on standard output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

ADDRESS = "address"
"""File in a run's folder that says where its aggregator is, or was last."""
METRICS = "metrics.jsonl"
"""File in a run's folder with the reports of its rounds, their windows and tests, one a line."""


class Report(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """Base of every report; `node` is the name of the node that speaks."""

    node: str = ""


class Ready(Report, frozen=True, kw_only=True, tag="ready"):
    """The node's sockets are open and its job is loaded."""

    role: str
    address: str
    pid: int
    machine: str = ""
    """The id of this machine, whose keys encrypt all that travels; empty: without keys, nothing is encrypted."""


class Met(Report, frozen=True, kw_only=True, tag="met"):
    """Where keys are used: whose machine a peer is on, as its key has proved."""

    peer: str
    role: str
    address: str
    machine: str
    """Its id."""
    known_as: str = ""
    """What the file of trusted keys calls it."""
    here: bool = False
    """It is the machine of this node itself."""


class Waiting(Report, frozen=True, kw_only=True, tag="waiting"):
    """The node cannot go on yet; `hints` says what to check once it has waited long."""

    what: str
    seconds: float
    hints: tuple[str, ...] = ()


class Starting(Report, frozen=True, kw_only=True, tag="starting"):
    """A cluster starts so many nodes."""

    nodes: int


class Following(Report, frozen=True, kw_only=True, tag="following"):
    """How far the run is that a client or split server takes part in, once a second at most."""

    round: int
    """The one under way, from 1."""
    rounds: int
    window: int
    windows: int
    version: int


class Assembled(Report, frozen=True, kw_only=True, tag="assembled"):
    """The aggregator knows every expected client and at least one split server."""

    clients: int
    split_servers: int
    folder: str = ""
    """Of the run."""
    rounds: int = 0
    """That are done."""


class WindowReport(Report, frozen=True, kw_only=True, tag="window"):
    """One version was committed (throttled: not every window is reported)."""

    round: int
    rounds: int
    window: int
    windows: int
    version: int
    loss: float
    steps_per_s: float
    serving: dict[str, str]
    """Client name to the name of the split server that took its last step."""


class RoundReport(Report, frozen=True, kw_only=True, tag="round"):
    """One round ended: training loss over it, and the held-out test of the weights it ended with."""

    round: int
    rounds: int
    version: int
    train_loss: float
    """Sample-weighted mean of the training loss over the round's steps."""
    train_losses: dict[str, float | None] = {}
    """The same by client, each over its own steps that counted; empty where an older zsfl wrote it."""
    loss: float | None
    """Held-out loss, mean over test samples; None when no client has test data."""
    accuracy: float | None
    """Held-out accuracy in 0..1; None when the job has no metric or no client has test data."""
    steps: int
    samples: int
    seconds: float
    steps_per_s: float
    bytes_sent: int
    """Over all nodes, in this round, tensors and headers."""
    late: int = 0
    """Steps that counted although they were made at an earlier version."""
    dropped: int = 0
    """Steps that came too late to count; the ledger has each one's reason."""
    staleness: float = 0.0
    """By how many versions the steps that counted were behind, on average."""
    without: tuple[str, ...] = ()
    """Clients that were not there when it ended, or when it was tested: held-out figures are without their samples."""
    serving: dict[str, dict[str, int]]
    """Client name to split-server name to steps of this round that counted."""
    peers: dict[str, dict[str, float]]
    """Node name to its counters (steps, bytes_sent, bytes_received, busy, retries, ...) in this round."""


class Tested(Report, frozen=True, kw_only=True, tag="tested"):
    """The clients tested a version on their held-out samples, while training went on."""

    round: int
    """Rounds that were done at that version."""
    version: int
    loss: float | None
    """Mean over all test samples of all clients that are there; None when no client has any."""
    accuracy: float | None
    """In 0..1, over the same samples; None when the job has no metric or no client has test data."""
    clients: dict[str, float | None]
    """Accuracy by client, each on its own test samples."""
    losses: dict[str, float | None] = {}
    """Loss by client, of the same samples; None where it is left out. Empty where an older zsfl wrote it."""
    seconds: float
    """When the version was made: seconds since this process began to train."""
    ends_round: bool = True
    """Whether it is the test at the end of a round, which the round's report repeats."""
    left_out: tuple[str, ...] = ()
    """Clients whose loss was not finite, or out of all proportion to that of others: not in `loss` and `accuracy`."""
    without: tuple[str, ...] = ()
    """Clients that were not there, or did not answer: their samples are not in `loss` and `accuracy` either."""


class Before(Report, frozen=True, kw_only=True, tag="before"):
    """What a run that is taken up again has left of its rounds so far; of many rounds there are several, in order."""

    reports: tuple[RoundReport | Tested, ...]


class Finished(Report, frozen=True, kw_only=True, tag="finished"):
    """The rounds asked for are done; `folder` holds what the run leaves, `seconds` is how long all that took part in it
    trained them.
    """

    rounds: int
    version: int
    accuracy: float | None
    loss: float | None
    seconds: float
    folder: str
    best_accuracy: float | None = None
    best_version: int | None = None
    """Of the best held-out test so far, whose weights are in best.safetensors."""
    without: tuple[str, ...] = ()
    """Clients whose samples are not in `accuracy` and `loss`."""
    best_without: tuple[str, ...] = ()
    """The same of the best one."""
    early: bool = False
    """Training ended before its last round, as held-out tests no longer got better (`Job.stop_after`)."""


LOGGED = "; its log has the traceback"
"""How the message of an error ends that is none of zsfl's."""


class Failed(Report, frozen=True, kw_only=True, tag="failed"):
    """The node stops with an error; `kind` is the error's class name."""

    kind: str
    message: str


ADVICE = "advice"
"""Level of a note that has a command in it, to be copied whole."""


class Note(Report, frozen=True, kw_only=True, tag="note"):
    """Something worth a line in the log: a peer came or went, a contribution was refused."""

    message: str
    level: str = "info"


class Exited(Report, frozen=True, kw_only=True, tag="exited"):
    """A process ended (reported by whoever started it); a negative code is a signal."""

    code: int


AnyReport = (
    Ready | Met | Waiting | Starting | Following | Assembled | WindowReport | RoundReport | Tested | Before | Finished
    | Failed | Note | Exited
)  # fmt: skip

_decoder = msgspec.json.Decoder(AnyReport)


def to_line(report: AnyReport) -> bytes:
    """One report as one JSON line, newline included."""
    return msgspec.json.encode(report) + b"\n"


def from_line(line: bytes | str) -> AnyReport:
    """The report in one JSON line; `msgspec.ValidationError` when it is not one."""
    return _decoder.decode(line)


def readable(lines: Iterable[bytes]) -> Iterator[AnyReport]:
    """The reports in these lines, but for those that cannot be read: JSON has no infinity, so that of a run that
    diverged some cannot.
    """
    for line in lines:
        with suppress(msgspec.DecodeError, UnicodeDecodeError):
            yield from_line(line)


def reports_in(folder: Path) -> list[AnyReport]:
    """Those that a run's folder has, but for a last one that is not written to its end; none where it has no file."""
    path = folder / METRICS
    if not path.is_file():  # a pipe, say, would be waited for
        return []
    return list(readable(path.read_bytes().split(b"\n")[:-1]))
