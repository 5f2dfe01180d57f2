"""Everything that reads bytes from outside, one target each: only errors of zsfl may come out, whatever goes in.

Both the suite (hypothesis) and `run.py` (atheris) drive these. What a target writes lies in memory, in /dev/shm where
there is one.

Inputs are short: a few thousand bytes where nothing changes them (`wild`), 8 KB in `run.py`. What takes long because
much of something comes does not show here; tests beside the reader say that (`tests/unit/spill/test_layout.py`).
"""

from __future__ import annotations

import base64
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, cast

import msgspec
import torch
import zeroconf as zc
from helpers.wild import altered, message, sample, scrambled
from zeroconf._protocol.incoming import DNSIncoming
from zeroconf._protocol.outgoing import DNSOutgoing
from zmq.utils import z85

from zsfl.aggregator.commit import Record, read_record
from zsfl.aggregator.journal import Journal, found_in
from zsfl.aggregator.mirror import Mirror
from zsfl.aggregator.progress import place_of
from zsfl.aggregator.run_folder import LEDGER
from zsfl.dashboard.http import Gate, parse
from zsfl.discovery.folder import read_entry
from zsfl.discovery.mdns import SERVICE, read_announcement
from zsfl.errors import BadShape, ZsflError
from zsfl.ids import NodeCard, Portion, PublicKey, Version
from zsfl.keys.machine import machine_id
from zsfl.keys.tokens import MOST_ADDRESSES, PREFIX, Invitation, from_token, to_token
from zsfl.keys.trusted import EVERY_ROLE, MAX_TRUSTED, TRUSTED, Trusted, TrustFile, read_line, revoke, trust
from zsfl.learning.averaging import Contribution
from zsfl.learning.master import Master
from zsfl.learning.model import SplitModel
from zsfl.learning.optim import OptimizerSpec
from zsfl.learning.part import Part
from zsfl.settings import NODE_FLAGS, WireLimits, load_settings
from zsfl.spill.layout import SpillMeta, decode, decode_contribution, decode_meta, encode
from zsfl.spill.segments import Segment
from zsfl.tensors.codec import SPELLINGS, Codec, unpack
from zsfl.tensors.spec import TensorSpec
from zsfl.weights.packing import pack
from zsfl.weights.packing import unpacked as weights_of
from zsfl.wire.framing import Arrived, Assembler, Buffer, Header, Room, decode_header, nbytes
from zsfl.wire.framing import encode as to_frames
from zsfl.wire.messages import Ok, Train, Weights
from zsfl.wire.succession import Following

LIMITS = WireLimits(
    frame_bytes=1024, piece_bytes=512, max_message_bytes=4096, max_header_bytes=4096, max_parts=16, max_inflight=4,
    max_arriving_bytes=1 << 16,
)  # fmt: skip
MOST_BYTES = 1 << 20
"""Of a tensor, as far as these targets go."""
OWN_KEY, OTHER_KEY = (PublicKey(z85.encode(bytes([number] * 32)).decode()) for number in (1, 2))
CID = "3fa9c1-v00000004-s00000-k000"
_SPILL_MAGIC, _CRC = b"zsflspil", slice(34, 42)
_HOME = "/dev/shm" if Path("/dev/shm").is_dir() else None


@dataclass(frozen=True, slots=True)
class Target:
    """One reader of bytes."""

    name: str
    one: Callable[[bytes], None]
    """Reads them; raises whatever is a fault."""
    seeds: Callable[[], Sequence[bytes]]
    """Some that are right."""
    wild: Callable[[Random], bytes]
    """One that is nearly right."""


class Home:
    """A folder for what a target writes, emptied by whoever uses it."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.path = Path(self._stack.enter_context(tempfile.TemporaryDirectory(dir=_HOME)))

    def file(self, name: str, data: bytes) -> Path:
        """A file with these bytes."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def empty(self) -> None:
        """Remove all of it."""
        for one in self.path.iterdir():
            shutil.rmtree(one) if one.is_dir() else one.unlink()


def packed(frames: Sequence[Buffer]) -> bytes:
    """Frames in one piece: each after its length."""
    return b"".join(nbytes(frame).to_bytes(2, "little") + bytes(frame) for frame in frames)


