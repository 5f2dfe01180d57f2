"""Learning rates by version, clipping and Yogi, each against the same thing written out; and local steps."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsfl.errors import ConfigError
from zsfl.ids import RunId, Version, step_cid
from zsfl.learning.averaging import Contribution
from zsfl.learning.master import Master
from zsfl.learning.model import SplitModel
from zsfl.learning.optim import OptimizerSpec, adam, optimizer, sgd, yogi
from zsfl.learning.schedules import cosine, linear, step_down, warmup

RUN = RunId("abcdef")


def contribution(
    grads: dict[str, Tensor],
    *,
    shard: int = 0,
    version: int = 0,
    k: int = 0,
    n: int = 1,
    part: Literal["body", "client"] = "body",
) -> Contribution:
    return Contribution(
        cid=step_cid(RUN, shard, Version(version), k),
        part=part,
        version=Version(version),
        n=n,
        loss_sum=None,
        samples=n,
        grads=grads,
        buffers={},
        node="s",
    )


class Point(nn.Module):
    """One parameter, called body.w."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))


def descend(spec: OptimizerSpec, gradients: list[Tensor]) -> list[Tensor]:
    """Where the master is after each gradient."""
    master = Master(SplitModel(nn.Identity(), Point()), spec)
    path = []
    for version, gradient in enumerate(gradients):
        master.step([contribution({"body.w": gradient}, version=version)], version=version)
        path.append(master.state()["body.w"])
    return path


def gradients(count: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [3 * torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        (
            cosine(10, warmup=3, floor=0.1),
            lambda v: (v + 1) / 3 if v < 3 else 0.1 + 0.45 * (1 + math.cos(math.pi * min(1, (v - 3) / 7))),
        ),
        (linear(8), lambda v: max(0.0, 1 - v / 8)),
        (step_down(4, 0.5), lambda v: 0.5 ** (v // 4)),
        (warmup(5), lambda v: min(1.0, (v + 1) / 5)),
        (lambda version: 1 / (version + 1), lambda v: 1 / (v + 1)),
    ],
    ids=["cosine", "linear", "step_down", "warmup", "function"],
)
def test_the_rate_follows_the_version(schedule: Callable[[int], float], factor: Callable[[int], float]) -> None:
    w = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    for version, (at, gradient) in enumerate(
        zip(descend(sgd(0.1, schedule=schedule), gradients()), gradients(), strict=True)
    ):
        w = w - 0.1 * factor(version) * gradient
        torch.testing.assert_close(at, w, rtol=0, atol=1e-14)


def test_clipping_by_norm_and_by_value() -> None:
    w = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    for at, gradient in zip(descend(sgd(0.1, clip_norm=2.0), gradients()), gradients(), strict=True):
        w = w - 0.1 * gradient * min(1.0, 2.0 / (gradient.norm().item() + 1e-6))
        torch.testing.assert_close(at, w, rtol=0, atol=1e-12)
    w = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    for at, gradient in zip(descend(sgd(0.1, clip_value=0.5), gradients()), gradients(), strict=True):
        w = w - 0.1 * gradient.clamp(-0.5, 0.5)
        torch.testing.assert_close(at, w, rtol=0, atol=1e-14)


def test_yogi_is_that_of_the_paper() -> None:
    lr, (b1, b2), eps = 0.02, (0.8, 0.9), 1e-3
    w = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    m, v = torch.zeros_like(w), torch.full_like(w, 1e-6)
    for at, g in zip(descend(yogi(lr, (b1, b2), eps), gradients()), gradients(), strict=True):
        m = b1 * m + (1 - b1) * g
        v = v - (1 - b2) * torch.sign(v - g**2) * g**2
        w = w - lr * m / (v.sqrt() + eps)
        torch.testing.assert_close(at, w, rtol=0, atol=1e-13)


def halving(version: int) -> float:
    return 0.5**version


def test_an_optimizer_reads_the_same_on_every_node() -> None:
    assert repr(adam(0.1, clip_norm=1.0, schedule=cosine(9))).endswith(
        "lr=0.1, weight_decay=0.0, clip_norm=1.0, schedule=Cosine(versions=9, warmup=0, floor=0.0))"
    )
    assert repr(optimizer(torch.optim.SGD, lr=1, schedule=halving)) == "SGD(lr=1, schedule=halving)"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: sgd(0.1, clip_norm=0.0),
        lambda: sgd(0.1, clip_norm=math.nan),
        lambda: sgd(0.1, clip_norm="1"),
        lambda: sgd(0.1, clip_value=-1.0),
        lambda: sgd(math.nan),
        lambda: adam(math.inf),
        lambda: cosine(5, warmup=5),
        lambda: linear(5, floor=2),
        lambda: cosine(5.5),  # pyright: ignore[reportArgumentType]
        lambda: cosine(5, warmup=-1),
        lambda: linear(5, floor=math.nan),
        lambda: step_down(0),
        lambda: step_down(3, 0.0),
        lambda: step_down(3, 1.5),
        lambda: warmup(0),
        lambda: warmup("5"),  # pyright: ignore[reportArgumentType]
        lambda: sgd(0.1, schedule=5),
        lambda: sgd(0.1, schedule=lambda _: -1.0),
        lambda: sgd(0.1, schedule=lambda _: 1 / 0),
        lambda: yogi(lr=-1),
        lambda: sgd(0.1, momentun=0.9),
    ],
)
def test_wrong_values_are_refused_at_once(wrong: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        wrong()


# --- local steps --------------------------------------------------------------------------------------------


def network() -> SplitModel:
    torch.manual_seed(0)
    return SplitModel(
        nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)
    ).double()


