from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from zsfl.errors import ConfigError
from zsfl.learning.model import SplitModel
from zsfl.learning.split import split


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet18(nn.Module):
    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._layer(width, width, 1)
        self.layer2 = self._layer(width, 2 * width, 2)
        self.layer3 = self._layer(2 * width, 4 * width, 2)
        self.layer4 = self._layer(4 * width, 8 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width, classes)

    @staticmethod
    def _layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def same_run(original: nn.Module, cut: SplitModel, x: Tensor) -> None:
    """Outputs in both modes, gradients and buffers of `cut` equal those of an independent `original`."""
    for training in (False, True):
        original.train(training)
        cut.train(training)
        torch.manual_seed(1)
        expected = original(x)
        torch.manual_seed(1)
        given = cut(x)
        assert torch.equal(given, expected)
    expected.square().sum().backward()
    given.square().sum().backward()
    # A tensor's place is found by name: gradients stand in for parameters.
    held = dict(cut.named_buffers())
    held |= {name: p.grad for name, p in cut.named_parameters() if p.grad is not None}
    gradients = cut.merged_state(held)
    for name, param in original.named_parameters():
        assert param.grad is not None
        assert torch.equal(gradients[name], param.grad), name
    for name, buffer in original.named_buffers():
        assert torch.equal(gradients[name], buffer), name


@pytest.mark.parametrize(
    ("after", "tail"), [("layer1", "fc"), ("layer1", None), ("maxpool", "layer4.1"), ("layer2.0", "avgpool")]
)
def test_a_resnet_cut_by_name_is_the_same_network(after: str, tail: str | None) -> None:
    torch.manual_seed(0)
    original = ResNet18().double()
    cut = split(copy.deepcopy(original), after=after, tail=tail)
    same_run(original, cut, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    merged = load(save(cut.merged_state(cut.state_dict())))
    fresh = ResNet18().double()
    fresh.load_state_dict(merged, strict=True)
    for name, tensor in original.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)


def test_parts_hold_what_their_names_say() -> None:
    resnet = ResNet18()
    cut = split(resnet, after="layer1", tail="fc")
    assert cut.tail is not None
    assert cut.head.get_submodule("layer1") is resnet.layer1
    assert cut.tail.get_parameter("fc.weight") is resnet.fc.weight
    assert {name.split(".")[0] for name in cut.body.state_dict()} == {"layer2", "layer3", "layer4"}


@pytest.mark.parametrize(("after", "tail"), [("1", "3"), ("1", None), ("2.0", "2.2"), ("0", "2.1")])
def test_a_sequence_is_cut_between_children_and_inside_them(after: str, tail: str | None) -> None:
    original = nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Dropout(0.4)),
        nn.Linear(6, 2),
    )
    cut = split(copy.deepcopy(original), after=after, tail=tail)
    assert isinstance(cut.head, nn.Sequential) == ("." not in f"{after}{tail}")
    same_run(original, cut, torch.randn(5, 4))


def test_a_sequence_that_repeats_a_module_keeps_every_call() -> None:
    act = nn.Tanh()
    original = nn.Sequential(nn.Linear(3, 3), act, nn.Linear(3, 3), act, nn.Linear(3, 2))
    for after in ("1", "3"):
        cut = split(copy.deepcopy(original), after=after, tail=None if after == "3" else "4")
        assert len(list(cut.parts()["head"].named_modules(remove_duplicate=False))) == int(after) + 2
        same_run(original, cut, torch.randn(5, 3))
        original.zero_grad()


def test_a_submodule_with_two_names_may_be_cut_by_either() -> None:
    model = Skip(lambda m, x: m.c(m.b(m.a(x))))
    model.register_module("alias", model.a)
    x = torch.randn(2, 4)
    cut = split(model, after="alias", tail="c")
    assert torch.equal(cut(x), model(x))
    merged = cut.merged_state(cut.state_dict())
    assert merged.keys() == model.state_dict().keys()