def unpacked(data: bytes) -> list[bytes]:
    """The frames; the last one may be shorter than it says."""
    frames: list[bytes] = []
    while len(data) >= 2:
        size = int.from_bytes(data[:2], "little")
        frames.append(data[2 : 2 + size])
        data = data[2 + size :]
    return frames


def from_seeds(seeds: Callable[[], Sequence[bytes]]) -> Callable[[Random], bytes]:
    """Near-valid by scrambling what is right."""
    return lambda rng: scrambled(rng, rng.choice(seeds()))


# --- messages ------------------------------------------------------------------------------------------------


def header(data: bytes) -> None:
    """A first frame."""
    with suppress(ZsflError):
        decode_header(data, LIMITS)


@cache
def header_seeds() -> list[bytes]:
    """Some hundred messages of all kinds."""
    rng = Random(1)
    return [message(rng, wrong=False) for _ in range(200)]


def framing(data: bytes) -> None:
    """Several multiparts of one peer; between two of them is an empty frame."""
    room = Room(LIMITS.max_arriving_bytes)
    assembler = Assembler(LIMITS, room)
    multipart: list[Buffer] = []
    for frame in [*unpacked(data), b""]:
        if frame:
            multipart.append(bytearray(frame))
            continue
        with suppress(ZsflError):
            for arrived in assembler.feed(multipart):
                if isinstance(arrived, Arrived):
                    assert sum(map(nbytes, arrived.parts)) <= LIMITS.max_message_bytes
        assert room.used_bytes <= room.limit_bytes
        multipart = []
    assembler.forget_all()
    assert room.used_bytes == 0


@cache
def framing_seeds() -> list[bytes]:
    """A small message, one in chunks, two in one multipart."""
    found: list[bytes] = []
    for parts in ([], [b"abc"], [bytes(700), b"", bytes(900)]):
        header = Header(kind="request", id=3, deadline_s=1.0, body=Train(rounds=1))
        frames = [[*frames, b""] for frames in to_frames(header, parts, LIMITS)]
        found.append(packed([frame for multipart in frames for frame in multipart if nbytes(frame) or frame == b""]))
    two = [next(to_frames(Header(kind="reply", id=one, body=Ok()), [b"x"], LIMITS)) for one in (1, 2)]
    return [*found, packed([*two[0], *two[1]])]


def framing_wild(rng: Random) -> bytes:
    """Good and bad messages in turn, with too few parts and too many."""
    frames: list[bytes] = []
    for _ in range(rng.randrange(1, 5)):
        head: dict[str, Any] = {"kind": rng.choice(("request", "chunk", "cancel")), "id": rng.randrange(3)}
        head["sizes"] = [rng.choice((0, 1, 5, 2000)) for _ in range(rng.randrange(3))]
        head["body"] = {"t": "train", "rounds": 1}
        head = altered(rng, head) if rng.random() < 0.4 else head
        frames += [msgspec.msgpack.encode(head), *(bytes(rng.choice((1, 5, 2000))) for _ in range(rng.randrange(3)))]
        frames += [b""] * rng.randrange(2)
    data = packed(frames)
    return scrambled(rng, data) if rng.random() < 0.2 else data


# --- tensors -------------------------------------------------------------------------------------------------


def tensor(data: bytes) -> None:
    """A spec and the bytes that it is of."""
    (spec, payload), _ = _two(data)
    with suppress(ValueError):
        told = msgspec.msgpack.decode(spec, type=TensorSpec)
        with suppress(BadShape):
            found = unpack(told, payload, max_bytes=MOST_BYTES)
            assert tuple(found.shape) == told.shape
            assert found.nbytes <= MOST_BYTES


def _two(data: bytes) -> tuple[tuple[bytes, bytearray], bytes]:
    size = int.from_bytes(data[:2], "little")
    return (data[2 : 2 + size], bytearray(data[2 + size :])), data


@cache
def tensor_seeds() -> list[bytes]:
    """Every codec, of two types."""
    found: list[bytes] = []
    for codec in SPELLINGS:
        for dtype in (torch.float32, torch.float64):
            spec, payload = Codec.parse(codec).pack("h", torch.arange(240, dtype=dtype).view(12, 20) % 7)
            head = msgspec.msgpack.encode(spec)
            found.append(len(head).to_bytes(2, "little") + head + bytes(payload))
    return found


