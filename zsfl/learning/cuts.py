"""Several cuts of one network: a phone keeps less of it to itself than a workstation.

All cuts share one set of tensors, under the names that these have in the first cut: the master is the first cut's
model, and a `Part` of any other cut is told these names (`names`), so that nobody else needs to know that there are
several. `SplitModel.merged_state` of the first cut leads from there to the original's names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from zsfl.errors import BadShape, ConfigError
from zsfl.ids import BODY, Portion
from zsfl.learning.model import Origin, SplitModel
from zsfl.learning.norms import VALUES, tracked_norms

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


class Cuts:
    """The cuts of a job by name; a job with one model has one cut, whose name is empty."""

    def __init__(self, models: SplitModel | Mapping[str, SplitModel], by_shard: Sequence[str] | None = None) -> None:
        """`models` are made by `zsfl.split` from one network, or copies of it; `by_shard` is the cut of each shard.

        `ConfigError` when they are not of one network, naming what differs.
        """
        self._models = {"": models} if isinstance(models, SplitModel) else dict(models)
        self._by_shard = by_shard
        self.all = tuple(self._models)
        """What the cuts are called."""
        if not self._models:
            raise ConfigError("model() returned no cuts: return a zsfl.SplitModel, or several by name")
        for cut in self.all if not isinstance(models, SplitModel) else ():
            if not _NAME.fullmatch(cut):
                raise ConfigError(f"a cut is called {cut!r}: use at most 40 lower-case letters, digits and hyphens")
        if by_shard is None and len(self.all) > 1:
            raise ConfigError(f"the job has the cuts {_listed(self.all)}: state with cut=... which shard uses which")
        if by_shard is not None and isinstance(models, SplitModel):
            raise ConfigError("model() returns one model, so there is no cut to choose: leave cut out")
        for shard, cut in enumerate(by_shard or ()):
            if cut not in self.all:
                raise ConfigError(f"cut({shard}) gives {cut!r}: it must give one of {_listed(self.all)}")
        self._shared = {cut: self._translation(cut) if number else None for number, cut in enumerate(self.all)}

    @property
    def first(self) -> SplitModel:
        """The model whose names all share: the one for a master."""
        return self._models[self.all[0]]

    def model(self, cut: str) -> SplitModel:
        """The network cut in this way."""
        return self._models[cut]

    def of(self, shard: int) -> str:
        """The cut that this shard's client uses; `BadShape` when there is no such shard (it may come from anywhere)."""
        if self._by_shard is None:
            return self.all[0]
        if not 0 <= shard < len(self._by_shard):
            raise BadShape(f"there is no shard {shard}, only {len(self._by_shard)}: do all nodes run the same job?")
        return self._by_shard[shard]

    def names(self, cut: str) -> Mapping[str, str] | None:
        """Own names of the tensors of this cut to the names that all cuts share; None where they are the same."""
        return self._shared[cut]

    def portion(self, cut: str) -> Portion:
        """The weights that clients of this cut need."""
        return Portion(f"client/{cut}" if cut else "client")

    def portions(self) -> dict[Portion, frozenset[str]]:
        """Of each portion of the weights, the names of its tensors; servers need the bodies of all cuts."""
        names = {cut: self._state_names(cut) for cut in self.all}
        bodies = (shared for pairs in names.values() for own, shared in pairs if own.startswith("body."))
        return {BODY: frozenset(bodies)} | {
            self.portion(cut): frozenset(shared for own, shared in pairs if not own.startswith("body."))
            for cut, pairs in names.items()
        }

    @property
    def fact(self) -> str:
        """What nodes must agree on, beside the first model's tensors: where the cuts lie, and who uses which."""
        if self.all == ("",):
            return ""
        lie = [f"{cut} {_digest(own for own, _ in self._state_names(cut))}" for cut in self.all]
        return f"{', '.join(lie)}; by shard {_digest(map(str, enumerate(self._by_shard or ())))}"

    def _state_names(self, cut: str) -> list[tuple[str, str]]:
        """Own and shared name of everything in the state of this cut."""
        names = self._shared[cut]
        return [(own, own if names is None else names[own]) for own in self._held(cut)]

    def _held(self, cut: str) -> list[str]:
        """Own names of the state of this cut; a tensor that the network ties has one."""
        origin = self._models[cut].origin
        return list(self._models[cut].state_dict()) if origin is None else sorted(set(origin.names.values()))

    def _translation(self, cut: str) -> dict[str, str]:
        """Own to shared names of a cut other than the first, once both are known to be of one network."""
        pair = f"cuts {self.all[0]!r} and {cut!r}"
        model, mine, theirs = self._models[cut], self._origin(cut), self._origin(self.all[0])
        if model.u_shaped != self.first.u_shaped:
            raise ConfigError(f"one of {pair} has a tail and the other has none: give all a tail, or none")
        if differing := sorted(mine.names.keys() ^ theirs.names.keys()):
            raise ConfigError(f"{pair} are of different networks: only one of them uses {differing[0]}")
        if mine.expression != theirs.expression:
            raise ConfigError(f"{pair} are of different networks: {theirs.expression} and {mine.expression}")
        pairs = {(mine.names[name], theirs.names[name]) for name in mine.names}
        if not len(pairs) == len({own for own, _ in pairs}) == len({shared for _, shared in pairs}):
            raise ConfigError(f"{pair} do not tie the same weights to one another: cut one network, or copies of it")
        _check_equal(
            pair, mine.names, model.state_dict(keep_vars=True), theirs.names, self.first.state_dict(keep_vars=True)
        )
        names = dict(pairs)
        for norm in tracked_norms(model):
            names[f"{norm}.{VALUES}"] = names[f"{norm}.running_mean"].removesuffix("running_mean") + VALUES
        return names

    def _origin(self, cut: str) -> Origin:
        origin = self._models[cut].origin
        if origin is None:
            raise ConfigError(f"cut {cut!r} is not made by zsfl.split: several cuts must be, so that tensors are known")
        return origin


def _check_equal(
    pair: str,
    mine: Mapping[str, str],
    own: Mapping[str, Tensor],
    theirs: Mapping[str, str],
    first: Mapping[str, Tensor],
) -> None:
    """Whether every tensor of the original is the same in both cuts, its initial values included."""
    for name in mine:
        one, other = own[mine[name]], first[theirs[name]]
        kinds = [(list(t.shape), t.dtype, t.requires_grad) for t in (other, one)]
        if kinds[0] != kinds[1]:
            raise ConfigError(
                f"{pair} differ in {name}: {_kind(other)} and {_kind(one)}; cut one network, or copies of it"
            )
        if one is not other and not torch.equal(one, other):
            raise ConfigError(f"{pair} begin with different values of {name}: cut one network, or copies of it")


def _kind(tensor: Tensor) -> str:
    frozen = "" if tensor.requires_grad else ", not trained"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{frozen}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:8]
