"""Cuts an existing `nn.Module` into head, body and tail by the names of its submodules.

An `nn.Sequential` is cut between its children. Any other module is traced with torch.fx, and only as deep as
the cuts lie: submodules that contain no cut stay whole, so they keep their own control flow and their
train and eval modes. Every part shares its parameters and buffers with the module that was cut.
"""

from __future__ import annotations

import difflib
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import cast

from torch import Tensor, fx, nn
from torch.fx.node import Argument

from zsfl.errors import ConfigError
from zsfl.learning.blame import own_line
from zsfl.learning.model import Origin, SplitModel, spell

_INNER = "inner."
_PART_NAMES = ("head", "body", "tail")


def split(module: nn.Module, *, after: str, tail: str | None = None) -> SplitModel:
    """Cut `module`: the head ends with submodule `after`, the tail begins with submodule `tail`.

    Exactly one tensor may cross each cut. `ConfigError` when a name is unknown, the cuts are out of order,
    the body would be empty, or torch.fx cannot trace the module.
    """
    cuts = [_known(module, name) for name in (after, tail) if name is not None]
    outer, *inner = sorted(cuts, key=len)
    if any(f"{name}.".startswith(f"{outer}.") for name in inner):
        raise ConfigError(f"after={after!r} and tail={tail!r} lie in one another: there is no body between them")
    if type(module).forward is nn.Sequential.forward and not any("." in name for name in cuts):
        parts = _cut_sequence(module, cuts)
    else:
        parts = _cut_graph(module, [_first_name(module, name) for name in cuts])
    model = SplitModel(*parts, origin=_origin(module, parts))
    model.training = module.training
    return model


def _known(module: nn.Module, name: str) -> str:
    """`name`, once it is known to be that of a submodule."""
    known = dict(module.named_modules(remove_duplicate=False))
    known.pop("", None)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(dict(module.named_children()))[:8]
        raise ConfigError(
            f"{type(module).__name__} has no submodule {name!r} to cut at; nearest names: {', '.join(near)}"
        )
    return name


def _first_name(module: nn.Module, name: str) -> str:
    """The first of the names under which a submodule is known, which is the one torch.fx uses."""
    wanted = module.get_submodule(name)
    return next(first for first, submodule in module.named_modules() if submodule is wanted)


def _origin(module: nn.Module, parts: Sequence[nn.Module]) -> Origin:
    """Which part holds each tensor of the original's state, found by identity so that ties are kept."""
    held: dict[int, str] = {}
    for part_name, part in zip(_PART_NAMES, parts, strict=False):
        for name, tensor in _state(part).items():
            held.setdefault(id(tensor), f"{part_name}.{name}")
    state = _state(module)
    imports: set[str] = set()
    return Origin(
        names={name: held[id(tensor)] for name, tensor in state.items() if id(tensor) in held},
        unused={name: tensor for name, tensor in state.items() if id(tensor) not in held},
        expression=spell(module, imports),
        imports=frozenset(imports),
    )


def _state(module: nn.Module) -> dict[str, Tensor]:
    return module.state_dict(keep_vars=True)


def _cut_sequence(module: nn.Module, cuts: Sequence[str]) -> list[nn.Module]:
    # Not named_children(): it leaves out repeats of one module, which a sequence may well contain.
    everything = module.named_modules(remove_duplicate=False)
    children = {name: child for name, child in everything if name and "." not in name}
    names = list(children)
    end = names.index(cuts[0]) + 1
    start = names.index(cuts[1]) if len(cuts) == 2 else len(names)
    _check_order(end - 1, start, cuts)
    if end == start:
        raise _empty_body(cuts)
    bounds = [0, end, start, len(names)] if len(cuts) == 2 else [0, end, start]
    return [
        nn.Sequential(OrderedDict((name, children[name]) for name in names[low:high])) for low, high in pairwise(bounds)
    ]


def _check_order(after: int, tail: int, cuts: Sequence[str]) -> None:
    if tail <= after:
        raise ConfigError(f"tail={cuts[1]!r} runs before after={cuts[0]!r}: swap them or choose other names")


def _empty_body(cuts: Sequence[str]) -> ConfigError:
    where = f"between {cuts[0]!r} and {cuts[1]!r}" if len(cuts) == 2 else f"after {cuts[0]!r}"
    return ConfigError(f"nothing lies {where}: the body would be empty; choose an earlier `after`")