def tensor_wild(rng: Random) -> bytes:
    """A wrong spec of right bytes, or the other way round."""
    (spec, payload), _ = _two(rng.choice(tensor_seeds()))
    told = msgspec.msgpack.decode(spec)
    if rng.random() < 0.7:
        told = altered(rng, told)
    else:
        payload = bytearray(scrambled(rng, bytes(payload)))
    if rng.random() < 0.5 and isinstance(told, dict):
        told["nbytes"] = len(payload)
    head = msgspec.msgpack.encode(told)
    return len(head).to_bytes(2, "little") + head + bytes(payload)


# --- spills --------------------------------------------------------------------------------------------------


def signed(data: bytes) -> bytes:
    """With the checksum that these bytes should have, where they have room for one."""
    if len(data) < _CRC.stop:
        return data
    crc = zlib.crc32(data[_CRC.stop :], zlib.crc32(b"00000000", zlib.crc32(data[: _CRC.start])))
    return data[: _CRC.start] + b"%08x" % crc + data[_CRC.stop :]


def spill(data: bytes) -> None:
    """The stored bytes of a contribution; with the right checksum, as whoever alters them can give them that."""
    for one in (data, signed(data)):
        for read in (decode_contribution, decode, decode_meta):
            with suppress(ZsflError):
                found = read(one)
                if isinstance(found, Contribution):
                    for grad in found.grads.values():
                        grad.sum()


def meta(**changes: Any) -> SpillMeta:
    """Of a plain client's contribution."""
    plain: dict[str, Any] = {"cid": CID, "part": "client", "version": 4, "n": 3.0, "samples": 3}
    return SpillMeta(**(plain | {"loss_sum": 1.5, "client": "c", "node": "c"} | changes))


@cache
def spill_seeds() -> list[bytes]:
    """Plain, merged, packed by a codec, of two types."""
    members = tuple({"cid": CID.replace("s00000", f"s0000{n}"), "n": 1.5, "samples": 2, "client": "c"} for n in (0, 1))
    merged = msgspec.convert(
        {"cid": CID, "part": "body", "version": 4, "n": 3.0, "samples": 4, "loss_sum": None, "client": "c", "node": "s"}
        | {"members": members},
        SpillMeta,
    )
    grads = {"grad/a": torch.ones(2, 3), "grad/b": torch.ones(3, dtype=torch.float32)}
    coded, payload = Codec.parse("rand2").pack("grad/a", torch.ones(4, 8))
    name = f"coded/{coded.codec}/{coded.dtype}/4x8/grad/a"
    return [
        encode(meta(), grads),
        encode(merged, grads),
        encode(meta(), grads | {"buffer/c": torch.tensor([True, False]), "buffer/n": torch.tensor(3)}),
        encode(meta(loss_sum=None), {"grad/a": torch.ones(2, dtype=torch.float64), "grad/h": torch.ones(2).half()}),
        encode(meta(), {name: torch.frombuffer(bytearray(payload), dtype=torch.uint8)}),
        encode(meta(), {}),
    ]


def spill_wild(rng: Random) -> bytes:
    """Wrong in its header, in a way that leaves it JSON, or anywhere."""
    data = rng.choice(spill_seeds())
    if rng.random() < 0.5:
        return scrambled(rng, data)
    size = int.from_bytes(data[:8], "little")
    told = altered(rng, msgspec.json.decode(data[8 : 8 + size]))
    head = msgspec.json.encode(told) if not isinstance(told, bytes) else told
    return len(head).to_bytes(8, "little") + head + data[8 + size :]


def segments(data: bytes) -> None:
    """A file that many spills share, as a restart finds it, and as it came from elsewhere."""
    home = _home()
    path = home.file("00000001.spills", data)
    found_in(path)
    segment = Segment(path, sealed=True)
    with suppress(ZsflError):
        for _ in segment.records():
            pass
    segment.close()
    journal = home.file("journal/v000000000004.spills", data)
    kept = Journal(journal.parent).kept()
    for key in kept:
        with suppress(ZsflError):
            kept.read(key)


def _record(data: bytes, size: int | None = None) -> bytes:
    return _SPILL_MAGIC + (len(data) if size is None else size).to_bytes(8, "little") + data


@cache
def segments_seeds() -> list[bytes]:
    """One record, several."""
    spills = spill_seeds()
    return [_record(spills[0]), b"".join(map(_record, spills))]


