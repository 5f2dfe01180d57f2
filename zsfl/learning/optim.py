"""Optimizers by name and options: stated in a job, built where the weights are."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from zsfl.errors import ConfigError, RunFailed
from zsfl.learning.schedules import Schedule


class Yogi(Optimizer):
    """Zaheer et al. 2018, with the defaults of Reddi et al. 2021: Adam whose second moment moves by a bounded amount.

    m = b1 m + (1 - b1) g, v -= (1 - b2) sign(v - g^2) g^2 and w -= lr m / (sqrt(v) + eps), where m begins at 0 and v
    at `initial_accumulator`; without bias correction, as in both papers.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-3,
        initial_accumulator: float = 1e-6,
    ) -> None:
        if not (lr >= 0 and all(0 <= beta < 1 for beta in betas) and eps > 0 and initial_accumulator >= 0):
            raise ValueError(f"{lr=}, {betas=}, {eps=}, {initial_accumulator=} are out of range")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "initial_accumulator": initial_accumulator})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step over the gradients there are."""
        for group in self.param_groups:
            (beta1, beta2), lr, eps = group["betas"], group["lr"], group["eps"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.full_like(parameter, group["initial_accumulator"])
                mean, square, new = state["exp_avg"], state["exp_avg_sq"], parameter.grad**2
                mean.mul_(beta1).add_(parameter.grad, alpha=1 - beta1)
                square.sub_((1 - beta2) * torch.sign(square - new) * new)
                parameter.addcdiv_(mean, square.sqrt().add_(eps), value=-lr)


@dataclass(frozen=True, slots=True, repr=False)
class OptimizerSpec:
    """A torch optimizer class with its options, and what goes with it; wrong options are a `ConfigError` at once."""

    factory: type[Optimizer]
    """Any class of `torch.optim` whose `step` needs no closure, or one that behaves like them (with a rate `lr`)."""
    options: Mapping[str, Any]
    """Keyword arguments of the class, the parameters left out."""
    clip_norm: float | None = None
    """The averaged gradient is scaled down to this norm (2-norm over all parameters) where it is longer."""
    clip_value: float | None = None
    """Each number of the averaged gradient is brought into [-clip_value, clip_value]."""
    schedule: Schedule | None = None
    """What the learning rate is multiplied by, at each version: `zsfl.cosine(...)`, or any function of the version.

    Nodes know a function by its name alone; one with settings is best a frozen dataclass with `__call__`.
    """

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
            with _without_compiler():
                trial = cast(Any, self.factory)([nn.Parameter(torch.zeros(1, 1))], **self.options)
            lr = float(trial.param_groups[0]["lr"])
        except Exception as error:
            raise ConfigError(f"{self!r} cannot be built: {error}; correct the optimizer's options") from error
        if not math.isfinite(lr):
            raise ConfigError(f"the learning rate of {self!r} is {lr}: use a number, such as lr=0.1")
        for name in ("clip_norm", "clip_value"):
            bound = getattr(self, name)
            if bound is not None and not (isinstance(bound, int | float) and 0 < bound < math.inf):
                raise ConfigError(f"{name} is {bound!r}: use a number above 0, or None not to clip")
        if self.schedule is not None:
            self.factor(0)

    def __repr__(self) -> str:
        """`SGD(lr=0.1, momentum=0.9)`: options sorted, so that equal specs read the same on every node."""
        options = [f"{name}={value!r}" for name, value in sorted(self.options.items())]
        options += [f"{name}={bound!r}" for name in ("clip_norm", "clip_value") if (bound := getattr(self, name))]
        if self.schedule is not None:
            shown = repr(self.schedule) if is_dataclass(self.schedule) else _name(self.schedule)
            options.append(f"schedule={shown}")
        return f"{self.factory.__qualname__}({', '.join(options)})"

    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """The optimizer over `parameters`; `ConfigError` when it refuses them (none, wrong rank, ...)."""
        try:
            with _without_compiler():
                return cast(Any, self.factory)(list(parameters), **self.options)
        except Exception as error:
            raise ConfigError(f"{self!r} does not fit this job's parameters: {error}") from error

    def factor(self, version: int) -> float:
        """What the learning rate is multiplied by in the step that `version` makes."""
        if self.schedule is None:
            return 1.0
        try:
            factor = float(self.schedule(version))
        except Exception as error:
            raise ConfigError(f"the schedule of {self!r} fails at version {version}: {error}") from error
        if not 0 <= factor < math.inf:
            raise ConfigError(f"the schedule of {self!r} gives {factor} at version {version}: it must be 0 or more")
        return factor

    def clip(self, parameters: Collection[nn.Parameter]) -> None:
        """Clip the gradients that are there, by value, then by norm; `RunFailed` when their norm overflows."""
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self.clip_value)
        if self.clip_norm is not None:
            try:
                nn.utils.clip_grad_norm_(parameters, self.clip_norm, error_if_nonfinite=True)
            except RuntimeError as error:
                # Clipped by an infinite norm, the gradient would be 0 and the step would do nothing, unnoticed.
                raise RunFailed("the norm of the averaged gradient overflows: lower the learning rate") from error


def _name(function: object) -> str:
    """A name that is the same in every process."""
    return getattr(function, "__qualname__", type(function).__qualname__)


COMPILER = "torch._dynamo"
"""Torch's optimizers import it, 1.2 s and 70 MB in every process, only to tell it to leave them alone."""
_DISABLED = "__dynamo_disable"
"""Where a function that the compiler is to leave alone keeps what is called in its stead."""


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Inside, an optimizer can be made without the compiler where nobody has imported it: there is nobody to tell."""
    alone = getattr(Optimizer.add_param_group, "__wrapped__", None)
    if alone is None or COMPILER in sys.modules or hasattr(alone, _DISABLED):
        yield
        return
    setattr(alone, _DISABLED, alone)
    try:
        yield
    finally:
        delattr(alone, _DISABLED)


def make_step(optimizer: Optimizer) -> None:
    """`optimizer.step()`, then all gradients are None; to be called without gradients being recorded."""
    plain = not any(getattr(optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post"))
    if COMPILER in sys.modules or not plain or optimizer.defaults.get("differentiable"):
        cast(Any, optimizer).step()
    else:
        inspect.unwrap(type(optimizer).step)(optimizer)  # what torch wraps around it imports the compiler
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def optimizer(
    cls: type[Optimizer],
    *,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    schedule: Schedule | None = None,
    **options: Any,
) -> OptimizerSpec:
    """Any class of `torch.optim` with its options: `optimizer(torch.optim.RMSprop, lr=0.01)`.

    All of these take `clip_norm`, `clip_value` and `schedule` too, see `OptimizerSpec`.
    """
    return OptimizerSpec(cls, options, clip_norm, clip_value, schedule)


def sgd(
    lr: float, momentum: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False, **others: Any
) -> OptimizerSpec:
    """`torch.optim.SGD`."""
    return optimizer(torch.optim.SGD, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, **others)


def adam(
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    **others: Any,
) -> OptimizerSpec:
    """`torch.optim.Adam`."""
    return optimizer(
        torch.optim.Adam, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, **others
    )


def adamw(
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    **others: Any,
) -> OptimizerSpec:
    """`torch.optim.AdamW`."""
    return optimizer(
        torch.optim.AdamW, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, **others
    )


def yogi(
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-3,
    initial_accumulator: float = 1e-6,
    **others: Any,
) -> OptimizerSpec:
    """`Yogi`."""
    return optimizer(Yogi, lr=lr, betas=betas, eps=eps, initial_accumulator=initial_accumulator, **others)
