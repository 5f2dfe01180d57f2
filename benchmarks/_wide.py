"""A long link, simulated: two network namespaces, and this process between them, which holds each packet back.

Both ends have a TUN device, so that TCP there is the kernel's own, with its windows, its slow start and its buffers.
What is simulated is the wire: each packet arrives half a round trip later, behind those before it at the rate of the
link, and is lost by chance, or where the queue before the link is full. Needs root on Linux.
"""

from __future__ import annotations

import fcntl
import os
import random
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from uuid import uuid4

_SET_IFF, _SET_OFFLOAD = 0x400454CA, 0x400454D0
_TUN, _NO_PI, _VNET_HDR = 0x1, 0x1000, 0x4000
_CHECKSUM, _SEGMENTS = 0x1, 0x2
"""What is left to the far end: what comes as one packet is as long as TCP likes, and counts by its bytes."""
LONGEST = 70_000
PACKET = 1_500
SOON_S = 0.0003
HOSTS = ("10.98.0.1", "10.98.0.2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """What lies between two machines."""

    mbit_s: float
    round_trip_ms: float
    loss: float = 0.0
    """Of packets of 1,500 bytes."""
    queue_s: float = 0.05
    """What the queue before it holds, at its rate."""


class _Way:
    """From one end to the other."""

    def __init__(self, source: int, target: int, wire: Wire) -> None:
        self._source, self._target, self._wire = source, target, wire
        self._queue: deque[tuple[float, bytes]] = deque()
        self._news = threading.Event()
        self._over = False
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()

    def _read(self) -> None:
        wire, draw, free_s = self._wire, random.Random(0), 0.0
        with suppress(OSError):  # the namespace is gone
            while not self._over:
                packet, now_s = os.read(self._source, LONGEST), time.perf_counter()
                lost = draw.random() < wire.loss * max(1.0, len(packet) / PACKET)
                if lost or free_s > now_s + wire.queue_s:
                    continue
                free_s = max(free_s, now_s) + len(packet) * 8e-6 / wire.mbit_s
                self._queue.append((free_s + wire.round_trip_ms / 2e3, packet))
                self._news.set()

    def _write(self) -> None:
        with suppress(OSError):
            while not self._over:
                if not self._queue:
                    self._news.wait(1)
                    self._news.clear()
                    continue
                due_s, packet = self._queue.popleft()
                if (wait_s := due_s - time.perf_counter()) > SOON_S:
                    time.sleep(wait_s)
                os.write(self._target, packet)

    def end(self) -> None:
        """Carry nothing any more."""
        self._over = True
        self._news.set()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _end(name: str, namespace: str, host: str, peer: str) -> int:
    """A device in a namespace, by the descriptor where its packets come out and go in."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(descriptor, _SET_IFF, struct.pack("16sH22x", name.encode(), _TUN | _NO_PI | _VNET_HDR))
    fcntl.ioctl(descriptor, _SET_OFFLOAD, _CHECKSUM | _SEGMENTS)
    _ip("link", "set", name, "netns", namespace)
    _ip("-n", namespace, "addr", "add", f"{host}/32", "peer", peer, "dev", name)
    _ip("-n", namespace, "link", "set", name, "txqueuelen", "5000", "up")
    _ip("-n", namespace, "link", "set", "lo", "up")
    return descriptor


@contextmanager
def joined(wire: Wire) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Two machines at `HOSTS`: what to put before a command to run it at either."""
    tag = uuid4().hex[:6]
    names, devices = (f"zsfl-{tag}-a", f"zsfl-{tag}-b"), (f"zw{tag}a", f"zw{tag}b")
    ways: list[_Way] = []
    try:
        for name in names:
            _ip("netns", "add", name)
        ends = [
            _end(device, name, host, peer)
            for device, name, host, peer in zip(devices, names, HOSTS, reversed(HOSTS), strict=True)
        ]
        ways += [_Way(ends[0], ends[1], wire), _Way(ends[1], ends[0], wire)]
        one, other = (("ip", "netns", "exec", name) for name in names)
        yield one, other
    finally:
        for way in ways:
            way.end()
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