def segments_wild(rng: Random) -> bytes:
    """Records of altered spills, some with another length than they have."""
    records = [signed(spill_wild(rng)) if rng.random() < 0.5 else rng.choice(spill_seeds()) for _ in range(3)]
    sizes = [rng.choice((None, None, None, 0, 9, 1 << 40, (1 << 64) - 1)) for _ in records]
    data = b"".join(_record(one, size) for one, size in zip(records, sizes, strict=True))
    return scrambled(rng, data) if rng.random() < 0.3 else data


# --- what a run leaves ---------------------------------------------------------------------------------------


def records(data: bytes) -> None:
    """Lines of a ledger, and the place of a checkpoint."""
    for line in data.split(b"\n"):
        with suppress(ZsflError):
            read_record(line, "a line")
    path = _home().file("round-000001/place.json", data)
    with suppress(ZsflError):
        place_of(path.parent)


@cache
def records_seeds() -> list[bytes]:
    """Records and a place."""
    rng = Random(1)
    place = {"version": 4, "round": 1, "run": "3fa9c1", "facts": {"name": "x"}, "samples": {"0": 5}, "memory": {}}
    return [
        *(msgspec.json.encode(sample(rng, Record)) for _ in range(8)),
        msgspec.json.encode(place | {"untested": None, "commit": "ab" * 32}),
    ]


def records_wild(rng: Random) -> bytes:
    """Altered, and scrambled."""
    data = rng.choice(records_seeds())
    if rng.random() < 0.6:
        return msgspec.json.encode(altered(rng, msgspec.json.decode(data)))
    return scrambled(rng, data)


def _model() -> SplitModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return SplitModel(head=torch.nn.Linear(2, 3), body=torch.nn.Linear(3, 3), tail=torch.nn.Linear(3, 2))


def _master() -> Master:
    return Master(_model(), OptimizerSpec(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}))


def weights(data: bytes) -> None:
    """Weights as they are published, after their parts' lengths."""
    frames = unpacked(data)
    with suppress(ValueError):
        told = msgspec.msgpack.decode(frames[0] if frames else b"", type=Weights)
        with suppress(ZsflError):
            found = weights_of(told, frames[1:], (Version(4), _body_state()), max_bytes=MOST_BYTES)
            Part(_model().body, "body", torch.device("cpu")).load(found)


def _body_state() -> dict[str, torch.Tensor]:
    return {f"body.{name}": value for name, value in _model().body.state_dict().items()}


@cache
def weights_seeds() -> list[bytes]:
    """Those of a body, whole and as what differs from others."""
    state = _body_state()
    moved = {name: tensor + 1 for name, tensor in state.items()}
    codec = Codec.parse("raw+shuffle+lz4")
    versions = [pack(Version(4), Portion("body"), state)] + [
        pack(Version(5), Portion("body"), after, codec, (Version(4), state)) for after in (moved, state)
    ]
    return [packed([msgspec.msgpack.encode(body), *parts]) for body, parts in versions]


def weights_wild(rng: Random) -> bytes:
    """With something wrong in the message, or in what comes with it."""
    head, *parts = unpacked(rng.choice(weights_seeds()))
    told = altered(rng, msgspec.msgpack.decode(head))
    if rng.random() < 0.3:
        told, parts = msgspec.msgpack.decode(head), [scrambled(rng, part) for part in parts]
    return packed([msgspec.msgpack.encode(told), *parts[: rng.choice((1, 2, 2, 2))]])


def checkpoint(data: bytes) -> None:
    """A checkpoint's tensors, as whoever stands by fetches them."""
    path = _home().file("round-000001/master.safetensors", data)
    with suppress(ZsflError):
        _master().restore(path.parent)


@cache
def checkpoint_seeds() -> list[bytes]:
    """One with a step made, one without."""
    folder, found = _home().path / "saved", list[bytes]()
    master = _master()
    for steps in (0, 1):
        for part, names in (("body", ("body",)), ("client", ("head", "tail"))):
            grads = {name: value for name, value in master.state().items() if name.startswith(names)}
            one = Contribution(
                cid=cast(Any, CID), part=cast(Any, part), version=Version(4), n=2.0, loss_sum=1.0, samples=2,
                grads=grads, buffers={}, node="n",
            )  # fmt: skip
            if steps:
                master.step([one])
        master.save(folder)
        found.append((folder / "master.safetensors").read_bytes())
    return found


