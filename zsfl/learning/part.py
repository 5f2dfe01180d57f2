"""How a node runs its part of the model for one step: stateless, and the same however often it is repeated.

Weights come in as a value, everything a step changes (gradients, batch-norm statistics) goes out as a value.
The module only says what to compute; its own tensors are never used. A `Part` belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zsfl.errors import BadShape, ConfigError
from zsfl.learning.norms import VALUES, tracked_norms

BatchNorm = Literal["per-client", "merged", "frozen"]
IGNORED = -100
"""The label of samples that do not count, for PyTorch."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""`loss(output, target)`, a scalar: the mean over the samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartWeights:
    """One version of a part's tensors on its device, under the module's own names; never changed."""

    params: Mapping[str, Tensor]
    """Leaves that require a gradient where the module's do. A tied parameter has one name only."""
    buffers: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """A forward pass that waits for its backward; good for one backward."""

    output: Tensor
    """Attached to the autograd graph: detach it before it leaves the node."""
    input: Tensor | None
    """The leaf whose gradient goes to the part before; None when nobody needs it."""
    buffers: Mapping[str, Tensor]
    """Persistent buffers after a training pass by full name; empty when the pass did not train."""

    def ending_in(self, loss: Tensor) -> Forward:
        """This pass with `loss`, a scalar made of `output`, as its end (see `loss_sum`)."""
        return replace(self, output=loss)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backward:
    """What a step gives: all tensors detached, on the part's device."""

    grads: dict[str, Tensor]
    """By full name, trainable parameters only; zeros for those that the pass did not use."""
    buffers: dict[str, Tensor]
    """As `Forward.buffers`."""
    grad_input: Tensor | None


