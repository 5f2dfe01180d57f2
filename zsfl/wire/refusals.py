"""Errors to Refusal messages and back."""

from __future__ import annotations

from zsfl import errors
from zsfl.errors import Busy, Unavailable, ZsflError
from zsfl.wire.messages import Refusal

MAX_TEXT = 2000

_TRAVELS: tuple[type[ZsflError], ...] = (
    errors.ConfigError,
    errors.RemoteProtocolError,
    errors.Unavailable,
    errors.NoPeer,
    errors.Busy,
    errors.DeadlineExceeded,
    errors.Rejected,
    errors.StaleWeights,
    errors.InputNeeded,
    errors.BadShape,
    errors.Unauthorised,
    errors.SpillFull,
    errors.SpillCorrupt,
)
_BY_NAME = {kind.__name__: kind for kind in _TRAVELS}


def refusal(error: Exception) -> Refusal:
    """What to answer when handling a request ended in `error`."""
    if type(error) in _TRAVELS:
        retry_after_s = error.retry_after_s if isinstance(error, Busy) else 0.0
        return Refusal(kind=type(error).__name__, message=str(error)[:MAX_TEXT], retry_after_s=retry_after_s)
    # A fault of ours is worth another server to the peer, hence Unavailable.
    return Refusal(kind="Unavailable", message=f"{type(error).__name__}: {error}"[:MAX_TEXT])


def to_error(answer: Refusal, peer: str) -> ZsflError:
    """The error that a Refusal by `peer` stands for; an unknown kind is an Unavailable."""
    kind = _BY_NAME.get(answer.kind, Unavailable)
    message = f"{peer}: {answer.message}"
    return Busy(message, answer.retry_after_s) if kind is Busy else kind(message)
