"""Messages to frames and back: pure, no sockets.

On the wire a message is one multipart of frames::

    header | part 0 | part 1 | ...                      when the parts fit one frame size together
    header                                              otherwise, followed by any number of
    chunk header | bytes | bytes | ...                  which continue the concatenated parts

The header is msgpack, capped before it is unpacked and schema-checked before it is used. Chunks are
messages of their own, because ZeroMQ cannot interleave multiparts: a heartbeat, a cancellation or another
request may pass between two of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, cast

import msgpack  # pyright: ignore[reportMissingTypeStubs]
import msgspec
from msgspec import Meta

from zsfl.errors import LocalProtocolError, RemoteProtocolError
from zsfl.settings import WireLimits
from zsfl.wire.messages import AnyMessage

Buffer = bytes | bytearray | memoryview
Kind = Literal["request", "reply", "publish", "chunk", "cancel"]


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """First frame of every multipart."""

    kind: Kind
    id: Annotated[int, Meta(ge=0, le=1 << 62)]
    """Chosen by whoever asks; a reply and its chunks carry the same."""
    deadline_s: Annotated[float, Meta(ge=0, le=86_400)] = 0.0
    """How long the asker will wait from now on; of requests only."""
    sizes: tuple[Annotated[int, Meta(ge=0)], ...] = ()
    """Bytes of each part."""
    body: AnyMessage | None = None


@dataclass(frozen=True, slots=True)
class Arrived:
    """One whole message."""

    kind: Kind
    id: int
    deadline_s: float
    body: AnyMessage | None
    parts: list[Buffer]


def encode(header: Header, parts: Sequence[Buffer], limits: WireLimits) -> Iterator[list[Buffer]]:
    """The multiparts of one message, in order; LocalProtocolError when it breaks a limit."""
    sizes = tuple(nbytes(part) for part in parts)
    if sum(sizes) > limits.max_message_bytes or len(sizes) > limits.max_parts:
        raise LocalProtocolError(
            f"message of {sum(sizes)} bytes in {len(sizes)} parts is over the limit of "
            f"{limits.max_message_bytes} bytes in {limits.max_parts} parts; raise max_message_bytes or max_parts"
        )
    head = msgspec.msgpack.encode(msgspec.structs.replace(header, sizes=sizes) if sizes else header)
    if len(head) > limits.max_header_bytes:
        raise LocalProtocolError(f"header of {len(head)} bytes is over the limit of {limits.max_header_bytes}")
    if sum(sizes) <= limits.frame_bytes:
        yield [head, *parts]
        return
    yield [head]
    chunk_head = msgspec.msgpack.encode(Header(kind="chunk", id=header.id))
    for frames in _chunks(parts, limits.frame_bytes):
        yield [chunk_head, *frames]


def _chunks(parts: Sequence[Buffer], chunk_bytes: int) -> Iterator[list[Buffer]]:
    """Slices of the concatenated parts, `chunk_bytes` a list but for the last."""
    frames: list[Buffer] = []
    room = chunk_bytes
    for part in parts:
        rest = memoryview(part).cast("B") if nbytes(part) else memoryview(b"")
        while len(rest):
            frames.append(rest[:room])
            rest = rest[room:]
            room -= nbytes(frames[-1])
            if room == 0:
                yield frames
                frames, room = [], chunk_bytes
    if frames:
        yield frames


def nbytes(buffer: Buffer) -> int:
    """Bytes in a buffer, whatever its item size."""
    return buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)


def decode_header(frame: Buffer, limits: WireLimits) -> Header:
    """The checked header in `frame`; RemoteProtocolError when it is not one."""
    if nbytes(frame) > limits.max_header_bytes:
        raise RemoteProtocolError(f"header of {nbytes(frame)} bytes, at most {limits.max_header_bytes} allowed")
    fields: object = None
    try:
        fields = cast(object, msgpack.unpackb(frame, strict_map_key=True))  # pyright: ignore[reportUnknownMemberType]
        return msgspec.convert(fields, Header)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException, msgspec.ValidationError) as error:
        raise RemoteProtocolError(f"not a zsfl message: {error}", _id_in(fields)) from error


def _id_in(fields: object) -> int | None:
    """The id of a message that is wrong elsewhere."""
    found = cast("dict[object, object]", fields).get("id") if isinstance(fields, dict) else None
    return found if type(found) is int and 0 <= found < 1 << 62 else None


class _Half:
    """A message whose chunks are still arriving."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.buffer = bytearray(sum(header.sizes))
        self.filled = 0

    def parts(self) -> list[Buffer]:
        view, start = memoryview(self.buffer), 0
        parts: list[Buffer] = []
        for size in self.header.sizes:
            parts.append(view[start : start + size])
            start += size
        return parts


class Assembler:
    """Puts the multiparts of one peer together again.

    Holds at most `max_inflight` half-finished messages of at most `max_message_bytes` together.
    """

    def __init__(self, limits: WireLimits) -> None:
        self._limits = limits
        self._halves: dict[int, _Half] = {}
        self._held_bytes = 0

    def feed(self, frames: Sequence[Buffer]) -> Arrived | None:
        """The message that these frames complete, if any; RemoteProtocolError when they break the protocol."""
        if not frames:
            raise RemoteProtocolError("empty multipart")
        header = decode_header(frames[0], self._limits)
        match header.kind:
            case "chunk":
                return self._continue(header, frames[1:])
            case "cancel":
                self.forget(header.id)
                return _arrived(header, [])
            case _:
                return self._begin(header, list(frames[1:]))

    def forget(self, message_id: int) -> None:
        """Drop a half-finished message."""
        if half := self._halves.pop(message_id, None):
            self._held_bytes -= len(half.buffer)

    def arriving(self) -> list[AnyMessage]:
        """Bodies of the messages whose parts are still on their way."""
        return [half.header.body for half in self._halves.values() if half.header.body is not None]

    def _begin(self, header: Header, parts: list[Buffer]) -> Arrived | None:
        limits, total = self._limits, sum(header.sizes)
        if header.body is None:
            raise RemoteProtocolError(f"{header.kind} without a body")
        if len(header.sizes) > limits.max_parts or total > limits.max_message_bytes:
            raise RemoteProtocolError(
                f"message of {total} bytes in {len(header.sizes)} parts; at most {limits.max_message_bytes} "
                f"bytes in {limits.max_parts} parts allowed"
            )
        if parts or total == 0:
            if tuple(nbytes(part) for part in parts) != header.sizes:
                raise RemoteProtocolError("parts do not have the sizes that the header declares")
            return _arrived(header, parts)
        if len(self._halves) >= limits.max_inflight or self._held_bytes + total > limits.max_message_bytes:
            raise RemoteProtocolError("too many half-finished messages from one peer")
        self.forget(header.id)
        self._halves[header.id] = _Half(header)
        self._held_bytes += total
        return None

    def _continue(self, header: Header, frames: Sequence[Buffer]) -> Arrived | None:
        half = self._halves.get(header.id)
        if half is None:
            return None  # a chunk of a message that was cancelled or refused
        for frame in frames:
            end = half.filled + nbytes(frame)
            if end > len(half.buffer):
                self.forget(header.id)
                raise RemoteProtocolError("more bytes arrived than the header declares")
            half.buffer[half.filled : end] = frame
            half.filled = end
        if half.filled < len(half.buffer):
            return None
        self.forget(header.id)
        return _arrived(half.header, half.parts())


def _arrived(header: Header, parts: list[Buffer]) -> Arrived:
    return Arrived(header.kind, header.id, header.deadline_s, header.body, parts)
