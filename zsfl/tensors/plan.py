"""What a job says about how its tensors travel: a codec, or several to choose from, for each kind of tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from zsfl.errors import ConfigError
from zsfl.tensors.codec import Codec, negotiate
from zsfl.tensors.spec import ONE_OF, STEPS_PER_BYTE

Choice = tuple[Codec, ...]
"""One codec, or those that a client may choose among as its links turn out to be."""

_LOSSLESS = ("raw", "raw+lz4", "raw+shuffle+lz4")
_HALF = ("fp16", "bf16+shuffle+lz4")
AUTO: dict[str, Choice] = {
    name: tuple(map(Codec.parse, codecs))
    for name, codecs in {
        "auto-lossless": _LOSSLESS,
        "auto-half": (*_LOSSLESS, *_HALF),
        "auto": (*_LOSSLESS, *_HALF, "int8", "int8+lz4"),
    }.items()
}
_SUFFIXES = {
    "spill": ("+feedback", "spills, whose sum counts"),
    "weights": ("+delta", "weights, which follow one another"),
}
"""What may follow the codec of one kind alone, and why."""
_COARSE = frozenset((*STEPS_PER_BYTE, *ONE_OF, "rank6"))


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecPlan:
    """How each kind of tensor travels."""

    activation: Choice = (Codec(),)
    """From the head to a split server."""
    output: Choice = (Codec(),)
    """From a split server to the tail."""
    gradient: Choice = (Codec(),)
    """At the cut, both ways."""
    test: Choice = (Codec(),)
    """Activations and outputs of held-out tests, which should measure the model and not the codec."""
    spill: Choice = (Codec(),)
    """Contributions to the averaged gradient; always one codec."""
    weights: Choice = (Codec(),)
    """Versions of the weights, which all nodes have bit for bit; always one codec, one that loses nothing."""
    feedback: bool = False
    """Whether what a spill's codec leaves out is added to the same node's next spill."""
    delta: bool = False
    """Whether a version of the weights is published as the bits that differ from the one before."""

    @classmethod
    def parse(cls, text: str) -> CodecPlan:
        """A codec or one of AUTO for what crosses the cut, then `KIND=CODEC` for those that differ, after commas.

        `int8`, `auto`, `int8, spill=int8`, `int2, gradient=rank6, spill=rand2+feedback`,
        `raw, weights=raw+shuffle+lz4+delta`. Tests travel as activations do, or as int8 where these are less; spills
        and weights raw. ConfigError when it is none of that.
        """
        first, *others = [part.strip() for part in text.split(",")]
        at_cut = _choice(first)
        test = (Codec.parse("int8"),) if any(codec.base in _COARSE for codec in at_cut) else at_cut
        plan = cls(activation=at_cut, output=at_cut, gradient=at_cut, test=test)
        kinds = [field.name for field in fields(cls) if field.name not in ("feedback", "delta")]
        for other in others:
            kind, is_there, said = other.partition("=")
            if kind not in kinds or not is_there:
                raise ConfigError(f"codec {text!r}: use {', '.join(f'{kind}=CODEC' for kind in kinds)} after the first")
            for only, (word, why) in _SUFFIXES.items():
                if word[1:] in said.split("+") and kind != only:
                    raise ConfigError(f"codec {text!r}: {word[1:]} is for {why}, not for {kind.removesuffix('s')}s")
            suffix, _ = _SUFFIXES.get(kind, ("", ""))
            has_suffix = bool(suffix) and said.endswith(suffix)
            choice = _choice(said.removesuffix(suffix) if has_suffix else said)
            if kind == "spill" and len(choice) > 1:
                raise ConfigError(
                    f"codec {text!r}: spills are read by others than they are written for; name one codec"
                )
            if kind == "weights":
                _check_weights(text, choice, delta=has_suffix)
            plan = replace(
                plan,
                **{kind: choice},
                feedback=has_suffix if kind == "spill" else plan.feedback,
                delta=has_suffix if kind == "weights" else plan.delta,
            )
        return plan

    @property
    def chooses(self) -> bool:
        """Whether what is measured decides on anything."""
        return any(len(choice) > 1 for choice in (self.activation, self.output, self.gradient, self.test))

    @property
    def loses_by_chance(self) -> bool:
        """Whether it depends on what is measured, or on who does which step, what is lost."""
        chosen = (choice for choice in (self.activation, self.output, self.gradient) if len(choice) > 1)
        return self.feedback or any(codec.base != "raw" for choice in chosen for codec in choice)

    def agreed(self, offered: Sequence[str]) -> CodecPlan:
        """The plan with a peer that offers these words; ConfigError when it lacks what is wanted for sure."""
        kinds = ("activation", "output", "gradient", "test")
        return replace(self, **{kind: _agreed(getattr(self, kind), offered) for kind in kinds})


def _choice(text: str) -> Choice:
    if text in AUTO:
        return AUTO[text]
    try:
        return (Codec.parse(text),)
    except ConfigError as error:
        raise ConfigError(f"{error}; or one of {', '.join(AUTO)}") from None


def _check_weights(text: str, choice: Choice, *, delta: bool) -> None:
    if len(choice) > 1 or not set(map(str, choice)) <= set(_LOSSLESS):
        raise ConfigError(
            f"codec {text!r}: all nodes have the same weights, bit for bit; write weights= with "
            f"{' or '.join(_LOSSLESS)}, then +delta after lz4 if wanted"
        )
    if delta and not all(codec.lz4 for codec in choice):
        raise ConfigError(
            f"codec {text!r}: a difference is as long as the weights unless lz4 makes it shorter; "
            "write weights=raw+shuffle+lz4+delta"
        )


def _agreed(choice: Choice, offered: Sequence[str]) -> Choice:
    """Of several, those whose base the peer knows; of one, that one."""
    known = [codec for codec in choice if codec.base in offered] or choice
    return tuple(dict.fromkeys(negotiate(str(codec), offered) for codec in known))
