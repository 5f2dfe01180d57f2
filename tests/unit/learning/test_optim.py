from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from zsfl.errors import ConfigError
from zsfl.learning import optim
from zsfl.learning.optim import OptimizerSpec, adam, adamw, make_step, optimizer, sgd


def test_reads_the_same_however_it_was_written() -> None:
    one = optimizer(torch.optim.RMSprop, momentum=0.9, lr=0.1)
    other = OptimizerSpec(torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.9})
    assert repr(one) == repr(other) == "RMSprop(lr=0.1, momentum=0.9)"
    assert one == other


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (sgd(0.1, momentum=0.9, weight_decay=1e-4, nesterov=True), torch.optim.SGD),
        (adam(), torch.optim.Adam),
        (adamw(lr=1e-2, amsgrad=True), torch.optim.AdamW),
        (optimizer(torch.optim.Rprop, etas=(0.4, 1.3)), torch.optim.Rprop),
    ],
)
def test_builds_what_it_says(spec: OptimizerSpec, kind: type[torch.optim.Optimizer]) -> None:
    built = spec.build([nn.Parameter(torch.zeros(2, 2))])
    assert isinstance(built, kind)
    assert {key: built.param_groups[0][key] for key in spec.options} == spec.options


@pytest.mark.parametrize(("options", "said"), [({"lr": -1.0}, "Invalid learning rate"), ({"lr": 0.1, "lrr": 1}, "lrr")])
def test_wrong_options_are_an_error_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        optimizer(torch.optim.SGD, **options)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_refuses_optimizers_that_need_more_than_a_dense_gradient(kind: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(ConfigError, match="neither a closure nor sparse"):
        optimizer(kind, lr=0.1)


@pytest.mark.parametrize("given", [nn.Linear, "sgd"])
def test_refuses_what_is_no_optimizer_class(given: object) -> None:
    with pytest.raises(ConfigError, match="no optimizer class"):
        OptimizerSpec(given, {})  # pyright: ignore[reportArgumentType]


def test_parameters_that_do_not_fit_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"does not fit this job's parameters: .*empty"):
        sgd(0.1).build([])


def test_stating_an_optimizer_reads_the_same_in_every_process_and_does_not_load_the_compiler() -> None:
    code = """if True:
        import sys, zsfl
        def falling(version): return 0.5**version
        print(zsfl.yogi(clip_norm=1, schedule=zsfl.cosine(9)), zsfl.sgd(0.1, schedule=falling))
        print('torch._dynamo' in sys.modules)
        import torch
        from zsfl.learning.optim import make_step
        weight = torch.nn.Parameter(torch.ones(2))
        made = zsfl.adam().build([weight])
        weight.grad = torch.ones(2)
        with torch.no_grad():
            make_step(made)
        print(weight.grad, 'torch._dynamo' in sys.modules)
    """
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in "12"
    }
    assert said == {
        "Yogi(betas=(0.9, 0.999), eps=0.001, initial_accumulator=1e-06, lr=0.01, clip_norm=1, "
        "schedule=Cosine(versions=9, warmup=0, floor=0.0)) "
        "SGD(lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0, schedule=falling)\nFalse\nNone False\n"
    }


FACTORIES = [
    one for one in vars(torch.optim).values() if isinstance(one, type) and issubclass(one, torch.optim.Optimizer)
]
UNFIT = (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)


@pytest.mark.parametrize("factory", [one for one in FACTORIES if one not in UNFIT])
@pytest.mark.parametrize("compiler", [False, True])
def test_a_step_is_that_of_torch_whether_or_not_its_compiler_is_there(
    factory: type[torch.optim.Optimizer], compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(step: Callable[[torch.optim.Optimizer], object]) -> list[torch.Tensor]:
        draw = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(3, columns, generator=draw)) for columns in (2, 4)]
        made = optimizer(factory, lr=0.1).build(weights)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=draw)
            with torch.no_grad():
                step(made)
        return list(weights)

    ordinary = trained(lambda made: made.step())
    with monkeypatch.context() as patched:
        if not compiler:
            patched.delitem(sys.modules, optim.COMPILER, raising=False)
        assert all(map(torch.equal, trained(make_step), ordinary))


def test_a_step_calls_what_was_hooked_to_it() -> None:
    weight, called = torch.nn.Parameter(torch.ones(2)), list[str]()
    made = sgd(lr=0.5).build([weight])
    made.register_step_pre_hook(lambda *_: called.append("before"))
    made.register_step_post_hook(lambda *_: called.append("after"))
    weight.grad = torch.ones(2)
    with torch.no_grad():
        make_step(made)
    assert called == ["before", "after"]
    assert weight.tolist() == [0.5, 0.5]
