"""The same as zsfl_wire with keys: all of it is encrypted, and every request looked up in the table of permits."""

from __future__ import annotations

import os
from pathlib import Path

from zsfl.keys.secret import own_keys
from zsfl.keys.trusted import TrustFile
from zsfl.wire.door import Door

from . import zsfl_wire
from .program import Listening, serve_until_eof


def own_door() -> Door:
    """Of a machine whose keys are in the folder that ZSFL_KEYS names."""
    folder = Path(os.environ["ZSFL_KEYS"])
    keys = own_keys(folder)
    return Door("bench", keys, TrustFile(folder, keys.public))


async def serve(listening: Listening) -> None:
    """Answer every request with its part."""
    await zsfl_wire.serve(listening, own_door())


async def connect(port: int) -> zsfl_wire.ZsflWire:
    """An asker joined to a server."""
    return zsfl_wire.ZsflWire(port, door=own_door())


if __name__ == "__main__":
    serve_until_eof(serve)
