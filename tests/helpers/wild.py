"""Messages as nobody sends them: near-valid ones, made from the schemas themselves and then altered."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from random import Random
from typing import Any, get_args

import msgspec
from msgspec import inspect

from zsfl.wire.messages import Broadcast, Reply, Request

Mutate = Callable[[bytes], bytes]
MESSAGES: Sequence[type[msgspec.Struct]] = tuple(
    dict.fromkeys(kind for union in (Request, Reply, Broadcast) for kind in get_args(union))
)
TEXTS = (
    "3fa9c1-v00000004-s00000-k000",
    "3fa9c1-v00000004-s00001-k000",
    "3fa9c1",
    "127.0.0.1",
    "127.0.0.1:9",
    "body",
    "client",
    "client/small",
    "0123456789ab",
    "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7",
    "ab" * 32,
    "ledger.jsonl",
    "journal/v000000000004.spills",
    "checkpoint/round-000001/place.json",
    "float32",
    "raw",
    "raw+lz4",
    "int8",
    "server",
    "",
)
"""Some of which fit every pattern that a schema has."""
ODD_TEXTS = ("\x1b[31m", "../../etc/passwd", "a\nb", "\x00", "\N{GRINNING FACE}" * 50, "x" * 5000, "[red]", "/dev/null")
ODD_NUMBERS = (-1, 0, 1, 2, 7, 255, 1 << 16, 1 << 31, (1 << 53) - 1, 1 << 53, (1 << 63) - 1, -(1 << 63), (1 << 64) - 1)
ODD_FLOATS = (float("nan"), float("inf"), -float("inf"), -0.0, 1e308, -1.5, 5e-324)


_type_info = cache(inspect.type_info)  # of what is nested in it, too, which takes its time


def sample(rng: Random, kind: Any) -> Any:
    """A value of a type as its schema allows it, as msgspec's builtins."""
    info = kind if isinstance(kind, inspect.Type) else _type_info(kind)
    match info:
        case inspect.Metadata(type=inner):
            return sample(rng, inner)
        case inspect.StructType():
            found = {
                field.encode_name: sample(rng, field.type)
                for field in info.fields
                if rng.random() < 0.9 or field.required
            }
            return ({info.tag_field: info.tag} if info.tag_field else {}) | found
        case inspect.UnionType(types=types):
            return sample(rng, rng.choice(types))
        case inspect.IntType(ge=low, le=high):
            low, high = low or 0, 1 << 20 if high is None else high
            return rng.choice((low, min(high, low + 1), rng.randint(low, min(high, low + 8)), high))
        case inspect.FloatType(ge=low):
            return rng.choice((0.0, 1.0, rng.random() * 9)) if low is None or low >= 0 else rng.random()
        case inspect.StrType(pattern=pattern, max_length=most):
            fitting = [text for text in TEXTS if (most is None or len(text) <= most) and re.search(pattern or "", text)]
            if not fitting:
                raise LookupError(f"add a text to TEXTS that fits {pattern}")
            return rng.choice(fitting)
        case inspect.BytesType(max_length=most):
            return rng.randbytes(rng.randrange(17 if most is None else most + 1))
        case inspect.LiteralType(values=values):
            return rng.choice(values)
        case inspect.EnumType(cls=cls):
            return rng.choice([one.value for one in cls])
        case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
            return [sample(rng, item) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
        case inspect.TupleType(item_types=items):
            return [sample(rng, item) for item in items]
        case inspect.NamedTupleType(fields=fields):
            return [sample(rng, field.type) for field in fields]
        case inspect.DictType(key_type=key, value_type=value):
            return {sample(rng, key): sample(rng, value) for _ in range(rng.randrange(3))}
        case inspect.BoolType():
            return rng.random() < 0.5
        case inspect.NoneType():
            return None
        case inspect.AnyType():
            return rng.choice((None, 1, "text", [1.5], {"a": [2]}))
        case _:
            raise LookupError(f"no way to make a {info}")


def altered(rng: Random, value: Any) -> Any:
    """The value with one thing in it changed, somewhere."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        match rng.randrange(12):
            case 0:
                return {name: one for name, one in value.items() if name != key}
            case 1:
                return value | {rng.choice(("path", "__class__", "t", "id")): odd(rng)}
            case _:
                return value | {key: altered(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                return value[:place] + value[place + 1 :]
            case 1:
                return [*value, *(value[place : place + 1] * rng.choice((1, 3, 300)))]
            case _:
                return [*value[:place], altered(rng, value[place]), *value[place + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return max(-(1 << 63), min((1 << 64) - 1, value + rng.choice((-1, 1, 1 << 20))))
    return odd(rng)


def odd(rng: Random) -> Any:
    """Some value that nobody expects."""
    few: list[Any] = [None, True, [], {}, [[]], b"", bytes(9), nested(rng.choice((3, 40)))]
    return rng.choice(
        (rng.choice(few), rng.choice(ODD_NUMBERS), rng.choice(ODD_FLOATS), rng.choice(ODD_TEXTS), rng.choice(TEXTS))
    )


def nested(depth: int) -> list[Any]:
    """A list in a list in a list."""
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def scrambled(rng: Random, data: bytes) -> bytes:
    """The bytes with something cut out, put in, doubled or flipped."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(found) + 1)
        match rng.randrange(6):
            case 0:
                del found[place : place + rng.choice((1, 4, 100))]
            case 1:
                found[place:place] = rng.randbytes(rng.choice((1, 2, 8)))
            case 2:
                found[place:place] = found[place : place + rng.choice((1, 16, 200))]
            case 3:
                found[place : place + 8] = rng.choice(ODD_NUMBERS).to_bytes(16, "little", signed=True)[:8]
            case _ if place < len(found):
                found[place] ^= 1 << rng.randrange(8)
            case _:
                pass
    return bytes(found)


def message(rng: Random, *, wrong: bool, kinds: Sequence[type[msgspec.Struct]] | None = None) -> bytes:
    """A header that carries some message, of these kinds or any; `wrong`: something in it is."""
    body = sample(rng, rng.choice(kinds or MESSAGES))
    kind = rng.choice(("request", "reply", "publish"))
    head: dict[str, Any] = {"kind": kind, "id": rng.randrange(9), "deadline_s": 1.0, "body": body}
    for _ in range(rng.choice((1, 1, 2)) if wrong else 0):
        head = altered(rng, head)
    packed = msgspec.msgpack.encode(head)
    return scrambled(rng, packed) if wrong and rng.random() < 0.2 else packed
