from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zsfl.errors import BadShape, ConfigError
from zsfl.learning.model import SplitModel
from zsfl.learning.part import Backward, Part, PartWeights, loss_sum

CPU = torch.device("cpu")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def network(*, tail: bool, dropout: float = 0.0, norm: bool = False) -> SplitModel:
    torch.manual_seed(3)
    middle: list[nn.Module] = [nn.ReLU(inplace=True), nn.Linear(7, 6), nn.Tanh(), nn.Dropout(dropout)]
    if norm:
        middle.insert(2, nn.BatchNorm1d(6))
    end = nn.Linear(6, 4)
    body = nn.Sequential(*middle) if tail else nn.Sequential(*middle, end)
    return SplitModel(nn.Linear(5, 7), body, end if tail else None).double()


def load_all(model: SplitModel) -> dict[str, tuple[Part, PartWeights]]:
    state = model.state_dict()
    parts = {name: Part(module, name, CPU) for name, module in copy.deepcopy(model).parts().items()}
    return {name: (part, part.load(state)) for name, part in parts.items()}


def chained_step(model: SplitModel, x: Tensor, y: Tensor, *, seed: int = 5, train: bool = True) -> list[Backward]:
    """One step through separate parts, tensors detached between them; the backwards, last part first."""
    passes = []
    for name, (part, weights) in load_all(model).items():
        done = part.forward(weights, x, seed=seed, train=train, need_input_grad=name != "head")
        passes.append((part, weights, done))
        x = done.output.detach().clone()
    part, weights, done = passes.pop()
    total = loss_sum(F.cross_entropy, done.output, y, len(y))
    results = [part.backward(weights, done.ending_in(total))]
    for part, weights, done in reversed(passes):
        results.append(part.backward(weights, done, results[-1].grad_input))
    return results


@pytest.mark.parametrize("tail", [True, False])
@settings(max_examples=15, deadline=None)
@given(samples=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_chained_parts_give_the_gradients_of_one_pass(tail: bool, samples: int, seed: int) -> None:
    model = network(tail=tail)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 5, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 4, (samples,), generator=generator)
    steps = chained_step(model, x, y)
    grads = {name: grad for step in steps for name, grad in step.grads.items()}
    F.cross_entropy(model(x), y, reduction="sum").backward()
    assert grads.keys() == dict(model.named_parameters()).keys()
    for name, param in model.named_parameters():
        assert param.grad is not None
        torch.testing.assert_close(grads[name], param.grad, rtol=1e-12, atol=1e-12)
    assert steps[-1].grad_input is None


def test_a_step_leaves_weights_module_input_and_generator_alone() -> None:
    model = network(tail=True, dropout=0.5, norm=True)
    part = Part(model.body, "body", CPU)
    state = model.state_dict()
    weights = part.load(state)
    before = {name: tensor.clone() for name, tensor in state.items()}
    tensors = {**weights.params, **weights.buffers}
    held = {name: tensor.clone() for name, tensor in tensors.items()}
    x = torch.randn(6, 7, dtype=torch.float64)
    x_before, generator = x.clone(), torch.get_rng_state()
    done = part.forward(weights, x, seed=1, train=True)
    part.backward(weights, done, torch.ones_like(done.output))
    assert torch.equal(x, x_before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert all(torch.equal(tensors[name], held[name]) for name in held)
    assert all(param.grad is None for param in [*model.parameters(), *weights.params.values()])


def test_weights_do_not_follow_later_changes_of_the_state() -> None:
    model = network(tail=True)
    weights = Part(model.head, "head", CPU).load(model.state_dict())
    before = weights.params["weight"].clone()
    with torch.no_grad():
        model.head.get_parameter("weight").add_(1)
    assert torch.equal(weights.params["weight"], before)


def test_a_recompute_on_another_part_object_is_bit_identical_with_dropout_and_batch_norm() -> None:
    model = network(tail=True, dropout=0.5, norm=True)
    x, grad = torch.randn(8, 7, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)

    def step(seed: int) -> Backward:
        part, weights = load_all(model)["body"]
        part.infer(weights, x)
        torch.rand(3)
        return part.backward(weights, part.forward(weights, x, seed=seed, train=True), grad)

    one, again, other = step(11), step(11), step(12)
    assert one.grad_input is not None
    assert again.grad_input is not None
    assert torch.equal(one.grad_input, again.grad_input)
    for a, b in ((one.grads, again.grads), (one.buffers, again.buffers)):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(one.grads["body.1.weight"], other.grads["body.1.weight"])


def test_dropout_draws_as_torch_does_after_the_seed() -> None:
    part = Part(nn.Dropout(0.5), "body", CPU)
    x = torch.ones(40)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        expected = F.dropout(x, 0.5)
    assert torch.equal(part.forward(part.load({}), x, seed=9, train=True).output, expected)


def test_batch_norm_buffers_come_out_as_one_training_pass_leaves_them() -> None:
    model = network(tail=True, norm=True)
    part, weights = load_all(model)["body"]
    x = torch.randn(8, 7, dtype=torch.float64)
    done = part.forward(weights, x, seed=0, train=True)
    model.body.train()(x.clone())
    expected = {f"body.{name}": buffer for name, buffer in model.body.named_buffers()}
    expected["body.2.num_values"] = torch.tensor(8)
    given = part.backward(weights, done, torch.ones_like(done.output)).buffers
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], expected[name]) for name in expected)
    assert given["body.2.num_batches_tracked"] == 1


