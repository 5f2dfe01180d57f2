"""What may be said in texts and addresses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect

from zsfl.errors import BadShape, ConfigError
from zsfl.ids import NodeCard, Role
from zsfl.tensors.codec import unpack
from zsfl.tensors.spec import TensorSpec
from zsfl.wire.fields import Counted, LongText, PeerHint, ShortText, fit_to_say
from zsfl.wire.permits import MAY_SEND
from zsfl.wire.refusals import refusal

HOSTS = ("127.0.0.1", "10.0.0.255", "0.0.0.0")  # it is not bound, only spelled
NO_HOSTS = ("localhost", "a..b", "slow.example", "256.1.1.1", "1.2.3", "1.2.3.4.5", "01.2.3.4", "1.2.3.4\n", "", "::1")


def is_taken(value: object, kind: Any) -> bool:
    """Whether it may be said."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


@pytest.mark.parametrize(("hosts", "taken"), [(HOSTS, True), (NO_HOSTS, False)])
def test_peers_say_addresses_that_nobody_has_to_look_up(hosts: tuple[str, ...], taken: bool) -> None:
    card = {"id": "a", "name": "a", "role": Role.CLIENT, "control_port": 1}
    assert {is_taken(card | {"host": host}, NodeCard) for host in hosts} == {taken}
    hint = {"id": "a", "role": Role.CLIENT}
    assert {is_taken(hint | {"address": f"{host}:7700"}, PeerHint) for host in hosts} == {taken}


@pytest.mark.parametrize("bad", ["\x1b]0;title\x07", "\x7f", "\x9b2J", "\u202etxt", "\u2066", "\0", "\r", "\u2028"])
def test_nothing_is_said_that_a_terminal_takes_for_an_order(bad: str) -> None:
    assert not is_taken(f"a{bad}b", ShortText)
    assert not is_taken(f"a{bad}b", LongText)
    assert fit_to_say(ConfigError(f"a{bad}b")).startswith("a?")
    card = {"id": "a", "name": "a", "role": Role.CLIENT, "host": HOSTS[0], "control_port": 1}
    assert is_taken(card, NodeCard)
    assert not any(is_taken(card | {what: f"a{bad}b"}, NodeCard) for what in ("id", "name"))
    assert not is_taken({"id": f"a{bad}b", "role": Role.CLIENT, "address": f"{HOSTS[0]}:1"}, PeerHint)


def unlimited(kind: inspect.Type, where: str, seen: set[type]) -> Iterator[str]:
    """Texts in messages that may have any characters, or are never too long."""
    match kind:
        case inspect.StrType(pattern=None):
            yield where
        case inspect.StructType() if kind.cls not in seen:
            seen.add(kind.cls)
            for field in kind.fields:
                yield from unlimited(field.type, f"{kind.cls.__name__}.{field.name}", seen)
        case inspect.UnionType():
            for one in kind.types:
                yield from unlimited(one, where, seen)
        case inspect.CollectionType():
            yield from unlimited(kind.item_type, where, seen)
        case inspect.TupleType():
            for one in kind.item_types:
                yield from unlimited(one, where, seen)
        case inspect.DictType():
            yield from unlimited(kind.key_type, where, seen)
            yield from unlimited(kind.value_type, where, seen)
        case inspect.AnyType():
            yield where
        case _:
            pass


def test_every_text_that_peers_say_is_bounded_in_what_it_may_be() -> None:
    """But of tensors what is compared with what there is, and shown as Python spells it."""
    seen = set[type]()
    found = {text for kind in MAY_SEND for text in unlimited(inspect.type_info(kind), "", seen)}
    assert found == {"TensorSpec.name", "TensorSpec.dtype", "TensorSpec.codec"}
    for number, field in enumerate(("codec", "dtype", "name")):
        spec = {"name": "x", "dtype": "float32", "shape": (1,), "codec": "raw", "nbytes": number % 2 * 4}
        spec[field] = "\x1b[2J" * 1000
        with pytest.raises(BadShape) as caught:
            unpack(msgspec.convert(spec, TensorSpec), b"")
        assert fit_to_say(caught.value) == str(caught.value), field
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("fine", ["", "client 3", "Zürich, 日本 🙂", "a\u200bb"])
def test_names_of_all_languages_may_be_said(fine: str) -> None:
    assert is_taken(fine, ShortText)
    assert is_taken(f"{fine}\n\t{fine}", LongText)
    assert not is_taken(f"{fine}\n", ShortText)


@given(st.text(st.characters(exclude_categories=()), max_size=3000))
def test_whatever_an_error_says_its_refusal_travels(text: str) -> None:
    answer = refusal(ConfigError(text))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(answer), type=type(answer)) == answer


@pytest.mark.parametrize("counted", [1e300, float("inf"), float("nan"), -1.0, (1 << 53) + 2.0])
def test_no_node_says_that_it_counted_what_drowns_the_sums_of_all(counted: float) -> None:
    assert is_taken({"bytes_sent": 1e12, "step_s": 0.5}, Counted)
    assert not is_taken({"bytes_sent": counted}, Counted)