def checkpoint_wild(rng: Random) -> bytes:
    """Altered in its description, with a digest that fits, or anywhere."""
    data = rng.choice(checkpoint_seeds())
    if rng.random() < 0.3:
        return scrambled(rng, data)
    return resealed(data, lambda told: altered(rng, told))


def resealed(data: bytes, change: Callable[[Any], Any]) -> bytes:
    """A checkpoint that says something else, with the digest of that."""
    from safetensors.torch import load, save

    from zsfl.learning import master

    size = int.from_bytes(data[:8], "little")
    text = msgspec.json.decode(data[8 : 8 + size])["__metadata__"]["master"]
    text = msgspec.json.encode(change(msgspec.json.decode(text))).decode()
    tensors = load(data)
    return save(tensors, {"master": text, "digest": master._seal(tensors, text)})


def mirror(data: bytes) -> None:
    """What an aggregator answers who stands by: which files there are, and what is in them."""
    home = _home()
    folder = home.path / "copy"
    folder.mkdir(exist_ok=True)
    copy = Mirror(folder, 1, syncs=False)
    frames = unpacked(data)
    with suppress(ValueError, ZsflError):
        following = msgspec.msgpack.decode(frames[0] if frames else b"", type=Following)
        for info, piece in zip(following.files, frames[1:], strict=False):
            if copy.lacks(info):
                copy.begins_at(info)
                with copy.receiving(info) as write:
                    write(piece)
        copy.wish(cast(Any, "node"))
    home.empty()


@cache
def _mirror_frames() -> list[bytes]:
    rng = Random(2)
    record = msgspec.structs.replace(msgspec.convert(sample(rng, Record), Record), predecessor="", version=Version(1))
    ledger = msgspec.json.encode(record) + b"\n"
    place = records_seeds()[-1]
    files = {LEDGER: ledger, "journal/v000000000004.spills": segments_seeds()[0], "metrics.jsonl": b"{}\n"}
    files |= {"checkpoint/round-000001/master.safetensors": b"x", "checkpoint/round-000001/place.json": place}
    infos = [{"name": name, "size_bytes": len(one), "changed_us": 7} for name, one in files.items()]
    told = {"t": "following", "agrees": True, "origin": "", "epoch": 1, "files": infos}
    return [msgspec.msgpack.encode(told), *files.values()]


@cache
def mirror_seeds() -> list[bytes]:
    """A ledger, a version's contributions, a checkpoint."""
    return [packed(_mirror_frames())]


def mirror_wild(rng: Random) -> bytes:
    """Another answer, or other files."""
    head, *files = _mirror_frames()
    told = msgspec.msgpack.decode(head)
    if rng.random() < 0.6:
        told = altered(rng, told)
    files = [scrambled(rng, one) if rng.random() < 0.3 else one for one in files]
    return packed([msgspec.msgpack.encode(told), *files])


# --- settings and discovery ----------------------------------------------------------------------------------


def settings(data: bytes) -> None:
    """A settings file."""
    with suppress(ZsflError):
        load_settings({}, {}, _home().file("zsfl.toml", data))


@cache
def settings_seeds() -> list[bytes]:
    """Right ones."""
    return [
        b'[node]\nhost = "127.0.0.1"\nport = 7700\npeers = ["10.0.0.1:7700"]\nmdns = false\n',
        b'[node]\nname = "a"\nruns = "runs"\nshards = "0-3,7"\nslots = 9\nbeat_s = 0.5\nlost_after_s = 2.0\n',
        b'[node]\nmode = "elastic"\ndurability = "power"\nkeep_mib = 3\nrounds = 4\nresume = true\n[other]\nx = 1\n',
    ]


def settings_wild(rng: Random) -> bytes:
    """A wrong value for a key that is there."""
    names = sorted({name for flags in NODE_FLAGS.values() for name in flags})
    values = (
        "1e999",
        "nan",
        "-1",
        '""',
        '"\\u0000"',
        "[]",
        "[[]]",
        "{}",
        "true",
        "1979-05-27",
        '"0-999999999"',
        "9" * 30,
    )
    lines = [f"{rng.choice(names)} = {rng.choice(values)}" for _ in range(2)]
    text = "[node]\n" + "\n".join(lines)
    return text.encode() if rng.random() < 0.6 else scrambled(rng, rng.choice(settings_seeds()))