class _Whole(nn.Module):
    """Calls the module with one input, so that optional arguments of its forward keep their defaults."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class _Tracer(fx.Tracer):
    """Looks only into modules that contain a cut."""

    def __init__(self, cuts: Sequence[str]) -> None:
        super().__init__()
        self._cuts = [_INNER + name for name in cuts]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(cut.startswith(f"{module_qualified_name}.") for cut in self._cuts)


def _trace(module: nn.Module, cuts: Sequence[str]) -> tuple[_Whole, fx.Graph]:
    """The graph of the module, and its root; `ConfigError` unless it is one for training and evaluation."""
    kind = type(module).__name__
    modes = {submodule: submodule.training for submodule in module.modules()}
    traces: list[tuple[_Whole, fx.Graph]] = []
    try:
        for training in (False, True):
            for submodule in modes:
                submodule.training = training
            whole = _Whole(module)
            traces.append((whole, _Tracer(cuts).trace(whole)))
    except Exception as error:
        why = f"{error}{own_line(error)}"
        raise ConfigError(
            f"{kind} cannot be cut by name, because torch.fx cannot trace its forward: {why}. If that is no mistake in "
            "it, move what depends on the data into a submodule, or write the parts yourself: "
            "zsfl.SplitModel(head, body, tail)"
        ) from error
    finally:
        for submodule, training in modes.items():
            submodule.training = training
    if str(traces[0][1]) != str(traces[1][1]):
        raise ConfigError(
            f"{kind}.forward itself depends on self.training (F.dropout does), which a cut would freeze. Use "
            "modules such as nn.Dropout, or write the parts yourself: zsfl.SplitModel(head, body, tail)"
        )
    return traces[1]


def _cut_graph(module: nn.Module, cuts: Sequence[str]) -> list[nn.Module]:
    whole, graph = _trace(module, cuts)
    nodes = list(graph.nodes)
    after = _call_index(nodes, cuts[0])
    tail = _call_index(nodes, cuts[1]) if len(cuts) == 2 else len(nodes)
    _check_order(after, tail, cuts)
    place = _places(nodes, after, tail)
    if not any(place[node] == 1 and node.op != "output" for node in nodes):
        raise _empty_body(cuts)
    crossing = [_crossing(nodes, place, index, cut) for index, cut in enumerate(cuts)]
    if len(cuts) == 2 and place[crossing[1]] == 0:
        raise ConfigError(f"the tail takes {_label(crossing[1])} from the head, not from the body: move a cut")
    ends = [*crossing, nodes[-1].args[0]]
    return [
        _part_module(whole, [node for node in nodes if place[node] == index], given, gives)
        for index, (given, gives) in enumerate(zip([nodes[0], *crossing], ends, strict=True))
    ]


def _call_index(nodes: Sequence[fx.Node], name: str) -> int:
    calls = [i for i, node in enumerate(nodes) if node.op == "call_module" and node.target == _INNER + name]
    if len(calls) != 1:
        raise ConfigError(
            f"submodule {name!r} is called {len(calls)} times in forward, so it does not say where to cut: "
            "name one that is called exactly once"
        )
    return calls[0]


def _places(nodes: Sequence[fx.Node], after: int, tail: int) -> dict[fx.Node, int]:
    """The part (0, 1, 2) of each node: by position, or by its first user when it does not need the input."""
    fed = {nodes[0]}
    for node in nodes:
        if not fed.isdisjoint(node.all_input_nodes):
            fed.add(node)
    place: dict[fx.Node, int] = {}
    for index, node in reversed(list(enumerate(nodes))):
        if node in fed or not node.users:
            place[node] = (index > after) + (index >= tail)
        else:
            place[node] = min(place[user] for user in node.users)
    return place


def _crossing(nodes: Sequence[fx.Node], place: Mapping[fx.Node, int], before: int, cut: str) -> fx.Node:
    """The one value made up to part `before` and used behind it; parameters are there on both sides."""
    crossing = [
        node
        for node in nodes
        if place[node] <= before and node.op != "get_attr" and any(place[user] > before for user in node.users)
    ]
    if len(crossing) != 1:
        what = ", ".join(_label(node) for node in crossing) or "nothing"
        raise ConfigError(
            f"exactly one tensor may cross the cut at {cut!r}, but there cross: {what}. Cut where no skip "
            "connection spans the cut, for example at the end of a block"
        )
    return crossing[0]


def _label(node: fx.Node) -> str:
    match node.op:
        case "placeholder":
            return "the input"
        case "call_module":
            return f"the output of {str(node.target).removeprefix(_INNER)!r}"
        case _:
            return f"{node.name!r} ({getattr(node.target, '__name__', node.target)})"


def _part_module(whole: _Whole, nodes: Sequence[fx.Node], given: fx.Node, gives: Argument) -> fx.GraphModule:
    """The module that makes `gives` of `given` by way of `nodes`, its attributes named as in the original."""
    graph = fx.Graph()
    copies = {given: graph.placeholder("x")}
    attributes: dict[str, object] = {}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = copy = graph.node_copy(node, copied)
            if copy.op in ("call_module", "get_attr"):
                path = str(node.target)
                copy.target = path.removeprefix(_INNER)
                attributes[copy.target] = cast("Callable[[object], object]", operator.attrgetter(path))(whole)
        return copies[node]

    for node in nodes:
        if node.op not in ("placeholder", "output"):
            copied(node)
    graph.output(fx.map_arg(gives, copied))
    return fx.GraphModule(attributes, graph)
