"""Messages to frames and back: pure, no sockets.

On the wire a message is one multipart of frames::

    header | part 0 | part 1 | ...                      when the parts fit one frame size together; several such
                                                        messages may follow one another in one multipart
    header                                              otherwise, followed by any number of
    chunk header | bytes | bytes | ...                  which continue the concatenated parts

The header is msgpack, capped before it is unpacked and schema-checked before it is used. Chunks are
messages of their own, because ZeroMQ cannot interleave multiparts: a heartbeat, a cancellation or another
request may pass between two of them. They are cut where parts end, as far as that goes: a part that comes in one
frame is handed on as it lies there, and putting one together from several costs as much as its way over loopback.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from zsfl.errors import Busy, LocalProtocolError, RemoteProtocolError
from zsfl.settings import WireLimits
from zsfl.wire.memory import memory
from zsfl.wire.messages import AnyMessage

Buffer = bytes | bytearray | memoryview
Kind = Literal["request", "reply", "publish", "chunk", "cancel"]
MessageId = Annotated[int, Meta(ge=0, le=1 << 62)]

STALLED_S = 2.0
"""A message that nothing more came of for so long is not counted on."""
AHEAD = 16
"""Memory for a message in chunks is taken for so many times what has arrived of it, as far as it goes."""
HEADER_TIMES = 20
"""A header takes up to so many times its bytes once it is unpacked, which counts as long as its message arrives."""
KEPT_FROM_BYTES = 1 << 16
"""A shorter part is copied out of its frame, whose memory may be shared with others and be longer."""
RETRY_AFTER_S = 0.1
"""When to come back with a message that found no room."""


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """First frame of every message."""

    kind: Kind
    id: MessageId
    """Chosen by whoever asks; a reply and its chunks carry the same."""
    deadline_s: Annotated[float, Meta(ge=0, le=86_400)] = 0.0
    """How long the asker will wait from now on; of requests only."""
    sizes: tuple[Annotated[int, Meta(ge=0)], ...] = ()
    """Bytes of each part."""
    body: AnyMessage | None = None


class _Named(msgspec.Struct, frozen=True):
    """What is looked for in a header that is wrong elsewhere; all else is skipped, and takes no memory."""

    id: MessageId
    sizes: tuple[int, ...] = ()


_NOTHING = memoryview(bytearray())
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(Header).decode
_unpack_named = msgspec.msgpack.Decoder(_Named).decode


class Arrived(msgspec.Struct, frozen=True):
    """One whole message."""

    kind: Kind
    id: int
    deadline_s: float
    body: AnyMessage | None
    parts: list[Buffer]


def encode(header: Header, parts: Sequence[Buffer], limits: WireLimits) -> Iterator[list[Buffer]]:
    """The multiparts of one message, in order; LocalProtocolError when it breaks a limit."""
    sizes = tuple(map(nbytes, parts))
    total = sum(sizes)
    if total > limits.max_message_bytes or len(sizes) > limits.max_parts:
        raise LocalProtocolError(
            f"message of {total} bytes in {len(sizes)} parts is over the limit of "
            f"{limits.max_message_bytes} bytes in {limits.max_parts} parts; raise max_message_bytes or max_parts"
        )
    head = _pack(msgspec.structs.replace(header, sizes=sizes) if sizes else header)
    if len(head) > limits.max_header_bytes:
        raise LocalProtocolError(f"header of {len(head)} bytes is over the limit of {limits.max_header_bytes}")
    if total <= limits.frame_bytes:
        yield [head, *parts]
        return
    yield [head]
    chunk_head = _pack(Header(kind="chunk", id=header.id))
    for frames in _pieces(parts, limits):
        yield [chunk_head, *frames]


def _pieces(parts: Sequence[Buffer], limits: WireLimits) -> Iterator[list[Buffer]]:
    """The parts in order, some `piece_bytes` a list: what fits one frame stays whole, what does not is sliced."""
    piece_bytes = min(limits.piece_bytes, limits.frame_bytes)
    frames: list[Buffer] = []
    room = piece_bytes
    for part in parts:
        rest = memoryview(part).cast("B") if nbytes(part) else memoryview(b"")
        longest = limits.frame_bytes if len(rest) <= limits.frame_bytes else piece_bytes
        while len(rest):
            if frames and room < min(len(rest), longest):
                yield frames
                frames, room = [], piece_bytes
            frames.append(rest[:longest])
            rest = rest[longest:]
            room -= nbytes(frames[-1])
    if frames:
        yield frames


def nbytes(buffer: Buffer) -> int:
    """Bytes in a buffer, whatever its item size."""
    return buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)


def decode_header(frame: Buffer, limits: WireLimits) -> Header:
    """The checked header in `frame`; RemoteProtocolError when it is not one."""
    if nbytes(frame) > limits.max_header_bytes:
        raise RemoteProtocolError(f"header of {nbytes(frame)} bytes, at most {limits.max_header_bytes} allowed")
    try:
        return _unpack(frame)
    except (ValueError, RecursionError) as error:
        named = _named(frame)
        raise RemoteProtocolError(f"not a zsfl message: {error}", named and named.id) from error


def _named(frame: Buffer) -> _Named | None:
    """What can be read of a header that is wrong elsewhere."""
    try:
        return _unpack_named(frame)
    except (ValueError, RecursionError):
        return None


class NoRoom(Busy):
    """A message in chunks found no room and was dropped; its sender may try later."""

    def __init__(self, message: str, message_id: int) -> None:
        super().__init__(message, RETRY_AFTER_S)
        self.message_id = message_id


Fault = RemoteProtocolError | NoRoom
"""What can be wrong with a message that came."""


class Room:
    """Memory for the half-finished messages of one socket, whoever sends them."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0


