"""The few ZeroMQ calls that the wire makes, typed and with their traps dealt with."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any, cast

import zmq

from zsfl.errors import ConfigError
from zsfl.settings import WireLimits
from zsfl.wire.framing import Buffer
from zsfl.wire.memory import keep_freed

DATA_QUEUE = 32
"""Multiparts that ZeroMQ holds for one peer, either way: it counts messages, and each may be one frame size long. Half
as many would slow down 64 small requests at once."""


def open_socket(context: zmq.Context[Any], kind: int, limits: WireLimits, queue: int) -> zmq.Socket[bytes]:
    """A socket whose queues and frames are bounded; nothing is worth waiting for when it closes."""
    keep_freed()
    socket = context.socket(kind, socket_class=zmq.Socket)  # a plain one, whatever the context makes by itself
    socket.linger = 0
    socket.set_hwm(queue)
    # A peer that sends larger frames is cut off by ZeroMQ before they take any memory.
    socket.setsockopt(zmq.MAXMSGSIZE, max(limits.max_header_bytes + 1, limits.frame_bytes))
    return socket


def bind(socket: zmq.Socket[bytes], host: str, port: int) -> int:
    """Bind to `port`, or any free one for 0; the port. ConfigError when it is taken or not ours."""
    try:
        if port == 0:
            return socket.bind_to_random_port(f"tcp://{host}")
        socket.bind(f"tcp://{host}:{port}")
    except zmq.ZMQError as error:
        socket.close(linger=0)
        if error.errno == zmq.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {host} is taken by another process; choose another with --port, or 0 for any free one"
            ) from error
        raise ConfigError(f"cannot listen on {host}:{port}: {error}; is {host} an address of this machine?") from error
    return port


def send_now(socket: zmq.Socket[bytes], frames: Sequence[Buffer], *, copy: bool) -> bool:
    """Send one multipart if there is room; whether there was. Raises zmq.ZMQError, EHOSTUNREACH among them."""
    try:
        cast(Any, socket).send_multipart(frames, zmq.DONTWAIT, copy)
    except zmq.Again:
        return False
    return True


def is_free(host: str, port: int) -> bool:
    """Whether a socket could be bound there now."""
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
    except OSError:
        return False
    return True
