"""Hears what became of handshakes on a socket, which ZeroMQ itself keeps silent about."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from typing import Any

import zmq

from zsfl.metrics import Counters
from zsfl.wire.pump import Pump

_serial = itertools.count()
_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_COUNTERS: dict[int, str] = {
    int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH): "refused_without_key",
    int(zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC): "refused_wrong_key",
}


class HandshakeWatch:
    """Watches one socket in the running loop, until closed: before the socket itself."""

    def __init__(
        self,
        context: zmq.Context[Any],
        socket: zmq.Socket[bytes],
        told: Callable[[int, int], None],
        counters: Counters | None = None,
    ) -> None:
        """`told` gets the event and its value: of EVENT_HANDSHAKE_FAILED_AUTH that is 400 for who is not let in."""
        self._watched = socket
        self._told = told
        self._counters = counters
        endpoint = f"inproc://zsfl-watch-{next(_serial)}"
        self._socket = context.socket(zmq.PAIR, socket_class=zmq.Socket)
        self._socket.linger = 0
        try:
            socket.monitor(endpoint, _EVENTS)
            self._socket.connect(endpoint)
        except zmq.ZMQError:
            self._socket.close()
            raise
        self._pump = Pump(self._socket, self._take, Counters())

    def _take(self, frames: list[zmq.Frame], _size: int) -> None:
        event, value = struct.unpack("=HI", frames[0].bytes)
        if self._counters is not None and event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            self._counters.add(_COUNTERS.get(value, "refused_handshakes"))
        self._told(event, value)

    def close(self) -> None:
        """Watch no more; may be called again."""
        if self._socket.closed:
            return
        self._pump.close()
        if not self._watched.closed:
            self._watched.disable_monitor()
        self._socket.close(linger=0)