class _Half:
    """A message whose chunks are still arriving.

    A part that comes in one frame stays there. What comes in several is copied once, as it comes, into memory that is
    taken ahead of it, but never for more than `AHEAD` times what has arrived: so what a header declares costs nothing,
    and what has arrived is rarely moved. Taken memory that nothing was written to yet is an address range to the
    operating system, and no more.
    """

    def __init__(self, header: Header, size_bytes: int, now_s: float, due_s: float) -> None:
        """`size_bytes`: of the header as it came."""
        self.header = header
        self.total = sum(header.sizes)
        self.arrived_bytes = 0
        self._header_bytes = HEADER_TIMES * size_bytes
        self.heard_s = now_s
        self.due_s = due_s
        self._parts: list[Buffer] = []
        self._buffer = _NOTHING
        self._filled = 0
        """Bytes of the next part that are in the buffer."""

    @property
    def held_bytes(self) -> int:
        """What it takes of the room."""
        return self._header_bytes + self.arrived_bytes

    def add(self, frames: Sequence[Buffer], more: int) -> None:
        """Take in frames, `more` bytes together; MemoryError when there is no memory for them."""
        self.arrived_bytes += more
        for frame in frames:
            rest = memoryview(frame)
            while len(rest):
                size = self.header.sizes[len(self._parts)]
                if self._filled == 0 and KEPT_FROM_BYTES <= size <= len(rest):
                    self._parts.append(rest[:size])
                    rest = rest[size:]
                    continue
                some = rest[: size - self._filled]
                self._copy(some, size)
                rest = rest[len(some) :]

    def _copy(self, some: memoryview, size: int) -> None:
        """Add to the next part, which is `size` bytes long."""
        start, self._filled = self._filled, self._filled + len(some)
        if self._filled > len(self._buffer):
            taken = memory(min(size, AHEAD * self._filled), rather=size)
            taken[:start] = self._buffer[:start]
            self._buffer = taken
        self._buffer[start : self._filled] = some
        if self._filled == size:
            self._parts.append(self._buffer)
            self._buffer, self._filled = _NOTHING, 0

    def parts(self) -> list[Buffer]:
        """The parts of a whole message, all of them writable."""
        without = len(self.header.sizes) - len(self._parts)
        return self._parts + [_NOTHING] * without


