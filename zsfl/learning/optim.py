"""Optimizers by name and options: stated in a job, built where the weights are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from zsfl.errors import ConfigError


@dataclass(frozen=True, slots=True, repr=False)
class OptimizerSpec:
    """A torch optimizer class with its options; wrong options are a `ConfigError` at once."""

    factory: type[Optimizer]
    """Any class of `torch.optim` whose `step` needs no closure, or one that behaves like them."""
    options: Mapping[str, Any]
    """Keyword arguments of the class, the parameters left out."""

    def __post_init__(self) -> None:
        """Check class and options, without a step."""
        if not (isinstance(cast(object, self.factory), type) and issubclass(self.factory, Optimizer)):
            raise ConfigError(f"{self.factory!r} is no optimizer class: use zsfl.sgd(lr=0.1), or optimizer(cls, ...)")
        if issubclass(self.factory, torch.optim.LBFGS | torch.optim.SparseAdam):
            raise ConfigError(
                f"{self.factory.__name__} cannot be used: the aggregator has one dense averaged gradient, "
                "neither a closure nor sparse gradients; use sgd, adam, adamw or another torch.optim class"
            )
        object.__setattr__(self, "options", dict(self.options))
        try:
            _without_dynamo(self.factory)([nn.Parameter(torch.zeros(1, 1))], **self.options)
        except Exception as error:
            raise ConfigError(f"{self!r} cannot be built: {error}; correct the optimizer's options") from error

    def __repr__(self) -> str:
        """`SGD(lr=0.1, momentum=0.9)`: options sorted, so that equal specs read the same on every node."""
        options = ", ".join(f"{name}={value!r}" for name, value in sorted(self.options.items()))
        return f"{self.factory.__qualname__}({options})"

    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """The optimizer over `parameters`; `ConfigError` when it refuses them (none, wrong rank, ...)."""
        try:
            return cast(Any, self.factory)(list(parameters), **self.options)
        except Exception as error:
            raise ConfigError(f"{self!r} does not fit this job's parameters: {error}") from error


def _without_dynamo(factory: type[Optimizer]) -> Any:
    """A subclass for trial: torch's own `add_param_group` imports the compiler, 1.4 s in every process."""

    def add_param_group(self: Any, param_group: dict[str, Any]) -> None:
        self.param_groups.append({**self.defaults, **param_group})

    return type(factory.__name__, (factory,), {"add_param_group": add_param_group})


def optimizer(cls: type[Optimizer], **options: Any) -> OptimizerSpec:
    """Any class of `torch.optim` with its options: `optimizer(torch.optim.RMSprop, lr=0.01)`."""
    return OptimizerSpec(cls, options)


def sgd(lr: float, momentum: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False) -> OptimizerSpec:
    """`torch.optim.SGD`."""
    return optimizer(torch.optim.SGD, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)


def adam(
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
) -> OptimizerSpec:
    """`torch.optim.Adam`."""
    return optimizer(torch.optim.Adam, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)


def adamw(
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
) -> OptimizerSpec:
    """`torch.optim.AdamW`."""
    return optimizer(torch.optim.AdamW, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)