def test_a_pass_that_does_not_train_uses_running_statistics_and_changes_no_buffer() -> None:
    model = network(tail=True, norm=True, dropout=0.5)
    part, weights = load_all(model)["body"]
    x = torch.randn(8, 7, dtype=torch.float64)
    done = part.forward(weights, x, seed=0, train=False)
    assert torch.equal(done.output, model.body.eval()(x.clone()))
    assert part.backward(weights, done, torch.ones_like(done.output)).buffers == {}
    inferred = part.infer(weights, x)
    assert torch.equal(inferred, done.output)
    assert not inferred.requires_grad


def test_a_buffer_that_is_replaced_rather_than_written_to_comes_out_too() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = nn.Buffer(torch.zeros(()))
            self.constant = nn.Buffer(torch.ones(2), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + len(x)
            return x * self.constant

    module = Counter()
    part = Part(module, "tail", CPU)
    weights = part.load({"tail.seen": torch.tensor(2.0), "head.other": torch.ones(1)})
    done = part.forward(weights, torch.ones(3, 2), seed=0, train=True)
    assert {name: float(buffer) for name, buffer in done.buffers.items()} == {"tail.seen": 5.0}
    assert float(module.seen) == 0
    assert float(weights.buffers["seen"]) == 2


def test_a_frozen_head_makes_no_graph_and_no_gradients() -> None:
    model = network(tail=True)
    model.head.requires_grad_(False)
    steps = chained_step(model, torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 1, 2]))
    assert steps[-1].grads == {}
    part, weights = load_all(model)["head"]
    x = torch.randn(3, 5, dtype=torch.float64)
    assert part.trainable == ()
    assert not part.forward(weights, x, seed=0, train=True, need_input_grad=False).output.requires_grad
    assert part.forward(weights, x, seed=0, train=True).output.requires_grad


def test_frozen_unused_and_tied_parameters() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.idle = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
            self.two.weight = self.one.weight
            self.one.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    module = Odd()
    part = Part(copy.deepcopy(module), "body", CPU)
    weights = part.load({f"body.{name}": tensor for name, tensor in module.state_dict().items()})
    x = torch.randn(4, 3)
    done = part.forward(weights, x, seed=0, train=True)
    grads = part.backward(weights, done, torch.ones_like(done.output)).grads
    module(x).sum().backward()
    assert set(grads) == {"body.one.weight", "body.two.bias", "body.idle.weight", "body.idle.bias"}
    assert set(part.trainable) == set(grads)
    torch.testing.assert_close(grads["body.one.weight"], module.one.weight.grad)
    assert not grads["body.idle.weight"].any()


@pytest.mark.parametrize("wrong", [3, -1])
def test_a_label_that_is_no_class_is_named_where_the_loss_fails(wrong: int) -> None:
    said = f"^in shard 4 the label {wrong} is there, and the model gives 3 classes, 0 to 2"
    for output, target in (
        (torch.zeros(4, 3), torch.tensor([0, -100, wrong, 2])),
        (torch.zeros(1, 3, 2), torch.tensor([[2, wrong]])),
    ):
        with pytest.raises(ConfigError, match=said):
            loss_sum(F.cross_entropy, output, target, 1.0, "shard 4")
    with pytest.raises(ValueError, match="batch_size"):  # of which it says nothing
        loss_sum(F.cross_entropy, torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), 1.0)


