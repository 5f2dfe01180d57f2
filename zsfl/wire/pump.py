"""Drains a socket whenever something is there, without a task, a future or a poll for each message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import zmq

from zsfl.metrics import Counters
from zsfl.wire.sockets import NOW

FAIR_SHARE = 64
"""Messages handled before others in the same loop get a turn."""
FAIR_BYTES = 1 << 18
"""A message of so many is a turn of its own: copying 64 chunks of a tensor would take the loop for too long."""

MOST_FRAMES = 8192
"""Of one multipart. What has more is no message, whatever the limits are, and is read past without keeping it."""

_IN, _OUT, _EVENTS = int(zmq.POLLIN), int(zmq.POLLOUT), int(zmq.EVENTS)

Take = Callable[[list[zmq.Frame], int], None]
"""Given the frames of one multipart, and how many bytes they have."""


class Pump:
    """Reads one socket in the running loop. What `take` raises ends it: see `ended`."""

    def __init__(
        self, socket: zmq.Socket[bytes], take: Take, counters: Counters, roomy: Callable[[], None] = lambda: None
    ) -> None:
        """`roomy` is called when there is room to send again, once each time that `wants_room` was called."""
        self._socket = socket
        self._take = take
        self._roomy = roomy
        self._counters = counters
        self._loop = asyncio.get_running_loop()
        self._fd = cast(int, socket.getsockopt(zmq.FD))
        self._again = self._wants_room = False
        self._skips = False
        """Whether what comes next is of a multipart that had too many frames."""
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._fd, self._look)
        self.look()

    def look(self) -> None:
        """Look at the socket soon."""
        if not self._again and not self.ended.done():
            self._again = True
            self._loop.call_soon(self._look_again)

    def touched(self) -> None:
        """Something was sent, or could not be: ZeroMQ tells of each change once, and may have told that call."""
        if self._events() & _IN:
            self.look()

    def wants_room(self) -> None:
        """Something could not be sent."""
        self._wants_room = True
        if self._events() & (_IN | _OUT):
            self.look()

    async def until_ended(self) -> None:
        """Returns when it is closed; raises what ended it otherwise."""
        await asyncio.shield(self.ended)

    def close(self, error: BaseException | None = None) -> None:
        """Read no more; the socket stays open."""
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)
            self.ended.exception()  # seen: whoever waits gets it
        self._loop.remove_reader(self._fd)

    def _look_again(self) -> None:
        self._again = False
        self._look()

    def _look(self) -> None:
        if self.ended.done():
            return
        self.drain()
        if not self._wants_room or self.ended.done():
            return
        events = self._events()
        if events & _IN:  # which asking for it may have taken the news of
            self.look()
        if events & _OUT:
            self._wants_room = False
            self._roomy()

    def _events(self) -> int:
        return cast(int, self._socket.getsockopt(_EVENTS))

    def drain_all(self) -> None:
        """Take all that is there now."""
        while not self.ended.done() and self._events() & _IN:
            self.drain()

    def drain(self) -> None:
        """Take what is there now, up to a fair share; more of it soon."""
        try:
            if not self.ended.done():
                self._drain()
        except Exception as error:
            self.close(error)

    def _received(self) -> list[zmq.Frame]:
        """The frames of one multipart; none of one with too many, which takes several turns to get past."""
        receive = cast("Callable[..., zmq.Frame]", cast(Any, self._socket).recv)
        frames: list[zmq.Frame] = []
        while len(frames) < MOST_FRAMES:
            frame = receive(NOW, False)
            frames.append(frame)
            if not frame.more:
                skipped, self._skips = self._skips, False
                return [] if skipped else frames
        if not self._skips:
            self._counters.add("protocol_errors")
        self._skips = True
        return []

    def _drain(self) -> None:
        for _ in range(FAIR_SHARE):
            try:
                frames = self._received()
            except zmq.Again:
                return
            if not frames:  # of a multipart that does not end: others first
                break
            size = sum(map(len, frames))
            self._counters.add("bytes_received", size)
            self._take(frames, size)
            if self.ended.done():
                return
            if size >= FAIR_BYTES:
                break
        self.look()
