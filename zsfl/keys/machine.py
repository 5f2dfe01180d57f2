"""The id of a machine: a short hash of its public key, in groups that each end with a check letter.

As Syncthing's device ids: 24 letters of base32, the first 120 bits of the key's SHA-256, in four groups of six. The
seventh letter of a group is their Luhn sum modulo 32, so that any one mistyped letter is found, and in which group.
"""

from __future__ import annotations

import base64
import hashlib

from zmq.utils import z85

from zsfl.errors import ConfigError
from zsfl.ids import PublicKey

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
GROUPS = 4
GROUP = 6
_MISREAD = str.maketrans("018", "OIB")
"""Digits that no id has, and the letters that are taken for them."""


def machine_id(key: PublicKey) -> str:
    """What people call a key by, such as `MFZWI3D-BONSGYC-YLTMRWG-DZ2LFMH`."""
    text = base64.b32encode(hashlib.sha256(z85.decode(key)).digest()).decode()
    groups = (text[first : first + GROUP] for first in range(0, GROUPS * GROUP, GROUP))
    return "-".join(group + check_letter(group) for group in groups)


def check_letter(group: str) -> str:
    """The letter that makes the Luhn sum of a group, modulo 32, zero."""
    total = 0
    for place, letter in enumerate(reversed(group)):
        code = LETTERS.index(letter)
        total += code if place % 2 else 2 * code // 32 + 2 * code % 32
    return LETTERS[-total % 32]


def read_machine_id(text: str) -> str:
    """An id as it is written everywhere, from how somebody typed it; ConfigError says which group is mistyped."""
    letters = "".join(text.upper().translate(_MISREAD).replace("-", " ").split())
    whole = GROUPS * (GROUP + 1)
    if len(letters) != whole or not set(letters) <= set(LETTERS):
        raise ConfigError(
            f"{text!r} is no machine id: expected {GROUPS} groups of {GROUP + 1} letters, as `zsfl keys show` prints"
        )
    groups = [letters[first : first + GROUP + 1] for first in range(0, whole, GROUP + 1)]
    for number, group in enumerate(groups, 1):
        if check_letter(group[:-1]) != group[-1]:
            raise ConfigError(f"group {number} of the machine id, {group}, is mistyped: its check letter does not fit")
    return "-".join(groups)
