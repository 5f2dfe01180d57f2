"""Messages about whose steps are whose."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from zsfl.ids import KEY_PATTERN
from zsfl.wire.fields import Count, Message


class WhoHolds(Message, frozen=True, kw_only=True, tag="who-holds"):
    """A split server asks the aggregator by which key the steps of a shard may come; answered by Holder."""

    shard: Count


class Holder(Message, frozen=True, kw_only=True, tag="holder"):
    """The machine whose client joined with this shard."""

    key: Annotated[str, Meta(pattern=rf"^\Z|{KEY_PATTERN}")]
    """Empty where none has."""