class Assembler:
    """Puts the multiparts of one peer together again.

    Holds at most `max_inflight` half-finished messages, each of at most `max_message_bytes`, as long as `room`
    has room for their headers and what has arrived of them. `in_order`: the peer never begins a message before it ended
    the last. `wanted` tells which messages in chunks are worth keeping.
    """

    def __init__(
        self,
        limits: WireLimits,
        room: Room | None = None,
        *,
        in_order: bool = False,
        wanted: Callable[[int], bool] = lambda _: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._room = room or Room(limits.max_arriving_bytes)
        self._in_order = in_order
        self._wanted = wanted
        self._clock = clock
        self._halves: dict[int, _Half] = {}

    def feed(self, frames: Sequence[Buffer], failed: Callable[[Fault], None] | None = None) -> Iterator[Arrived]:
        """The messages that the frames of one multipart complete.

        `failed` is told of each that breaks the protocol, or had to be dropped; those around it are given all the same,
        as far as it can be told where it ends. Without `failed` the first such fault is raised.
        """
        if not frames:
            raise RemoteProtocolError("empty multipart")
        place = 0
        while place < len(frames):
            start, place = place, None
            try:
                header = decode_header(frames[start], self._limits)
                place = len(frames) if header.kind == "chunk" else start + 1 + len(header.sizes)
                arrived = self._next(header, nbytes(frames[start]), frames[start + 1 : place])
            except (RemoteProtocolError, NoRoom) as error:
                if failed is None:
                    raise
                failed(error)
                place = self._end_of(frames, start) if place is None else place
                continue
            if arrived is not None:
                yield arrived

    def _end_of(self, frames: Sequence[Buffer], start: int) -> int:
        """Where a message ends that begins there and cannot be read."""
        is_short = nbytes(frames[start]) <= self._limits.max_header_bytes
        named = _named(frames[start]) if is_short else None
        return len(frames) if named is None else start + 1 + len(named.sizes)

    def _next(self, header: Header, size_bytes: int, frames: Sequence[Buffer]) -> Arrived | None:
        """Take in what came with one header, which was so long; the message, if it is whole."""
        match header.kind:
            case "chunk":
                return self._continue(header, frames)
            case "cancel":
                self.forget(header.id)
                return _arrived(header, [])
            case _:
                return self._begin(header, size_bytes, list(frames))

    @property
    def idle(self) -> bool:
        """Whether no message is half-finished."""
        return not self._halves

    def forget(self, message_id: int) -> None:
        """Drop a half-finished message."""
        if half := self._halves.pop(message_id, None):
            self._room.used_bytes -= half.held_bytes

    def forget_all(self) -> None:
        """Drop all half-finished messages."""
        for message_id in list(self._halves):
            self.forget(message_id)

    def forget_overdue(self) -> None:
        """Drop the half-finished messages whose sender has given up by now."""
        now_s = self._clock()
        for message_id, half in list(self._halves.items()):
            if half.due_s < now_s:
                self.forget(message_id)

    def forget_stalled(self) -> None:
        """Drop the half-finished messages that nothing came of for as long as anybody waits: broadcasts, which may take
        longer than that and have no asker.
        """
        since_s = self._clock() - self._limits.default_deadline_s
        for message_id, half in list(self._halves.items()):
            if half.heard_s < since_s:
                self.forget(message_id)

    def arriving(self) -> list[AnyMessage]:
        """Bodies of the messages whose parts are still on their way: of one that lost a chunk no more will come."""
        since_s = self._clock() - STALLED_S
        halves = [half for half in self._halves.values() if half.heard_s >= since_s]
        return [half.header.body for half in halves if half.header.body is not None]

    def _begin(self, header: Header, size_bytes: int, parts: list[Buffer]) -> Arrived | None:
        limits, total = self._limits, sum(header.sizes)
        if self._in_order:
            self.forget_all()
        if header.body is None:
            raise RemoteProtocolError(f"{header.kind} without a body", header.id)
        if len(header.sizes) > limits.max_parts or total > limits.max_message_bytes:
            raise RemoteProtocolError(
                f"message of {total} bytes in {len(header.sizes)} parts; at most {limits.max_message_bytes} "
                f"bytes in {limits.max_parts} parts allowed",
                header.id,
            )
        if parts or total == 0:
            if tuple(map(nbytes, parts)) != header.sizes:
                raise RemoteProtocolError("parts do not have the sizes that the header declares", header.id)
            return _arrived(header, parts)
        self.forget(header.id)
        if len(self._halves) >= limits.max_inflight:
            raise NoRoom(f"{len(self._halves)} messages of yours are half-finished; end one first", header.id)
        if self._wanted(header.id):
            now_s = self._clock()
            half = _Half(header, size_bytes, now_s, now_s + limits.deadline_of(header.deadline_s))
            self._take_room(half.held_bytes, header.id)
            self._halves[header.id] = half
        return None

    def _take_room(self, more_bytes: int, message_id: int) -> None:
        if self._room.used_bytes + more_bytes > self._room.limit_bytes:
            self.forget(message_id)
            raise NoRoom(f"{self._room.used_bytes} bytes of messages are arriving, no room for more", message_id)
        self._room.used_bytes += more_bytes

    def _continue(self, header: Header, frames: Sequence[Buffer]) -> Arrived | None:
        half = self._halves.get(header.id)
        if half is None:
            return None  # a chunk of a message that was cancelled or refused
        more = sum(map(nbytes, frames))
        if half.arrived_bytes + more > half.total:
            self.forget(header.id)
            raise RemoteProtocolError("more bytes arrived than the header declares", header.id)
        self._take_room(more, header.id)
        half.heard_s = self._clock()
        try:
            half.add(frames, more)
        except MemoryError:
            self.forget(header.id)
            raise NoRoom(f"no memory for {half.total} bytes; ask for less at once", header.id) from None
        if half.arrived_bytes < half.total:
            return None
        self.forget(header.id)
        return _arrived(half.header, half.parts())


def _arrived(header: Header, parts: list[Buffer]) -> Arrived:
    return Arrived(header.kind, header.id, header.deadline_s, header.body, parts)
