"""Every error zsfl raises on purpose.

ZsflError
├── ConfigError            a job, flag, file or setting is wrong: correct it and start again
├── ProtocolError          somebody broke the wire protocol
│   ├── LocalProtocolError     this node did
│   └── RemoteProtocolError    the peer did
├── Unavailable            another server, or a later try, may help
│   ├── NoPeer                 nobody there to do it
│   ├── Busy                   the peer refuses surplus work
│   ├── Held                   somebody else holds it, who may be gone soon
│   └── DeadlineExceeded       no answer in time
├── Rejected               trying the same again will not help
│   ├── StaleWeights           the version is no longer held
│   ├── InputNeeded            the forward is no longer cached: send the input again
│   ├── BadShape               dtype, shape and bytes do not agree
│   └── Unauthorised           this peer may not do that
├── StorageError           the local disk, or the store that spills go to
│   ├── StoreAway              that store does not answer, or refuses
│   ├── SpillFull              no room for another spill
│   ├── SpillTooLarge          there never is room for this one
│   └── SpillCorrupt           a spill does not match its checksum
├── Fenced                 another aggregator has taken over
└── RunFailed              the training run itself cannot go on

A message says what happened, to which node, and what to do.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import cast


class ZsflError(Exception):
    """Base of every error zsfl raises on purpose."""


class ConfigError(ZsflError):
    """A job, flag, file or setting is wrong."""


class ProtocolError(ZsflError):
    """Somebody broke the wire protocol."""


class LocalProtocolError(ProtocolError):
    """This node was asked to send what the protocol does not allow."""


class RemoteProtocolError(ProtocolError):
    """The peer sent what the protocol does not allow; `message_id` tells in which message, where it can be read."""

    def __init__(self, message: str, message_id: int | None = None) -> None:
        super().__init__(message)
        self.message_id = message_id


class Unavailable(ZsflError):
    """Another server, or a later try, may help."""


class NoPeer(Unavailable):
    """No peer is there to do it."""


class Busy(Unavailable):
    """The peer refuses surplus work; `retry_after_s` is its own estimate of when it has room."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Held(Unavailable):
    """Somebody else holds what was asked for; it may come free."""


class DeadlineExceeded(Unavailable):
    """No answer came in time."""


class Rejected(ZsflError):
    """Trying the same again will not help."""


class StaleWeights(Rejected):
    """The version asked for is no longer held; redo the step at the current one."""


class InputNeeded(Rejected):
    """The forward is no longer cached; send the input again with the gradient."""


class BadShape(Rejected):
    """dtype, shape and byte count do not agree, with each other or with the model."""


class Unauthorised(Rejected):
    """This peer may not do that."""


class StorageError(ZsflError):
    """The local disk refuses, or the store that spills go to."""


class StoreAway(StorageError):
    """The store that spills go to does not answer, or refuses."""


class SpillFull(StorageError):
    """No room for another spill."""


class SpillTooLarge(StorageError):
    """No room for a spill, however long it is waited for."""


class SpillCorrupt(StorageError):
    """A spill does not match its checksum, or is not a spill at all."""


class RunFailed(ZsflError):
    """The training run cannot go on; the last good version is kept."""


class Fenced(ZsflError):
    """Another aggregator has taken over: this one may commit nothing any more."""


NO_DESCRIPTORS = (
    "this process may open no more files and connections: allow it more (`ulimit -n`, or LimitNOFILE= of a service), "
    "and see who opens so many connections to it"
)


def lacks_descriptors(error: BaseException | None) -> bool:
    """Whether this comes of there being no file descriptor left, of this process or of the whole machine."""
    while error is not None and getattr(error, "errno", None) not in (errno.EMFILE, errno.ENFILE):
        error = error.__cause__
    return error is not None


def root_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error in a group that says most: one of zsfl's before any other."""
    leaves = list(_leaves(group))
    ours = [leaf for leaf in leaves if isinstance(leaf, ZsflError)]
    return (ours or leaves)[0]


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for one in cast("BaseExceptionGroup[BaseException]", error).exceptions:
            yield from _leaves(one)
    else:
        yield error
