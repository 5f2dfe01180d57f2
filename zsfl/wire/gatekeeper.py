"""Answers ZeroMQ whether a key may come in (ZAP, rfc.zeromq.org/spec/27), for all doors of one context."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import zmq
from zmq.utils import z85

from zsfl.errors import ConfigError
from zsfl.metrics import Counters
from zsfl.wire.door import Door, of_domain
from zsfl.wire.pump import Pump

ENDPOINT = "inproc://zeromq.zap.01"
AGAIN_S = 1.0
"""After which pause to begin anew, should it have failed."""
_keepers: WeakKeyDictionary[zmq.Context[Any], Gatekeeper] = WeakKeyDictionary()


@contextmanager
def kept(context: zmq.Context[Any], door: Door) -> Generator[None, None, None]:
    """While inside, in the running loop, somebody answers for this door; to be entered before its sockets open."""
    if not door.locked:
        yield
        return
    keeper = _keepers.get(context)
    if keeper is None:
        keeper = _keepers[context] = Gatekeeper(context)
    keeper.take(door)
    try:
        yield
    finally:
        if keeper.leave(door):
            _keepers.pop(context, None)


class Gatekeeper:
    """The authenticator of one context. While it is away, for whatever reason, nobody new comes in anywhere."""

    def __init__(self, context: zmq.Context[Any]) -> None:
        self._context = context
        self._doors: dict[bytes, Door] = {}
        self._closed = False
        self._begin()

    def take(self, door: Door) -> None:
        """Answer for a door, which is given a domain of its own."""
        wanted, number = door.domain, 1
        while door.domain.encode() in self._doors:
            number += 1
            door.domain = f"{wanted}-{number}"
        self._doors[door.domain.encode()] = door

    def leave(self, door: Door) -> bool:
        """Answer for it no more; whether that was the last one."""
        del self._doors[door.domain.encode()]
        if not self._doors:
            self._closed = True
            self._pump.close()
            self._let_go()
        return self._closed

    def _begin(self) -> None:
        self._socket = self._context.socket(zmq.REP, socket_class=zmq.Socket)
        self._socket.linger = 0
        try:
            self._socket.bind(ENDPOINT)
        except zmq.ZMQError as error:
            self._socket.close()
            raise ConfigError(f"another authenticator answers in this ZeroMQ context: {error}") from error
        self._pump = Pump(self._socket, self._take, Counters())
        self._pump.ended.add_done_callback(self._ended)

    def _take(self, frames: list[zmq.Frame], _size: int) -> None:
        _version, request, domain, address, _identity, mechanism, *credentials = (frame.bytes for frame in frames)
        status = self._judged(domain, address, mechanism, credentials)
        user = z85.encode(credentials[0]) if status == b"200" else b""
        self._socket.send_multipart([b"1.0", request, status, b"", user, b""])

    def _judged(self, domain: bytes, address: bytes, mechanism: bytes, credentials: list[bytes]) -> bytes:
        domain, roles = of_domain(domain)
        door = self._doors.get(domain)
        if door is None or mechanism != b"CURVE" or len(credentials) != 1 or len(credentials[0]) != 32:
            return b"400"
        try:
            return b"200" if door.admits(credentials[0], address.decode(errors="replace"), roles) else b"400"
        except Exception as error:  # whatever goes wrong, nobody comes in by it
            door.tell_once("failed", f"the authenticator failed and let nobody in: {type(error).__name__}: {error}")
            door.counters.add("authenticator_failures")
            return b"500"

    def _let_go(self) -> None:
        with suppress(zmq.ZMQError):  # closing alone gives the endpoint back only when ZeroMQ's own thread gets to it
            self._socket.unbind(ENDPOINT)
        self._socket.close(linger=0)

    def _ended(self, ended: asyncio.Future[None]) -> None:
        if self._closed:
            return
        self._let_go()
        for door in self._doors.values():
            door.counters.add("authenticator_failures")
            door.tell_once(
                "ended", f"the authenticator ended, and lets nobody in until it is back: {ended.exception()!r}"
            )
        asyncio.get_running_loop().call_later(AGAIN_S, self._again)

    def _again(self) -> None:
        if self._closed:
            return
        with suppress(ConfigError, zmq.ZMQError):
            self._begin()
            return
        asyncio.get_running_loop().call_later(AGAIN_S, self._again)
