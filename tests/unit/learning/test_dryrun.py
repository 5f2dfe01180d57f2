from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsfl.errors import ConfigError
from zsfl.learning.dryrun import check_shapes
from zsfl.learning.model import SplitModel
from zsfl.learning.split import split

X = torch.randn(2, 784)
Y = torch.tensor([3, 9])


def good(**parts: nn.Module) -> SplitModel:
    fitting: dict[str, nn.Module] = {
        "head": nn.Linear(784, 64),
        "body": nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(inplace=True), nn.Dropout(0.5)),
        "tail": nn.Linear(64, 10),
    }
    fitting |= parts
    return SplitModel(fitting["head"], fitting["body"], fitting["tail"])


class OnlyReal(nn.Linear):
    """Looks at values, so that it cannot run on the meta device."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input if input.sum().item() > 0 else -input)


def test_a_fitting_model_passes_and_is_left_as_it_was() -> None:
    model = good(head=OnlyReal(784, 64))
    model.body.eval()
    model.get_submodule("body.1").train()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator, x = torch.get_rng_state(), X.clone()
    check_shapes(model, X, Y, F.cross_entropy)
    check_shapes(model, X, None, F.cross_entropy)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(X, x)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_label_that_is_no_class_is_named_with_whose_it_is() -> None:
    with pytest.raises(
        ConfigError, match=r"^in shard 3 the label 10 is there, and the model gives 10 classes, 0 to 9: "
    ):
        check_shapes(good(), X, torch.tensor([3, 10]), F.cross_entropy, "shard 3")


def test_a_cut_model_passes() -> None:
    layers = nn.Sequential(nn.Linear(784, 64), nn.Sequential(nn.Linear(64, 64), nn.ReLU()), nn.Linear(64, 10))
    check_shapes(split(layers, after="1.0", tail="2"), X, Y, F.cross_entropy)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (
            {"head": nn.Linear(784, 32)},
            "body.0 (Linear(in_features=64, out_features=64, bias=True)) fails in a dry run: "
            "head gives (2, 32); body.0 expects last dimension 64.",
        ),
        (
            {"head": OnlyReal(784, 32)},
            "head gives (2, 32); body.0 expects last dimension 64.",
        ),
        ({"head": nn.Linear(700, 64)}, "the data gives (2, 784); head expects last dimension 700."),
        ({"tail": nn.Linear(60, 10)}, "body gives (2, 64); tail expects last dimension 60."),
        (
            {"body": nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Sequential(nn.Linear(64, 64)))},
            "body.2.0 (Linear(in_features=64, out_features=64, bias=True)) fails in a dry run: "
            "it got (2, 32) inside body, to which head gives (2, 64); body.2.0 expects last dimension 64.",
        ),
        (
            {"body": nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(3, 4, 3))},
            "it got (2, 1, 8, 8) inside body, to which head gives (2, 64); "
            "body.1 expects 3 channels in dimension 1 of 4.",
        ),
        ({"body": nn.BatchNorm1d(32)}, "head gives (2, 64); body expects 32 channels in dimension 1."),
        ({"body": nn.LayerNorm(32)}, "head gives (2, 64); body expects last dimensions (32,)."),
        ({"body": nn.GroupNorm(2, 32)}, "head gives (2, 64); body expects 32 channels in dimension 1."),
        ({"body": nn.Unflatten(1, (5, 5))}, "body (Unflatten(dim=1, unflattened_size=(5, 5))) fails"),
        ({"body": nn.Embedding(5, 64)}, "head gives (2, 64); body expects integers from 0 to 4."),
        ({"body": nn.LSTM(32, 64)}, "head gives (2, 64); body expects last dimension 32."),
        ({"body": nn.LSTM(64, 64)}, "body gives a tuple; exactly one tensor may leave a part"),
        ({"body": nn.Linear(64, 64).double()}, "head has float32 parameters and body has float64"),
    ],
)
def test_what_does_not_fit_is_named_with_both_shapes(parts: dict[str, nn.Module], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        check_shapes(good(**parts), X, Y, F.cross_entropy)


def test_data_of_another_dtype_is_named() -> None:
    says = "the input is float64 and the layer float32"
    with pytest.raises(ConfigError, match=re.escape(says)):
        check_shapes(good(), X.double(), Y, F.cross_entropy)


def test_a_forward_that_fails_itself_is_named_by_its_part() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).view(3, -1)  # wrong

    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.own, self.last = nn.Linear(784, 64), Own(), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.own(self.first(x)))

    line = 1 + next(n for n, text in enumerate(Path(__file__).read_text().splitlines()) if text.endswith("# wrong"))
    end = rf"PyTorch says: [^(]* \({re.escape(__file__)}, line {line}\)$"
    with pytest.raises(ConfigError, match=rf"body \(Own\) fails in a dry run: head gives \(2, 64\)\. {end}"):
        check_shapes(good(body=Own()), X, Y, F.cross_entropy)
    with pytest.raises(ConfigError, match=end):
        check_shapes(split(Traced(), after="first", tail="last"), X, Y, F.cross_entropy)


def test_a_mistake_in_a_forward_that_is_cut_by_name_is_told_with_its_line() -> None:
    class Mistyped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body, self.last = nn.Linear(784, 64), nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.bodi(self.first(x)))  # pyright: ignore  # mistyped

    line = 1 + next(n for n, text in enumerate(Path(__file__).read_text().splitlines()) if text.endswith("# mistyped"))
    said = rf"'Mistyped' object has no attribute 'bodi' \({re.escape(__file__)}, line {line}\)\. If that is no mistake"
    with pytest.raises(ConfigError, match=said):
        split(Mistyped(), after="first", tail="last")


def test_weights_tied_across_the_cut_are_refused() -> None:
    model = good(tail=nn.Linear(64, 64, bias=False))
    assert isinstance(model.tail, nn.Linear)
    model.tail.weight = model.get_parameter("body.0.weight")
    with pytest.raises(ConfigError, match=r"body\.0\.weight and tail\.weight are one parameter"):
        check_shapes(model, X, Y, F.cross_entropy)


def mean_each(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


def as_float(output: Tensor, target: Tensor) -> Tensor:
    return float(F.cross_entropy(output, target))  # pyright: ignore[reportReturnType]


def test_a_loss_must_be_one_number() -> None:
    with pytest.raises(ConfigError, match=r"the loss gives shape \(2,\); it must give one number"):
        check_shapes(good(), X, Y, mean_each)
    with pytest.raises(ConfigError, match="the loss gives a float"):
        check_shapes(good(), X, Y, as_float)


@pytest.mark.parametrize("labels", [torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0])])
def test_labels_that_the_loss_cannot_take_are_shown(labels: Tensor) -> None:
    says = rf"cannot compare the output, \(2, 10\) float32, with the labels, \({len(labels)},\)"
    with pytest.raises(ConfigError, match=says):
        check_shapes(good(), X, labels, F.cross_entropy)
