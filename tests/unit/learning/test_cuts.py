"""Clients that cut one network at different places train it together, as if nobody had cut it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsfl.errors import BadShape, ConfigError
from zsfl.ids import BODY, PartName, RunId, Version, step_cid
from zsfl.learning.averaging import Contribution, average
from zsfl.learning.cuts import Cuts
from zsfl.learning.master import Master
from zsfl.learning.model import SplitModel
from zsfl.learning.norms import norm_rules, pool_buffers
from zsfl.learning.optim import sgd
from zsfl.learning.part import Part, loss_sum
from zsfl.learning.split import split

CPU = torch.device("cpu")


class Net(nn.Module):
    """Convolutions with an activation between them that no submodule is, and a weight that two layers share."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.twin = nn.Conv2d(4, 4, 3, padding=1)
        self.twin.weight = self.conv2.weight
        self.fc1 = nn.Linear(4 * 4 * 4, 8)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.tanh(self.norm(self.conv1(x))))
        x = torch.relu(self.twin(torch.tanh(self.conv2(x))))
        return self.fc2(torch.tanh(self.fc1(x.flatten(1))))


def net(norm: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(norm).double()


BY_SHARD = ["phone", "laptop", "phone", "laptop"]


def two_cuts(plain: nn.Module, tail: str | None = "fc2", first: str = "phone") -> Cuts:
    ends = {"phone": "conv1", "laptop": "twin"}
    network = copy.deepcopy(plain)
    order = sorted(ends, key=lambda name: name != first)
    return Cuts({name: split(network, after=ends[name], tail=tail) for name in order}, BY_SHARD)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Of four shards, uneven."""
    torch.manual_seed(1)
    return [(torch.randn(n, 1, 8, 8, dtype=torch.float64), torch.randint(0, 3, (n,))) for n in (5, 2, 9, 4)]


def contributions(
    cuts: Cuts, shard: int, state: Mapping[str, Tensor], x: Tensor, y: Tensor, version: int = 0
) -> list[Contribution]:
    """Both parts of one step, made with no more of the state than each node needs, told in shared names."""
    cut = cuts.of(shard)
    sent = {
        portion: {name: state[name] for name in names}
        for portion, names in cuts.portions().items()
        if portion in (BODY, cuts.portion(cut))
    }
    parts = {name: Part(part, name, CPU, names=cuts.names(cut)) for name, part in cuts.model(cut).parts().items()}
    weights = {name: p.load(sent[BODY if name == "body" else cuts.portion(cut)]) for name, p in parts.items()}
    passes, hidden = {}, x
    for name, part in parts.items():
        passes[name] = part.forward(weights[name], hidden, seed=7, train=True)
        hidden = passes[name].output.detach()
    last = list(parts)[-1]
    loss = loss_sum(F.cross_entropy, passes[last].output, y, len(y))
    passes[last], grad = passes[last].ending_in(loss), None
    found: dict[PartName, tuple[dict[str, Tensor], dict[str, Tensor]]] = {"body": ({}, {}), "client": ({}, {})}
    for name in reversed(list(parts)):
        done = parts[name].backward(weights[name], passes[name], grad)
        grad = done.grad_input
        grads, buffers = found["body" if name == "body" else "client"]
        grads.update(done.grads)
        buffers.update(done.buffers)
    return [
        Contribution(
            cid=step_cid(RunId("3fa9c1"), shard, Version(version)),
            part=part,
            version=Version(version),
            n=float(len(y)),
            loss_sum=float(loss.detach()),
            samples=len(y),
            grads=grads,
            buffers=buffers,
            node="node",
        )
        for part, (grads, buffers) in found.items()
    ]


def window(cuts: Cuts, state: Mapping[str, Tensor], version: int = 0) -> list[Contribution]:
    return [one for shard, (x, y) in enumerate(batches()) for one in contributions(cuts, shard, state, x, y, version)]


def merged() -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in batches()]), torch.cat([y for _, y in batches()])


@pytest.mark.parametrize("tail", ["fc2", None])
@pytest.mark.parametrize("first", ["phone", "laptop"])
def test_gradients_of_clients_at_different_cuts_average_to_that_of_the_plain_model(
    tail: str | None, first: str
) -> None:
    plain = net()
    cuts = two_cuts(plain, tail, first)
    gradient = cuts.first.merged_state(average(window(cuts, cuts.first.state_dict())))
    x, y = merged()
    F.cross_entropy(plain(x), y).backward()
    expected = {name: param.grad for name, param in plain.named_parameters(remove_duplicate=False)}
    assert gradient.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad is not None
        torch.testing.assert_close(gradient[name], grad, rtol=0, atol=1e-12)


def test_a_master_steps_them_like_one_process_with_all_the_data() -> None:
    plain = net()
    cuts = two_cuts(plain)
    master = Master(copy.deepcopy(cuts.first), sgd(lr=0.3, momentum=0.9, weight_decay=1e-3))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3)
    x, y = merged()
    for version in range(4):
        master.step(window(cuts, master.state(), version), version)
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    for name, tensor in cuts.first.merged_state(master.state()).items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=0, atol=1e-12)


def test_batch_norm_on_clients_and_on_servers_is_pooled_as_one() -> None:
    plain = net(norm=True)
    ends = {"phone": "conv1", "laptop": "pool"}
    cuts = Cuts({name: split(copy.deepcopy(plain), after=end, tail="fc2") for name, end in ends.items()}, BY_SHARD)
    base = cuts.first.state_dict()
    found = window(cuts, base)
    assert {c.part for c in found if "body.norm.running_mean" in c.buffers} == {"body", "client"}
    pooled = pool_buffers(base, found, norm_rules(cuts.first))
    plain(merged()[0])  # the norm's inputs depend on no other norm, so its statistics are those of the merged batch
    for name, buffer in plain.norm.named_buffers():
        torch.testing.assert_close(pooled[f"body.norm.{name}"], buffer, rtol=1e-12, atol=0)


def test_everybody_needs_no_more_than_its_own_part() -> None:
    cuts = two_cuts(net())
    layers = {portion: {name.split(".")[1] for name in names} for portion, names in cuts.portions().items()}
    assert layers == {
        "client/phone": {"conv1", "fc2"},
        "client/laptop": {"conv1", "conv2", "twin", "fc2"},
        "body": {"conv2", "twin", "fc1"},
    }


def test_one_model_keeps_its_names_and_costs_nothing() -> None:
    model = SplitModel(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    cuts = Cuts(model)
    assert cuts.all == ("",)
    assert cuts.of(5) == cuts.fact == ""
    assert cuts.first is cuts.model("") is model
    assert cuts.names("") is None
    assert cuts.portions() == {
        "body": {"body.weight", "body.bias"},
        "client": {"head.weight", "head.bias", "tail.weight", "tail.bias"},
    }


def test_which_shard_uses_which_cut_is_told_by_the_job() -> None:
    cuts = two_cuts(net())
    assert [cuts.of(shard) for shard in range(3)] == ["phone", "laptop", "phone"]
    with pytest.raises(BadShape, match="no shard 4, only 4"):
        cuts.of(4)
    one = {"all": split(net(), after="conv1")}
    assert Cuts(one).of(4) == "all"
    assert Cuts(one, 5 * ["all"]).of(4) == "all"
    with pytest.raises(ConfigError, match=r"cut\(2\) gives 'tablet': it must give one of 'all'"):
        Cuts(one, ["all", "all", "tablet"])


def test_nodes_that_cut_elsewhere_are_told_apart() -> None:
    facts = {two_cuts(net()).fact, two_cuts(net(), tail=None).fact, two_cuts(net(), first="laptop").fact}
    assert len(facts) == 3
    assert two_cuts(net()).fact in facts
    models = {cut: two_cuts(net()).model(cut) for cut in ("phone", "laptop")}
    assert Cuts(models, BY_SHARD[::-1]).fact not in facts


def cut_twice(change: Callable[[Net], object], tail: str | None = "fc2") -> dict[str, SplitModel]:
    other = net()
    change(other)
    return {"a": split(net(), after="conv1", tail="fc2"), "b": split(other, after="pool", tail=tail)}


def untie(model: Net) -> None:
    model.twin.weight = nn.Parameter(model.conv2.weight.detach().clone())


@pytest.mark.parametrize(
    ("models", "says"),
    [
        (dict[str, SplitModel], "returned no cuts"),
        (lambda: {"A b": split(net(), after="conv1")}, "a cut is called 'A b'"),
        (lambda: cut_twice(lambda _: None, tail=None), "has a tail and the other has none"),
        (lambda: cut_twice(lambda m: m.set_submodule("fc1", nn.Linear(64, 8, bias=False))), "only one .* fc1.bias"),
        (lambda: cut_twice(lambda m: m.fc1.float()), r"fc1.weight: float64 \[8, 64\] and float32 \[8, 64\]"),
        (lambda: cut_twice(lambda m: m.fc1.requires_grad_(False)), r"fc1.weight: .* 64\], not trained"),
        (lambda: cut_twice(lambda m: nn.init.zeros_(m.fc2.bias)), "different values of fc2.bias"),
        (lambda: cut_twice(untie), "do not tie the same weights"),
        (lambda: {**cut_twice(lambda _: None), "c": SplitModel(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))},
         "cut 'c' is not made by zsfl.split"),
        (lambda: {"a": split(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), after="0"),
                  "b": split(nn.Sequential(nn.Tanh(), nn.Linear(2, 2)), after="0")},
         r"different networks: .*ReLU.* and .*Tanh"),
    ],
)  # fmt: skip
def test_cuts_of_anything_but_one_network_are_refused(models: Callable[[], dict[str, SplitModel]], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Cuts(models(), ["a"])


def test_a_function_is_needed_for_several_cuts_and_only_for_these() -> None:
    with pytest.raises(ConfigError, match="'a', 'b': state with cut="):
        Cuts(cut_twice(lambda _: None))
    with pytest.raises(ConfigError, match="leave cut out"):
        Cuts(SplitModel(nn.Linear(2, 2), nn.Linear(2, 2)), BY_SHARD)
