"""Errors to Refusal messages and back."""

from __future__ import annotations

from zsfl import errors
from zsfl.errors import Busy, Unavailable, ZsflError
from zsfl.wire.fields import fit_to_say
from zsfl.wire.messages import Refusal

MAX_RETRY_S = 3600.0

_TRAVELS: tuple[type[ZsflError], ...] = (
    errors.ConfigError,
    errors.RemoteProtocolError,
    errors.Unavailable,
    errors.NoPeer,
    errors.Busy,
    errors.Held,
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
    kind = next((kind for kind in type(error).__mro__ if kind in _TRAVELS), None)
    # A fault of ours is worth another server to the peer, hence Unavailable.
    name, text = (kind.__name__, str(error)) if kind else ("Unavailable", f"{type(error).__name__}: {error}")
    retry_after_s = min(max(error.retry_after_s, 0.0), MAX_RETRY_S) if isinstance(error, Busy) else 0.0
    return Refusal(kind=name, message=fit_to_say(text), retry_after_s=retry_after_s)


def to_error(answer: Refusal, peer: str) -> ZsflError:
    """The error that a Refusal by `peer` stands for; an unknown kind is an Unavailable."""
    kind = _BY_NAME.get(answer.kind, Unavailable)
    message = f"{peer}: {answer.message}"
    return Busy(message, answer.retry_after_s) if kind is Busy else kind(message)
