"""Finds out before training whether the parts of a model fit together, and says which layer does not.

The parts really run, in evaluation mode and on a few samples: the meta device would compute nothing, but costs
a second of imports in every process and knows fewer errors.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from zsfl.errors import ConfigError
from zsfl.learning.blame import own_line
from zsfl.learning.model import SplitModel
from zsfl.learning.part import Loss, label_objection


def check_shapes(model: SplitModel, x: Tensor, y: Tensor | None, loss: Loss, whose: str = "the data") -> None:
    """Run a tiny batch through the parts and, given labels, the loss; `ConfigError` when that fails. `whose` it is, for
    people.

    The model, its buffers and its modes, and the random number generators are as before afterwards.
    """
    _check_not_tied(model)
    _check_dtypes(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        output = _run(model, x)
        if y is not None:
            _check_loss(loss, torch.zeros(output.shape, dtype=output.dtype), y, whose)


def _check_not_tied(model: SplitModel) -> None:
    owner: dict[int, tuple[str, str]] = {}
    for part_name, part in model.parts().items():
        for name, param in part.named_parameters():
            first_part, first_name = owner.setdefault(id(param), (part_name, f"{part_name}.{name}"))
            if first_part != part_name:
                raise ConfigError(
                    f"{first_name} and {part_name}.{name} are one parameter (tied weights), but {first_part} "
                    f"and {part_name} run on different nodes: untie them, or cut so that both lie in one part"
                )


def _check_dtypes(model: SplitModel) -> None:
    dtypes = {
        name: {param.dtype for param in part.parameters() if param.is_floating_point()}
        for name, part in model.parts().items()
    }
    for (one, of_one), (other, of_other) in combinations(dtypes.items(), 2):
        if of_one and of_other and of_one.isdisjoint(of_other):
            raise ConfigError(
                f"{one} has {_dtype_names(of_one)} parameters and {other} has {_dtype_names(of_other)}: "
                "give all parts one dtype"
            )


def _dtype_names(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _check_loss(loss: Loss, output: Tensor, target: Tensor, whose: str) -> None:
    try:
        value: object = loss(output, target)
    except Exception as error:
        if why := label_objection(output, target):
            raise ConfigError(f"in {whose} {why}") from error
        raise ConfigError(
            f"the loss cannot compare the output, {_shape(output)} {_dtype_names({output.dtype})}, with the "
            f"labels, {_shape(target)} {_dtype_names({target.dtype})}. PyTorch says: {error}{own_line(error)}"
        ) from error
    if not isinstance(value, Tensor) or value.dim() != 0:
        shown = f"shape {_shape(value)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ConfigError(
            f"the loss gives {shown}; it must give one number as a tensor, the mean over the samples (reduction='mean')"
        )


class _Entered(NamedTuple):
    name: str
    layer: nn.Module
    got: Tensor | None


@dataclass(slots=True)
class _Trail:
    """Where a run is: the part, what it was given and by whom, and the layers entered but not left."""

    part: str
    giver: str
    given: Tensor
    entered: list[_Entered] = field(default_factory=list[_Entered])


def _run(model: SplitModel, x: Tensor) -> Tensor:
    """The output of the last part, run in evaluation mode; `ConfigError` names the layer that fails."""
    giver, given = "the data", x.detach().clone()
    for name, part in model.parts().items():
        trail = _Trail(name, giver, given)
        tensors = {key: t.detach().clone() for key, t in _tensors(part).items()}
        with _evaluating(part), _followed(part, trail):
            try:
                output: object = functional_call(part, tensors, (given,), strict=False)
            except Exception as error:
                _blame(trail, error)
        if not isinstance(output, Tensor):
            raise ConfigError(f"{name} gives a {type(output).__name__}; exactly one tensor may leave a part")
        giver, given = name, output
    return given


def _tensors(part: nn.Module) -> dict[str, Tensor]:
    return {**dict(part.named_parameters()), **dict(part.named_buffers())}


@contextmanager
def _evaluating(part: nn.Module) -> Generator[None, None, None]:
    """Evaluation mode, as batch norm cannot train on a batch of one; afterwards each module is as it was."""
    modes = {module: module.training for module in part.modules()}
    part.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _followed(part: nn.Module, trail: _Trail) -> Generator[None, None, None]:
    """Keep `trail.entered` up to date while the part runs."""

    def enter(name: str, module: nn.Module, args: tuple[object, ...]) -> None:
        first = args[0] if args else None
        trail.entered.append(_Entered(name, module, first if isinstance(first, Tensor) else None))

    def leave(*_: object) -> None:
        trail.entered.pop()

    handles = [
        handle
        for name, module in part.named_modules()
        for handle in (
            module.register_forward_pre_hook(
                lambda module, args, name=name: enter(f"{trail.part}.{name}".rstrip("."), module, args)
            ),
            module.register_forward_hook(leave),
        )
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _blame(trail: _Trail, error: Exception) -> NoReturn:
    name, layer, got = trail.entered[-1]
    shown = type(layer).__name__ if any(True for _ in layer.children()) else repr(layer)
    if got is trail.given:
        facts = f"{trail.giver} gives {_shape(trail.given)}"
    else:
        inner = "no tensor" if got is None else _shape(got)
        facts = f"it got {inner} inside {trail.part}, to which {trail.giver} gives {_shape(trail.given)}"
    if expected := _expected(layer):
        facts += f"; {name} expects {expected}"
    own = {param.dtype for param in layer.parameters(recurse=False)}
    if got is not None and own and got.dtype not in own and not isinstance(layer, nn.Embedding):
        facts += f"; the input is {_dtype_names({got.dtype})} and the layer {_dtype_names(own)}"
    raise ConfigError(
        f"{name} ({shown}) fails in a dry run: {facts}. PyTorch says: {error}{own_line(error)}"
    ) from error


def _expected(layer: nn.Module) -> str | None:
    """What a layer wants to be given, where its kind says so."""
    match layer:
        case nn.Linear():
            return f"last dimension {layer.in_features}"
        case _ConvNd():
            return f"{layer.in_channels} channels in dimension 1 of {len(layer.kernel_size) + 2}"
        case _BatchNorm():
            return f"{layer.num_features} channels in dimension 1"
        case nn.GroupNorm():
            return f"{layer.num_channels} channels in dimension 1"
        case nn.LayerNorm():
            return f"last dimensions {tuple(layer.normalized_shape)}"
        case nn.RNNBase():
            return f"last dimension {layer.input_size}"
        case nn.Embedding():
            return f"integers from 0 to {layer.num_embeddings - 1}"
        case _:
            return None


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
