"""What `zsfl invite` prints and `zsfl join` reads: where to ask, whom to expect there, and a secret to show.

`zsfl1.` and, in base64 for addresses of the web, msgpack of (addresses, key, secret, expiry) with its CRC-32: letters,
digits, `-`, `_` and a dot, which no shell minds.
"""

from __future__ import annotations

import base64
import zlib
from typing import Annotated

import msgspec
from msgspec import Meta
from zmq.utils import z85

from zsfl.errors import ConfigError
from zsfl.ids import PublicKey

PREFIX = "zsfl1."
MOST_ADDRESSES = 8
SECRET_BYTES = 16
MAX_TOKEN = 4000
"""Letters, also where it is broken over lines."""


class Invitation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One invitation, good for one machine."""

    addresses: Annotated[
        tuple[Annotated[str, Meta(pattern=r"^[0-9A-Za-z][0-9A-Za-z.-]{0,252}:[0-9]{1,5}\Z")], ...],
        Meta(min_length=1, max_length=MOST_ADDRESSES),
    ]
    raw_key: Annotated[bytes, Meta(min_length=32, max_length=32)]
    """Of the machine that invites."""
    secret: Annotated[bytes, Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
    expires_s: Annotated[int, Meta(ge=0, le=1 << 40)]
    """By the clock of the machine that invites, in seconds since 1970."""

    @property
    def key(self) -> PublicKey:
        """As Z85."""
        return PublicKey(z85.encode(self.raw_key).decode())


def to_token(invitation: Invitation) -> str:
    """The token of an invitation."""
    packed = msgspec.msgpack.encode(invitation)
    checked = packed + zlib.crc32(packed).to_bytes(4, "big")
    return PREFIX + base64.urlsafe_b64encode(checked).decode().rstrip("=")


def from_token(token: str) -> Invitation:
    """The invitation in a token; ConfigError when it is cut or mistyped."""
    text = "".join(token.split())
    begins = "what begins with " if len(token) > 40 else ""
    wrong = ConfigError(
        f"{begins}{token[:40]!r} is no token, or not all of it: copy the whole line that `zsfl invite` printed"
    )
    if not text.startswith(PREFIX) or len(text) > MAX_TOKEN:
        raise wrong
    coded = text.removeprefix(PREFIX)
    try:
        checked = base64.b64decode(coded + "=" * (-len(coded) % 4), altchars=b"-_", validate=True)
        packed, crc = checked[:-4], checked[-4:]
        if zlib.crc32(packed).to_bytes(4, "big") != crc:
            raise wrong
        invitation = msgspec.msgpack.decode(packed, type=Invitation)
        if to_token(invitation) != text:
            raise wrong
        return invitation
    except (ValueError, msgspec.MsgspecError):  # the former of what is no base64, or no text
        raise wrong from None