def batch(client: int, number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * client + number)
    return torch.randn(5, 4, generator=generator, dtype=torch.float64), torch.randint(3, (5,), generator=generator)


def step_of(state: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Gradients, summed over samples, of one batch at these weights."""
    params = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    output: Tensor = torch.func.functional_call(network(), params, (data[0],))
    loss = F.cross_entropy(output, data[1], reduction="sum")
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


def local_run(lr: float, clients: int, steps: int) -> dict[str, Tensor]:
    """One version of so many local steps."""
    master = Master(network(), sgd(lr))
    made: list[Contribution] = []
    for client in range(clients):
        own = master.state()
        for k in range(steps):
            grads = step_of(own, batch(client, k))
            mine = {name: grad for name, grad in grads.items() if not name.startswith("body.")}
            made.append(contribution(mine, shard=client, k=k, n=5, part="client"))
            made.append(contribution({n: g for n, g in grads.items() if n.startswith("body.")}, shard=client, k=k, n=5))
            own |= {name: own[name] - lr * grad / 5 for name, grad in mine.items()}
    master.step(made, sequential=True)
    return master.state()


def exact_run(lr: float, clients: int, steps: int) -> dict[str, Tensor]:
    """So many versions of one step of each client, as in one process."""
    state = network().state_dict()
    for k in range(steps):
        grads = [step_of(state, batch(client, k)) for client in range(clients)]
        state = OrderedDict((name, w - lr * sum(g[name] for g in grads) / (5 * clients)) for name, w in state.items())
    return dict(state)


def gap(lr: float) -> float:
    local, exact = local_run(lr, 3, 4), exact_run(lr, 3, 4)
    return math.sqrt(sum(((local[name] - exact[name]) ** 2).sum().item() for name in exact))


def test_local_steps_are_fedavg_of_the_clients_moves() -> None:
    lr, clients, steps = 0.1, 3, 4
    first = network().state_dict()
    moved: list[dict[str, Tensor]] = []
    body = {name: torch.zeros_like(w) for name, w in first.items()}
    for client in range(clients):
        own = {name: w.clone() for name, w in first.items()}
        for k in range(steps):
            for name, grad in step_of(own, batch(client, k)).items():
                if name.startswith("body."):
                    body[name] += grad / (5 * clients)
                else:
                    own[name] = own[name] - lr * grad / 5
        moved.append(own)
    for name, w in local_run(lr, clients, steps).items():
        wanted = (
            first[name] - lr * body[name] if name.startswith("body.") else sum(own[name] for own in moved) / clients
        )
        torch.testing.assert_close(w, wanted, rtol=0, atol=1e-12)


def test_the_steps_of_a_version_are_made_in_order_of_k_and_its_buffers_pooled_once() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.BatchNorm1d(2)).double()
    master = Master(SplitModel(nn.Identity(), body), sgd(0.1, momentum=0.9))
    made = [
        contribution({"body.0.weight": torch.full((2,), 3.0**k, dtype=torch.float64)}, shard=shard, k=k, n=4)
        for k in (11, 2)
        for shard in (1, 0)
    ]
    stored = {"num_batches_tracked": torch.tensor(1), "num_values": torch.tensor(4)}
    stored |= {"running_mean": torch.ones(2).double(), "running_var": torch.ones(2).double()}
    made = [replace(one, buffers={f"body.0.{name}": tensor for name, tensor in stored.items()}) for one in made]
    master.step(made, sequential=True)
    first, second = 3.0**2 / 4, 3.0**11 / 4
    assert master.state()["body.0.weight"].tolist() == pytest.approx([1 - 0.1 * (1.9 * first + second)] * 2, abs=1e-9)
    assert master.state()["body.0.num_batches_tracked"] == 1


def test_the_gap_between_local_and_exact_steps_is_of_second_order() -> None:
    gaps = [gap(0.1 / 2**halving) for halving in range(4)]
    ratios = [wide / narrow for wide, narrow in itertools.pairwise(gaps)]
    assert all(3.5 < ratio < 4.5 for ratio in ratios), ratios
