"""What somebody may do to a node whose ports it can reach, for so many seconds; each attack lets go of all it has."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import msgspec
import zmq

CONNECTIONS = 1000
PARTS = 1_000_000
Ports = tuple[int, ...]
Attack = Callable[[str, Ports, float], int]
"""Given the host, its ports and the seconds; how often it struck."""
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
_READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"


def _connected(host: str, port: int, stack: ExitStack) -> socket.socket:
    return stack.enter_context(socket.create_connection((host, port), timeout=10))


def _times(seconds: float, has_struck: Callable[[], object] = lambda: True, most: int = 1) -> Iterator[int]:
    """At least once, and over time so often at most until it has struck."""
    ends_s, number = time.monotonic() + seconds, 0
    while number == 0 or time.monotonic() < ends_s or (number < most and not has_struck()):
        yield number
        number += 1


@contextmanager
def _dealer(host: str, port: int) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        # Where it meets a socket of a kind that talks to no dealer, ZeroMQ gives up before or after the first is sent.
        dealer.sndtimeo = 200
        dealer.connect(f"tcp://{host}:{port}")
        yield dealer


def _send(host: str, ports: Ports, seconds: float, frames: list[bytes]) -> int:
    """The same multipart again and again, to one port after another; a peer that cuts it off is called again."""
    struck: list[int] = []
    for number in _times(seconds, lambda: struck, len(ports)):
        with _dealer(host, ports[number % len(ports)]) as dealer, suppress(zmq.Again):
            for _ in range(20):
                dealer.send_multipart(frames, copy=False)
                struck.append(number)
            dealer.poll(100)
    return len(struck)


def garbage(host: str, ports: Ports, seconds: float) -> int:
    """Bytes that are no ZeroMQ, and bytes that are some as far as the greeting."""
    count = 0
    for number in _times(seconds):
        for junk in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), _GREETING + os.urandom(4096), _GREETING[:20], b""):
            with ExitStack() as stack, suppress(OSError):
                _connected(host, ports[number % len(ports)], stack).sendall(junk)
                count += 1
    return count


def half_open(host: str, ports: Ports, seconds: float) -> int:
    """A thousand connections that say nothing, all held at the same time."""
    with ExitStack() as stack:
        count = 0
        with suppress(OSError):
            for number in range(CONNECTIONS):
                _connected(host, ports[number % len(ports)], stack)
                count += 1
        time.sleep(seconds)
    return count


def oversized(host: str, ports: Ports, seconds: float) -> int:
    """Frames that are longer than any node takes."""
    return _send(host, ports, seconds, [bytes(48 << 20)])


def parts(host: str, ports: Ports, seconds: float) -> int:
    """Messages of a million empty parts."""
    count = 0
    for number in _times(seconds):
        with ExitStack() as stack, suppress(OSError):
            raw = _connected(host, ports[number % len(ports)], stack)
            raw.sendall(_GREETING + _READY)
            count += 1
            raw.sendall(b"\x01\x00" * (PARTS - 1) + b"\x00\x00")
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(1 << 16):  # until it is read, or cut off
                pass
    return count


def bombs(host: str, ports: Ports, seconds: float) -> int:
    """Two megabytes of lz4 that say they are half a gigabyte of zeros, as the input of a body."""
    import lz4.block

    size = 500 << 20
    block = lz4.block.compress(bytes(size), store_size=False)
    spec = {"name": "x", "dtype": "uint8", "shape": [size], "codec": "raw+lz4", "nbytes": len(block)}
    body = {"t": "infer", "shard": 0, "version": 0, "input": spec}
    head = msgspec.msgpack.encode({"kind": "request", "id": 1, "deadline_s": 1.0, "sizes": [len(block)], "body": body})
    return _send(host, ports, seconds, [head, block])


def nesting(host: str, ports: Ports, seconds: float) -> int:
    """Headers of lists in lists in lists, and of as many sizes as go in."""
    count = _send(host, ports, seconds / 2, [b"\x91" * (1 << 20)])
    many = (
        b"\x84\xa4kind\xa7request\xa2id\x01\xa4body\x80\xa5sizes\xdd"
        + (1_000_000).to_bytes(4, "big")
        + bytes(1_000_000)
    )
    return count + _send(host, ports, seconds / 2, [many])


def headers(host: str, ports: Ports, seconds: float) -> int:
    """Headers of messages whose parts never come, from one connection after another."""
    slices = [[1, 1, 1]] * 4096
    state = {"run": "3fa9c1", "phase": "waiting", "version": 0, "round": 0, "rounds": 0, "window": 0, "windows": 0}
    body = {"t": "announcement", "node": "x", "state": state | {"slices": slices}}
    frames = [
        [msgspec.msgpack.encode({"kind": "request", "id": one, "deadline_s": 3000.0, "sizes": [1 << 20], "body": body})]
        for one in range(256)
    ]
    struck: list[int] = []
    for number in _times(seconds, lambda: struck, len(ports)):
        with _dealer(host, ports[number % len(ports)]) as dealer, suppress(zmq.Again):
            for one in frames:
                dealer.send_multipart(one)
                struck.append(number)
            dealer.poll(200)
    return len(struck)


ATTACKS: dict[str, Attack] = {
    "garbage": garbage,
    "half-open connections": half_open,
    "oversized frames": oversized,
    "a million parts": parts,
    "decompression bombs": bombs,
    "deep nesting": nesting,
    "headers without parts": headers,
}
