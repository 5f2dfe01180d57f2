"""The few ZeroMQ calls that the wire makes, typed and with their traps dealt with."""

from __future__ import annotations

import functools
import os
import resource
import socket
import struct
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, cast

import zmq
import zmq.asyncio

from zsfl.errors import ConfigError, lacks_descriptors
from zsfl.settings import WireLimits
from zsfl.wire.framing import Buffer
from zsfl.wire.memory import keep_freed

DATA_QUEUE = 32
"""Multiparts that ZeroMQ holds for one peer, either way: it counts messages, and each may be one frame size long. Half
as many would slow down 64 small requests at once."""


MAX_SOCKETS = 16_384
"""Of one context: as many as all peers that a node may have can take."""
HANDSHAKE_S = 10.0
"""Who connects and does not speak the protocol by then is cut off."""
KEEPALIVE_S, PROBES = 60, 4
"""A connection that is silent for so long is probed so often, and closed when nobody is there any more."""
MOST_DESCRIPTORS = 1 << 16
"""This process's bound on open files is raised to that, as far as the system lets it."""
FREE_DESCRIPTORS, PER_PEER = 256, 16
"""Left to all that is not a peer's; and what each peer takes: its sockets, and connections on either side."""


_KEEPALIVE = {
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: KEEPALIVE_S,
    zmq.TCP_KEEPALIVE_INTVL: KEEPALIVE_S // PROBES,
    zmq.TCP_KEEPALIVE_CNT: PROBES,
}


def open_context(io_threads: int = 1) -> zmq.asyncio.Context:
    """A context with room for the sockets of all peers, and so many threads that send, receive and encrypt."""
    context = zmq.asyncio.Context(io_threads)
    context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
    return context


@functools.cache
def descriptors() -> int:
    """How many files and connections this process may have open, once that bound is raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return most
    return most if soft == resource.RLIM_INFINITY else max(soft, 1)


def room_for_peers(most: int) -> int:
    """For how many peers, `most` at the most, there are descriptors."""
    return min(most, max(1, (descriptors() - FREE_DESCRIPTORS) // PER_PEER))


def up_to(limits: WireLimits, most_bytes: int) -> WireLimits:
    """The same where the parts of no message are longer, all together."""
    return replace(
        limits,
        frame_bytes=min(limits.frame_bytes, most_bytes),
        piece_bytes=min(limits.piece_bytes, most_bytes),
        max_message_bytes=min(limits.max_message_bytes, most_bytes),
    )


NOW = int(zmq.DONTWAIT)
"""As an int, as all that is looked at for each frame: enums take a microsecond of their own."""
_SOURCE = int(zmq.SRCFD)
_MIN_RTT = 148
"""Where `tcpi_min_rtt` stands in Linux's `struct tcp_info`, in microseconds."""
_MORE = int(zmq.DONTWAIT | zmq.SNDMORE)
_send = cast(Any, zmq.backend).Socket.send  # what pyzmq's own loop over frames, four times as slow, ends in


def open_socket(context: zmq.Context[Any], kind: int, limits: WireLimits, queue: int) -> zmq.Socket[bytes]:
    """A socket whose queues and frames are bounded; nothing is worth waiting for when it closes."""
    keep_freed()
    descriptors()
    socket = context.socket(kind, socket_class=zmq.Socket)  # a plain one, whatever the context makes by itself
    socket.linger = 0
    socket.set_hwm(queue)
    socket.setsockopt(zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000))
    for option, value in _KEEPALIVE.items():
        socket.setsockopt(option, value)
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


def dial(socket: zmq.Socket[Any], endpoint: str, *, there: bool) -> None:
    """Have a socket that listens dial somebody too, or not any more; nobody, where ZeroMQ does not take the address."""
    with suppress(zmq.ZMQError):
        (socket.connect if there else socket.disconnect)(endpoint)


def descriptor_of(frame: zmq.Frame) -> int | None:
    """By which connection a frame came."""
    try:
        return cast(int, cast(Any, frame).get(_SOURCE))
    except zmq.ZMQError:
        return None


@contextmanager
def connection_of(descriptor: int) -> Generator[socket.socket, None, None]:
    """A connection that ZeroMQ owns; OSError where it has closed it, and the number may be that of something else."""
    copy = os.dup(descriptor)
    try:
        connection = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
    with connection:
        yield connection


def round_trip_s(descriptor: int) -> float | None:
    """The shortest round trip of a connection in the last minutes, which no queue of its own makes longer (Linux).

    Should ZeroMQ have closed it by now, there is none, or it is that of another one.
    """
    if sys.platform != "linux":
        return None
    with suppress(OSError, struct.error), connection_of(descriptor) as connection:
        told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT + 4)
        found: int = struct.unpack_from("=I", told, _MIN_RTT)[0]
        return None if found in (0, 0xFFFFFFFF) else found / 1e6
    return None


def send_now(socket: zmq.Socket[bytes], frames: Sequence[Buffer], *, copy: bool) -> bool:
    """Send one multipart if there is room; whether there was. Raises zmq.ZMQError, EHOSTUNREACH among them."""
    try:
        for frame in frames[:-1]:  # once the first one has found room the others have
            _send(socket, frame, _MORE, copy)
        _send(socket, frames[-1], NOW, copy)
    except zmq.Again:
        return False
    return True


def can_open() -> bool:
    """Whether this process may open another file or connection now."""
    try:
        socket.socket().close()
    except OSError as error:
        return not lacks_descriptors(error)
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