class Odd(nn.Module):
    """Free parameters, a constant, an optional argument, ties, unused state, functions around the cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.full((4,), 1.5))
        self.register_buffer("shift", torch.arange(4.0), persistent=False)
        self.inner = nn.Linear(4, 4)
        self.twin = nn.Linear(4, 4)
        self.twin.weight = self.inner.weight
        self.never = nn.BatchNorm1d(3)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        gain = self.scale * 2
        x = F.relu(self.first(x))
        x = self.twin(self.inner(x) * gain + self.shift).view(x.size(0), -1)
        if mask is not None:
            x = x * mask
        return self.last(torch.tanh(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])) - 1


def test_what_needs_no_input_goes_where_it_is_used_and_ties_survive() -> None:
    torch.manual_seed(0)
    original = Odd()
    cut = split(copy.deepcopy(original), after="first", tail="last")
    assert "body.scale" in cut.state_dict()
    x = torch.randn(3, 4)
    assert torch.equal(cut(x), original(x))
    merged = load(save(cut.merged_state(cut.state_dict())))
    fresh = Odd()
    fresh.load_state_dict(merged, strict=True)
    assert torch.equal(fresh(x), original(x))
    assert torch.equal(fresh.never.weight, original.never.weight)


class Skip(nn.Module):
    def __init__(self, lanes: Callable[[Skip, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.lanes = lanes

    def forward(self, x: Tensor) -> Tensor:
        return self.lanes(self, x)


@pytest.mark.parametrize(
    ("lanes", "says"),
    [
        (lambda m, x: m.c(m.b(m.a(x))) + x, "the input, the output of 'a'"),
        (lambda m, x: m.c(m.b(F.relu(h := m.a(x))) + h), None),
        (lambda m, x: m.c(m.b(h := m.a(x))) + h, "the output of 'a', the output of 'b'"),
        (lambda m, x: m.c(torch.sin(h := m.a(x)) + m.b(h)), None),
        (
            lambda m, x: m.c(m.b(m.a(x)).view(x.size(0), -1)),
            "the input, the output of 'a'",
        ),
        (lambda m, x: (h := m.a(x), m.b(h), m.c(h))[2], "from the head, not from the body"),
        (lambda m, x: m.c(m.b(m.a(m.b(x)))), None),
    ],
)
def test_one_tensor_crosses_each_cut_or_the_error_names_what_does(
    lanes: Callable[[Skip, Tensor], Tensor], says: str | None
) -> None:
    model = Skip(lanes)
    if says is None:
        x = torch.randn(2, 4)
        assert torch.equal(split(model, after="a", tail="c")(x), model(x))
    else:
        with pytest.raises(ConfigError, match=says):
            split(model, after="a", tail="c")


@pytest.mark.parametrize(
    ("after", "tail", "says"),
    [
        ("layer7", None, "no submodule 'layer7'.*nearest names: layer4"),
        ("layer1.5", None, "nearest names: layer1"),
        ("fc", "layer1", "runs before"),
        ("layer1", "layer1", "in one another"),
        ("layer1.0", "layer1", "in one another"),
        ("layer1", "layer1.1", "in one another"),
        ("layer1", "layer2", "nothing lies between 'layer1' and 'layer2'"),
        ("fc", None, "nothing lies after 'fc'"),
        ("layer1.0.conv1", "fc", "the output of 'maxpool', the output of 'layer1.0.conv1'"),
        ("layer1.0.relu", "fc", "is called 2 times"),
    ],
)
def test_bad_cuts_are_explained(after: str, tail: str | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        split(ResNet18(), after=after, tail=tail)


@pytest.mark.parametrize(
    ("after", "tail", "says"),
    [("2", "0", "runs before"), ("0", "1", "nothing lies between"), ("2", None, "nothing lies after '2'")],
)
def test_bad_cuts_of_a_sequence_are_explained(after: str, tail: str | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        split(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), after=after, tail=tail)


def test_control_flow_on_data_is_refused_where_the_cut_lies_and_kept_elsewhere() -> None:
    def branching(m: Skip, x: Tensor) -> Tensor:
        return m.c(m.b(m.a(x))) if x.sum() > 0 else x

    with pytest.raises(ConfigError, match=r"write the parts yourself: zsfl\.SplitModel"):
        split(Skip(branching), after="a")
    model = Skip(lambda m, x: m.c(m.b(m.a(x))))
    model.set_submodule("b", Skip(branching))
    x = torch.randn(2, 4)
    assert torch.equal(split(model, after="a", tail="c")(x), model(x))


def test_a_functional_dropout_that_tracing_would_freeze_is_refused() -> None:
    model = Skip(lambda m, x: m.c(F.dropout(m.b(m.a(x)), training=m.training)))
    model.b.eval()
    with pytest.raises(ConfigError, match=r"depends on self\.training"):
        split(model, after="a")
    assert model.training
    assert not model.b.training


def test_modules_follow_train_and_eval_after_the_cut() -> None:
    model = Skip(lambda m, x: m.c(m.b(m.a(x))))
    model.set_submodule("b", nn.Dropout(0.5))
    cut = split(model, after="a", tail="c")
    x = torch.ones(4, 4)
    assert torch.equal(cut.eval()(x), model.eval()(x))
    assert not torch.equal(cut.train()(x), cut.train()(x))