class Part:
    """One part of a `SplitModel` on one device; `prefix` is `head`, `body` or `tail`."""

    def __init__(
        self,
        module: nn.Module,
        prefix: str,
        device: torch.device,
        *,
        batch_norm: BatchNorm = "per-client",
        autocast: bool = False,
        names: Mapping[str, str] | None = None,
    ) -> None:
        """`batch_norm` says what statistics a training pass uses: its batch's, or with `frozen` the running ones.

        With `autocast` matrix products and convolutions are made in bfloat16; weights, gradients and what goes in and
        out keep their types. `names` leads from `PREFIX.NAME` to what a tensor is called everywhere else, its full
        name; None: the same.
        """
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.module = module
        self.prefix = prefix
        self.device = device
        self._params = dict(module.named_parameters())
        self._buffers = dict(module.named_buffers())
        self._known = set(module.state_dict())
        self._batch_norm = batch_norm
        self._autocast = autocast
        self._names = names
        self._places = _places(module)
        self._norms = tracked_norms(module)
        self._seen: dict[str, int] = {}
        """By batch norm, the values per channel of the present pass."""
        self._trains: bool | None = None
        self.draws = False
        """Whether a training pass was seen to draw random numbers."""
        for name, norm in self._norms.items():
            norm.register_forward_pre_hook(partial(self._count, name))

    @property
    def trainable(self) -> tuple[str, ...]:
        """Full names of the parameters that get a gradient; empty for a frozen part."""
        return tuple(self.full_name(name) for name, param in self._params.items() if param.requires_grad)

    def load(self, state: Mapping[str, Tensor]) -> PartWeights:
        """This part's entries of a model's state, copied to the device; `BadShape` when they do not fit."""
        if self._names is None:  # else the state holds what belongs to other cuts, too
            known = {self.full_name(name) for name in self._known}
            if unknown := {name for name in state if name.startswith(f"{self.prefix}.")} - known:
                raise BadShape(f"the model has no {min(unknown)}: do all nodes run the same job file?")
        held = (name for name in (*self._params, *self._buffers) if name in self._known)
        own = {name: state[full] for name in held if (full := self.full_name(name)) in state}
        params = {
            name: self._fitting(name, own, param).requires_grad_(param.requires_grad)
            for name, param in self._params.items()
        }
        # A buffer that is not part of the state (persistent=False) is the module's own constant.
        buffers = {
            name: self._fitting(name, own if name in self._known else self._buffers, buffer)
            for name, buffer in self._buffers.items()
        }
        return PartWeights(params=MappingProxyType(params), buffers=MappingProxyType(buffers))

    def forward(
        self,
        weights: PartWeights,
        x: Tensor,
        *,
        seed: int,
        train: bool,
        need_input_grad: bool = True,
        spare: bool = False,
    ) -> Forward:
        """Run the part on `x`; equal arguments give equal results, dropout included.

        Integer inputs (token ids) have no gradient, so `Forward.input` is None for them too. `spare`: nobody needs `x`
        any more, and a module that works in place may have it.
        """
        given = x.detach().to(self.device)
        leaf = given.requires_grad_() if need_input_grad and given.is_floating_point() else None
        if leaf is None and not spare and given.data_ptr() == x.data_ptr():
            given = given.clone()
        buffers = {name: b.clone() for name, b in weights.buffers.items()} if train else weights.buffers
        self._set_mode(train)
        with self._bound(weights.params, buffers) as after_pass, self._seeded(seed):
            # A copy of the leaf, since a module that works in place fails on one, or would spoil the caller's tensor.
            output = self._module(given if leaf is None else leaf.clone())
        # Read anew: a buffer may have been replaced rather than written to.
        after = {self.full_name(name): after_pass[name].detach() for name in buffers if train and name in self._known}
        after |= {self.full_name(f"{name}.{VALUES}"): torch.tensor(count) for name, count in self._seen.items()}
        return Forward(output=output, input=leaf, buffers=MappingProxyType(after))

    def backward(self, weights: PartWeights, forward: Forward, grad_output: Tensor | None = None) -> Backward:
        """Gradients of `forward`, made by these `weights`; `grad_output` is None when it ends in a loss."""
        output = forward.output
        if grad_output is not None:
            grad_output = grad_output.to(self.device)
            if (grad_output.shape, grad_output.dtype) != (output.shape, output.dtype):
                raise BadShape(
                    f"the gradient for the output of the {self.prefix} is {_describe(grad_output)}, "
                    f"the output is {_describe(output)}: send the gradient of this very step"
                )
        wanted = {self.full_name(name): param for name, param in weights.params.items() if param.requires_grad}
        leaves = [*wanted.values(), *([] if forward.input is None else [forward.input])]
        if leaves and output.requires_grad:
            found = torch.autograd.grad(output, leaves, grad_output, materialize_grads=True)
        else:
            found = tuple(torch.zeros_like(leaf) for leaf in leaves)
        return Backward(
            grads=dict(zip(wanted, found, strict=False)),
            buffers=dict(forward.buffers),
            grad_input=None if forward.input is None else found[-1],
        )

    def moved(self, weights: PartWeights, grads: Mapping[str, Tensor], rate: float) -> PartWeights:
        """These weights less `rate` times the gradients (by full name) of those that have one; buffers as they are."""
        full = {name: self.full_name(name) for name in weights.params}
        params = {
            name: (param.detach() - rate * grads[full[name]]).requires_grad_() if full[name] in grads else param
            for name, param in weights.params.items()
        }
        return PartWeights(params=MappingProxyType(params), buffers=weights.buffers)

    def infer(self, weights: PartWeights, x: Tensor) -> Tensor:
        """The output for `x` in evaluation mode, without a graph."""
        self._set_mode(train=False)
        given = x.detach().to(self.device, copy=True)
        with torch.no_grad(), self._bound(weights.params, weights.buffers):
            return self._module(given)

    def _module(self, x: Tensor) -> Tensor:
        if not self._autocast:
            return self.module(x)
        with torch.autocast(self.device.type, torch.bfloat16):
            output: Tensor = self.module(x)
        return output.float() if output.dtype is torch.bfloat16 else output

    @property
    def couples(self) -> bool:
        """Whether batch norm makes the output of a sample depend on the others of its pass, in training."""
        self._set_mode(train=True)
        return any(isinstance(layer, _BatchNorm) and layer.training for layer in self.module.modules())

    @contextmanager
    def _bound(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> Generator[dict[str, Tensor], None, None]:
        """The module has these tensors while inside; what is given is filled with its buffers as they are at the end.

        As `torch.func.functional_call` does, which looks for the tensors' places each time: a third of a small step.
        """
        own = [(holder, name, holder[name]) for _, holder, name in self._places]
        after: dict[str, Tensor] = {}
        for full, holder, name in self._places:
            holder[name] = params[full] if full in params else buffers[full]
        try:
            yield after
            for full, holder, name in self._places:
                if full in buffers:
                    after[full] = holder[name]
        finally:
            for holder, name, tensor in own:
                holder[name] = tensor

    def _set_mode(self, train: bool) -> None:
        """Training or evaluation, for the next pass."""
        self._seen.clear()
        if self._trains is train:
            return
        self._trains = train
        self.module.train(train)
        if self._batch_norm == "frozen":
            for norm in self._norms.values():
                norm.eval()

    def _count(self, name: str, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        if norm.training:
            self._seen[name] = args[0].numel() // args[0].shape[1]

    def warnings(self, steps: int = 1) -> list[str]:
        """What makes a run of this part, of so many steps a version, differ from training in one process."""
        self._set_mode(train=True)
        coupled = [
            f"{self.prefix}.{name}".rstrip(".")
            for name, layer in self.module.named_modules()
            if isinstance(layer, _BatchNorm) and layer.training
        ]
        merged, is_body = self._batch_norm == "merged", self.prefix == "body"
        if not coupled or (merged and is_body and steps == 1):
            return []
        # What is left with 'frozen' keeps no running statistics that it could use.
        instead = ["group norm"] if self._batch_norm == "frozen" else ["batch_norm='frozen'", "group norm"]
        if is_body:
            instead.insert(0, "steps=1" if merged else "batch_norm='merged'")
        of = f"one of the {steps} merged batches of a version" if merged and is_body else "one client's batch"
        return [
            f"batch norm takes its statistics from {of} at a time, so training differs from one process with all the "
            f"data: {', '.join(coupled)}; {', '.join(instead[:-1])}{' or ' * (len(instead) > 1)}{instead[-1]} would not"
        ]

    def full_name(self, name: str) -> str:
        """What a tensor of this part is called in the model."""
        own = f"{self.prefix}.{name}"
        return own if self._names is None else self._names[own]

    def _fitting(self, name: str, given: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """A copy of `given[name]` on the device, once it is known to be what the module has there."""
        tensor = given.get(name)
        if tensor is None:
            raise BadShape(f"{self.full_name(name)} is missing from the weights: do all nodes run the same job file?")
        if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            raise BadShape(
                f"{self.full_name(name)} is {_describe(tensor)} in the weights and {_describe(like)} in the "
                "model: do all nodes run the same job file?"
            )
        return tensor.detach().to(self.device, copy=True)

    @contextmanager
    def _seeded(self, seed: int) -> Generator[None, None, None]:
        """Random numbers follow `seed` on the CPU and on this part's device; afterwards all is as it was."""
        generators = [torch.default_generator]
        if self.device.type == "cuda":
            generators.append(torch.cuda.default_generators[self.device.index])
        before = [generator.get_state() for generator in generators]
        seeded: list[Tensor] = []
        try:
            # Not torch.manual_seed: it would seed every GPU.
            for generator in generators:
                generator.manual_seed(seed)
                seeded.append(generator.get_state())
            yield
            self.draws = self.draws or any(map(_differs, generators, seeded))
        finally:
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)


def _places(module: nn.Module) -> list[tuple[str, dict[str, Any], str]]:
    """Where the module's tensors are: name (of tied ones the first), the dict that holds it, and under what name."""
    names: dict[int, str] = {}
    places: list[tuple[str, dict[str, Any], str]] = []
    for prefix, layer in module.named_modules(remove_duplicate=False):
        for holder in (cast("dict[str, Any]", layer._parameters), cast("dict[str, Any]", layer._buffers)):
            for name, tensor in holder.items():
                if tensor is not None:
                    full = names.setdefault(id(tensor), f"{prefix}.{name}" if prefix else name)
                    places.append((full, holder, name))
    return places


def _differs(generator: torch.Generator, state: Tensor) -> bool:
    return not torch.equal(generator.get_state(), state)


def loss_sum(loss: Loss, output: Tensor, target: Tensor, n: float, whose: str = "a batch") -> Tensor:
    """The loss times the sample count (or weight sum), so that gradients are sums over samples.

    ConfigError, saying `whose` samples they are, where labels are no classes of the output.
    """
    try:
        return loss(output, target) * n
    except Exception as error:
        if why := label_objection(output, target):
            raise ConfigError(f"in {whose} {why}") from error
        raise


def label_objection(output: Tensor, target: Tensor) -> str:
    """Which label is none of the classes that the output has; empty where all are, or labels are no classes."""
    if target.is_floating_point() or output.ndim < 2 or target.shape != (*output.shape[:1], *output.shape[2:]):
        return ""
    classes, wrong = output.shape[1], target[(target >= output.shape[1]) | ((target < 0) & (target != IGNORED))]
    if not wrong.numel():
        return ""
    return (
        f"the label {int(wrong.flatten()[0])} is there, and the model gives {classes} classes, 0 to {classes - 1}: "
        "correct the labels, or the size of its last layer"
    )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