def announcement(data: bytes) -> None:
    """The TXT record of an mDNS announcement, and a whole packet; the file of a node that is met there; and a card."""
    info = zc.ServiceInfo(SERVICE, f"x.{SERVICE}", port=7, properties=data[:9000], addresses=[bytes([127, 0, 0, 1])])
    with suppress(ZsflError):
        found = read_announcement(info)
        assert found is None or found.node_id.isprintable()
        met = read_entry(data)
        assert met is None or met.address.isprintable()
    packet = DNSIncoming(data[:9000])
    if packet.valid:
        packet.answers()
    with suppress(ValueError):  # as the framing takes it
        card = msgspec.msgpack.decode(data, type=NodeCard)
        card.endpoint(card.data_port)


@cache
def announcement_seeds() -> list[bytes]:
    """The texts of a node, its packet, a card."""
    texts = [b"id=0123456789ab", b"role=client", b"job=0123456789abcdef", b"v=6"]
    info = zc.ServiceInfo(
        SERVICE, f"x.{SERVICE}", port=7, properties={"id": "a", "role": "client"}, addresses=[bytes([127, 0, 0, 1])]
    )
    out = DNSOutgoing(0x8400)
    out.add_answer_at_time(info.dns_text(), 0)
    out.add_answer_at_time(info.dns_service(), 0)
    card = sample(Random(1), NodeCard)
    text = b"".join(bytes([len(one)]) + one for one in texts)
    met = b'{"node":"0123456789ab","host":"127.0.0.1","port":7700,"job":"0123456789abcdef0123456789abcdef"}'
    return [text, out.packets()[0], msgspec.msgpack.encode(card), met]


# --- keys ----------------------------------------------------------------------------------------------------


def token(data: bytes) -> None:
    """The token of an invitation: one that is taken is the very one that such an invitation has."""
    for text in (data.decode(errors="replace"), _as_token(data)):  # also with the checksum that these bytes should have
        with suppress(ZsflError):
            found = from_token(text)
            assert to_token(found) == "".join(text.split())
            assert 0 < len(found.addresses) <= MOST_ADDRESSES
            assert len(z85.decode(found.key)) == 32


def _as_token(packed: bytes) -> str:
    checked = packed + zlib.crc32(packed).to_bytes(4, "big")
    return PREFIX + base64.urlsafe_b64encode(checked).decode().rstrip("=")


def _invitations() -> list[Invitation]:
    return [
        Invitation(("192.168.1.10:7700", "lab-gpu.example:1"), bytes(range(32)), bytes(16), 1_800_000_000),
        Invitation(("127.0.0.1:65535",), bytes(32), bytes(range(16)), 0),
    ]


@cache
def token_seeds() -> list[bytes]:
    """Tokens, and what is packed in them."""
    invitations = _invitations()
    return [*(to_token(one).encode() for one in invitations), *map(msgspec.msgpack.encode, invitations)]


def token_wild(rng: Random) -> bytes:
    """A wrong invitation, packed; or a token with wrong letters in it."""
    if rng.random() < 0.5:
        return scrambled(rng, rng.choice(token_seeds()))
    return msgspec.msgpack.encode(
        altered(rng, msgspec.msgpack.decode(msgspec.msgpack.encode(rng.choice(_invitations()))))
    )


def trusted(data: bytes) -> None:
    """The file of trusted keys: commands change of it what they should, whatever it holds."""
    path = _home().file(TRUSTED, data)
    path.chmod(0o600)
    notes: list[str] = []
    file = TrustFile(path.parent, OWN_KEY, notes.append)
    assert file.roles_of(OWN_KEY) == EVERY_ROLE
    assert len(file.known) <= MAX_TRUSTED + 1
    assert len(notes) <= MAX_TRUSTED
    for key, entry in file.known.items():
        assert machine_id(key)
        assert entry.roles
        if key != OWN_KEY:
            assert read_line(entry.line()) == entry
    with suppress(ZsflError):
        trust(path.parent, Trusted(key=OTHER_KEY, name="other"))
        again = TrustFile(path.parent, OWN_KEY)
        assert again.roles_of(OTHER_KEY) == EVERY_ROLE
        with suppress(ZsflError):  # where that is the name of a key in the file
            revoke(path.parent, OTHER_KEY)
            assert TrustFile(path.parent, OWN_KEY).roles_of(OTHER_KEY) == frozenset()