def test_integer_inputs_have_no_gradient_and_no_graph_means_zero_gradients() -> None:
    part = Part(nn.Embedding(5, 2), "head", CPU)
    weights = part.load({"head.weight": torch.randn(5, 2)})
    done = part.forward(weights, torch.tensor([1, 1, 4]), seed=0, train=True)
    result = part.backward(weights, done, torch.ones(3, 2))
    assert result.grad_input is None
    assert result.grads["head.weight"].sum(1).tolist() == [0, 4, 0, 0, 2]

    class Constant(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return torch.ones(2)

    part = Part(Constant(2, 2), "head", CPU)
    weights = part.load({"head.weight": torch.randn(2, 2), "head.bias": torch.randn(2)})
    done = part.forward(weights, torch.ones(1, 2), seed=0, train=True)
    result = part.backward(weights, done, torch.ones(2))
    assert all(not grad.any() for grad in result.grads.values())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"head.weight": torch.zeros(7, 4)}, r"head\.weight is float32 \(7, 4\) .* float64 \(7, 5\)"),
        ({"head.bias": torch.zeros(7)}, r"head\.bias is float32"),
        ({"head.bias": None}, r"head\.bias is missing"),
        ({"head.gamma": torch.zeros(1)}, r"no head\.gamma"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(change: dict[str, Tensor | None], says: str) -> None:
    model = network(tail=True)
    state = {name: tensor for name, tensor in (model.state_dict() | change).items() if tensor is not None}
    with pytest.raises(BadShape, match=says):
        Part(model.head, "head", CPU).load(state)


@pytest.mark.parametrize("grad", [torch.zeros(2, 7), torch.zeros(3, 7, dtype=torch.float64)])
def test_a_gradient_that_does_not_fit_the_output_is_refused(grad: Tensor) -> None:
    part, weights = load_all(network(tail=True))["head"]
    done = part.forward(weights, torch.zeros(2, 5, dtype=torch.float64), seed=0, train=True)
    with pytest.raises(BadShape, match="gradient for the output of the head"):
        part.backward(weights, done, grad)


def test_batch_norm_is_warned_about_by_name() -> None:
    class Frozen(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> Frozen:
            return super().train(False)

    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Sequential(nn.BatchNorm2d(3)), Frozen(2))
    (warning,) = Part(module, "body", CPU).warnings()
    assert "body.0, body.2.0;" in warning
    assert Part(nn.Linear(2, 2), "head", CPU).warnings() == []
    assert "tail;" in Part(nn.BatchNorm1d(2), "tail", CPU).warnings()[0]


@NEEDS_CUDA
def test_on_cuda_dropout_replays_and_the_generators_are_restored() -> None:
    model = network(tail=True, dropout=0.5)
    part = Part(model.body, "body", torch.device("cuda"))
    weights = part.load(model.state_dict())
    x = torch.randn(8, 7, dtype=torch.float64)
    before = torch.cuda.get_rng_state()
    one, again = (part.forward(weights, x, seed=4, train=True).output for _ in range(2))
    assert one.is_cuda
    assert torch.equal(one, again)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_autocast_computes_in_bfloat16_and_keeps_the_types_of_all_that_goes_in_and_out(device: str) -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    state = {f"body.{name}": tensor for name, tensor in module.state_dict().items()}
    x, grad = torch.randn(5, 6), torch.randn(5, 4)
    found: list[tuple[Tensor, Backward]] = []
    for autocast in (False, True):
        part = Part(module, "body", torch.device(device), autocast=autocast)
        weights = part.load(state)
        forward = part.forward(weights, x, seed=1, train=True)
        found.append((forward.output.detach().cpu(), part.backward(weights, forward, grad)))
        assert part.infer(weights, x).dtype == torch.float32
    (exact, one), (near, other) = found
    assert near.dtype == torch.float32
    assert not torch.equal(exact, near)
    torch.testing.assert_close(near, exact, rtol=0.05, atol=0.05)
    for name, tensor in one.grads.items():
        assert other.grads[name].dtype == torch.float32
        torch.testing.assert_close(other.grads[name], tensor, rtol=0.05, atol=0.1)
