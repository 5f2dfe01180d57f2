"""What a job may say about its codecs."""

from __future__ import annotations

import pytest

from zsfl.errors import ConfigError
from zsfl.tensors.codec import SUPPORTED, Codec
from zsfl.tensors.plan import AUTO, CodecPlan


def said(text: str) -> dict[str, str]:
    plan = CodecPlan.parse(text)
    kinds = ("activation", "output", "gradient", "test", "spill", "weights")
    return {kind: " ".join(map(str, getattr(plan, kind))) for kind in kinds}


def test_one_codec_is_for_what_crosses_the_cut() -> None:
    cut = dict.fromkeys(("activation", "output", "gradient", "test"), "fp16+lz4")
    assert said("fp16+lz4") == {**cut, "spill": "raw", "weights": "raw"}
    assert said("raw") == dict.fromkeys(cut, "raw") | {"spill": "raw", "weights": "raw"}


def test_kinds_may_differ() -> None:
    plan = CodecPlan.parse("int2, gradient=rank6,spill=rand2+feedback")
    assert said("int2, gradient=rank6,spill=rand2+feedback") == {
        "activation": "int2",
        "output": "int2",
        "gradient": "rank6",
        "test": "int8",  # tests measure the model
        "spill": "rand2",
        "weights": "raw",
    }
    assert plan.feedback
    assert not CodecPlan.parse("int2, spill=rand2").feedback
    assert CodecPlan.parse("int2, test=int2").test == (Codec.parse("int2"),)


def test_auto_is_several_to_choose_from() -> None:
    assert CodecPlan.parse("auto").activation == AUTO["auto"]
    assert CodecPlan.parse("auto").chooses
    assert not CodecPlan.parse("int8, spill=fp16+feedback").chooses
    assert CodecPlan.parse("raw, output=auto-lossless").chooses
    assert {codec.base for codec in AUTO["auto-lossless"]} == {"raw"}
    assert {codec.base for codec in AUTO["auto-half"]} == {"raw", "fp16", "bf16"}
    assert all(choice[0] == Codec() for choice in AUTO.values())


@pytest.mark.parametrize("codec", ["raw", "raw+lz4", "raw+shuffle+lz4"])
def test_weights_travel_as_one_codec_that_loses_nothing(codec: str) -> None:
    plan = CodecPlan.parse(f"int8, weights={codec}, spill=fp16+feedback")
    assert ([str(one) for one in plan.weights], plan.delta, plan.feedback) == ([codec], False, True)
    if codec != "raw":
        plan = CodecPlan.parse(f"auto, weights={codec}+delta, test=raw")
        assert ([str(one) for one in plan.weights], plan.delta, plan.feedback) == ([codec], True, False)
    assert not CodecPlan.parse(f"raw, weights={codec}").loses_by_chance
    assert not CodecPlan.parse(f"raw, weights={codec}").chooses


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown codec ''.*or one of auto-lossless, auto-half, auto"),
        ("zip", "unknown codec 'zip'"),
        ("int8+feedback", "unknown codec"),
        ("int8, spill", "use activation=CODEC, output=CODEC"),
        ("int8, bias=fp16", "use activation=CODEC.* weights=CODEC after"),
        ("int8, weights=fp16", r"bit for bit; write weights= with raw or raw\+lz4 or raw\+shuffle\+lz4, then \+delta"),
        ("int8, weights=int8+lz4+delta", "bit for bit; write"),
        ("int8, weights=raw+shuffle", "bit for bit; write"),
        ("int8, weights=auto-lossless", "bit for bit; write"),
        ("int8, weights=auto+delta", "bit for bit; write"),
        ("int8, weights=raw+delta", r"unless lz4 makes it shorter; write weights=raw\+shuffle\+lz4\+delta"),
        ("int8, weights=+delta", "unknown codec ''"),
        ("int8, weights=raw+delta+lz4", "unknown codec"),
        ("int8, weights=raw+lz4+feedback", "feedback is for spills, .*, not for weights$"),
        ("int8, spill=int8+delta", "delta is for weights, .*, not for spills"),
        ("int8+delta", "unknown codec"),
        ("int8, spill=auto", "name one codec"),
        ("int8, gradient=int8+feedback", "feedback is for spills"),
        ("int8, spill=+feedback", "unknown codec ''"),
    ],
)
def test_what_it_may_not_say(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CodecPlan.parse(text)


def test_agreement_with_a_peer() -> None:
    for text in ("auto", "int2, gradient=rank6", "raw"):
        plan = CodecPlan.parse(text)
        assert plan.agreed(SUPPORTED) == plan
    old = ("raw", "fp16", "shuffle")
    assert CodecPlan.parse("auto").agreed(old).activation == (Codec(), Codec(base="fp16"))
    with pytest.raises(ConfigError, match="needs int8, the peer offers raw, fp16"):
        CodecPlan.parse("int8").agreed(old)
    with pytest.raises(ConfigError, match="needs raw"):
        CodecPlan.parse("auto").agreed(())