@cache
def trusted_seeds() -> list[bytes]:
    """Some machines, as what they may be, and a comment."""
    keys = [z85.encode(bytes([number] * 32)).decode() for number in (3, 7, 9)]
    lines = (
        "# KEY NAME ROLES",
        f"{keys[0]} lab-gpu split-server,client",
        f"{keys[1]} laptop",
        keys[2],
        "",
        f"{OTHER_KEY} x",
    )
    return [
        "\n".join(lines).encode(),
        f"{keys[0]} a\r\n{keys[0]} b client\r\n".encode(),
        f"{OWN_KEY} me client".encode(),
    ]


def trusted_wild(rng: Random) -> bytes:
    """Right words and wrong ones, in any order."""
    words = (
        OWN_KEY,
        OTHER_KEY,
        OTHER_KEY[:-1],
        "%" * 40,
        "#" + OWN_KEY[1:],
        "gpu",
        "-gpu",
        "client",
        "client,client",
        ",",
        "king",
    )
    parts = (" ", "\t", "\n", "\r", "\x0c", "\x1c", "\N{NO-BREAK SPACE}", "\N{LINE SEPARATOR}", "")
    text = "".join(rng.choice(words) + rng.choice(parts) for _ in range(rng.randrange(30)))
    return text.encode() if rng.random() < 0.7 else scrambled(rng, rng.choice(trusted_seeds()))


# --- HTTP ----------------------------------------------------------------------------------------------------


def http(data: bytes) -> None:
    """The head of a request to the page, or to what serves metrics; and who may make it."""
    with suppress(ZsflError):
        request = parse(data)
        assert request.path.startswith("/")
        assert all(value == value.strip(" \t") for value in request.headers.values())
        Gate("192.168.1.10", 8000, "a-token", "it").check(request)


@cache
def http_seeds() -> list[bytes]:
    """What browsers and Prometheus send."""
    return [
        b"GET /?token=a-token HTTP/1.1\r\nHost: 192.168.1.10:8000\r\nAccept: text/html\r\n\r\n",
        b"GET /events HTTP/1.1\r\nhost:\t127.0.0.1:8000 \r\nCookie: a=b; zsfl-dash-8000=a-token\r\n\r\n",
        b"HEAD /metrics HTTP/1.1\r\nAuthorization: Bearer a-token\r\nOrigin: http://elsewhere\r\n\r\n",
    ]


def http_wild(rng: Random) -> bytes:
    """Right pieces and wrong ones, in any order, and as many of the same as fit."""
    pieces = (b"GET ", b"/", b"?a=%00", b" HTTP/1.1", b"\r\n", b"Host", b":", b" ", b"\t", b"a-token", b"\x01", b"\xff")
    text = b"".join(rng.choice(pieces) * rng.choice((1, 1, 1, 2000)) for _ in range(rng.randrange(12)))
    return b"GET / HTTP/1.1\r\n" + text if rng.random() < 0.7 else scrambled(rng, rng.choice(http_seeds()))


_kept: list[Home] = []


def _home() -> Home:
    if not _kept:
        _kept.append(Home())
    return _kept[0]


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("header", header, header_seeds, lambda rng: message(rng, wrong=True)),
        Target("framing", framing, framing_seeds, framing_wild),
        Target("tensor", tensor, tensor_seeds, tensor_wild),
        Target("spill", spill, spill_seeds, spill_wild),
        Target("segments", segments, segments_seeds, segments_wild),
        Target("records", records, records_seeds, records_wild),
        Target("weights", weights, weights_seeds, weights_wild),
        Target("checkpoint", checkpoint, checkpoint_seeds, checkpoint_wild),
        Target("mirror", mirror, mirror_seeds, mirror_wild),
        Target("settings", settings, settings_seeds, settings_wild),
        Target("token", token, token_seeds, token_wild),
        Target("trusted", trusted, trusted_seeds, trusted_wild),
        Target("http", http, http_seeds, http_wild),
        Target("announcement", announcement, announcement_seeds, from_seeds(announcement_seeds)),
    )
}
