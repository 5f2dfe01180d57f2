"""Messages by which two machines come to trust each other; only `zsfl invite` and `zsfl join` speak them."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from zsfl.ids import KEY_PATTERN
from zsfl.wire.fields import Message

MachineName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")]


class Enrol(Message, frozen=True, kw_only=True, tag="enrol"):
    """Shows the secret of an invitation; answered by Enrolled, once this key is trusted there."""

    key: Annotated[str, Meta(pattern=KEY_PATTERN)]
    """Of the machine that asks: the one that it connects with."""
    name: MachineName
    secret: Annotated[bytes, Meta(max_length=64)]


class Enrolled(Message, frozen=True, kw_only=True, tag="enrolled"):
    """It is trusted from now on."""

    name: MachineName
    """Of the machine that invited."""
