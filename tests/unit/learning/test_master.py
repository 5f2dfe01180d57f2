from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from zsfl.errors import ConfigError, RunFailed, StorageError
from zsfl.ids import Cid, Version
from zsfl.learning.averaging import Contribution
from zsfl.learning.master import Master, state_digest
from zsfl.learning.model import SplitModel
from zsfl.learning.optim import OptimizerSpec, adam, adamw, optimizer, sgd, yogi
from zsfl.learning.schedules import cosine

SPECS = [
    sgd(0.1),
    sgd(0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
    adam(0.01),
    adamw(0.01, amsgrad=True),
    optimizer(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    optimizer(torch.optim.Adagrad, lr=0.1, lr_decay=0.1),
    optimizer(torch.optim.NAdam, lr=0.01),
    optimizer(torch.optim.Rprop, lr=0.01),
    optimizer(torch.optim.ASGD, lr=0.01),
]


def model(seed: int = 0, dtype: torch.dtype = torch.float64, norm: bool = False) -> SplitModel:
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5) if norm else nn.Tanh())
    return SplitModel(head=nn.Linear(4, 5), body=body, tail=nn.Linear(5, 3)).to(dtype)


def batches(seed: int, sizes: Sequence[int] = (3, 8, 2)) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    return [(torch.randn(n, 4).double(), torch.randint(0, 3, (n,))) for n in sizes]


def run(net: nn.Module, x: Tensor) -> Tensor:
    for part in ("head", "body", "tail"):
        x = getattr(net, part)(x)
    return x


def contributions(state: dict[str, Tensor], data: Sequence[tuple[Tensor, Tensor]]) -> list[Contribution]:
    """Both parts' contributions of one step of each batch, from plain autograd."""
    made: list[Contribution] = []
    for shard, (x, y) in enumerate(data):
        net = model(norm="body.1.running_mean" in state, dtype=state["head.weight"].dtype)
        net.load_state_dict(state)
        names, params = zip(*net.named_parameters(), strict=True)
        loss = F.cross_entropy(run(net, x), y, reduction="sum")
        grads = dict(zip(names, torch.autograd.grad(loss, params), strict=True))
        buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
        if buffers:
            buffers["body.1.num_values"] = torch.tensor(len(x))
        for part in ("body", "client"):
            own = {name: grad for name, grad in grads.items() if name.startswith("body.") == (part == "body")}
            made.append(
                Contribution(
                    cid=Cid(f"step-{shard:05d}"),
                    part=cast(Literal["body", "client"], part),
                    version=Version(0),
                    n=len(x),
                    loss_sum=loss.item(),
                    samples=len(x),
                    grads=own,
                    buffers=buffers if part == "body" else {},
                    node=f"{part}-node",
                )
            )
    return made


def train(master: Master, steps: range) -> None:
    for step in steps:
        master.step(contributions(master.state(), batches(step)), version=step)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_equals_one_process_on_the_union(spec: OptimizerSpec) -> None:
    master = Master(model(), spec)
    train(master, range(6))
    net = model()
    reference = cast(Any, spec.factory)(net.parameters(), **spec.options)
    for step in range(6):
        x, y = (torch.cat(column) for column in zip(*batches(step), strict=True))
        reference.zero_grad()
        F.cross_entropy(run(net, x), y).backward()
        reference.step()
    torch.testing.assert_close(master.state(), dict(net.state_dict()), rtol=0, atol=1e-12)


def test_doubling_the_clients_changes_nothing() -> None:
    once, twice = Master(model(), adam(0.01)), Master(model(), adam(0.01))
    for step in range(5):
        once.step(contributions(once.state(), batches(step)))
        twice.step(contributions(twice.state(), batches(step) * 2))
    torch.testing.assert_close(once.state(), twice.state(), rtol=0, atol=1e-12)


def test_order_of_arrival_changes_no_bit() -> None:
    forward, backward = Master(model(), sgd(0.1)), Master(model(), sgd(0.1))
    made = contributions(forward.state(), batches(0))
    forward.step(made)
    backward.step(made[::-1])
    assert forward.digest() == backward.digest() != Master(model(), sgd(0.1)).digest()


def test_batch_norm_statistics_are_pooled() -> None:
    master = Master(model(norm=True), sgd(0.1))
    before = master.state()
    data = batches(0, (3, 8, 2))
    master.step(contributions(before, data))
    norm = cast(nn.Module, model(norm=True).body)[1]  # pyright: ignore[reportIndexIssue]
    hidden = [run_to_norm(before, x) for x, _ in data]
    norm(torch.cat(hidden))
    after = master.state()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(after[f"body.1.{name}"], getattr(norm, name), rtol=1e-12, atol=1e-12)


def run_to_norm(state: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = F.linear(x, state["head.weight"], state["head.bias"])
    return F.linear(hidden, state["body.0.weight"], state["body.0.bias"])


def test_frozen_parts_stay_and_state_is_a_copy() -> None:
    frozen = model()
    frozen.head.requires_grad_(False)
    master = Master(frozen, sgd(0.1, weight_decay=0.1))
    before = master.state()
    kept = {name: tensor.clone() for name, tensor in before.items()}
    made = [c for c in contributions(before, batches(0)) if c.part == "body"]
    master.step(made)
    after = master.state()
    assert {name for name in kept if not torch.equal(kept[name], after[name])} == {
        "body.0.weight",
        "body.0.bias",
    }
    torch.testing.assert_close(before, kept, rtol=0, atol=0)


def _with(made: list[Contribution], **fields: Any) -> list[Contribution]:
    return [dataclasses.replace(made[2], **fields), *made[:2], *made[3:]]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"grads": {"body.9.weight": torch.ones(1)}}, "gradient body.9.weight, which this model has not"),
        ({"grads": {"body.0.bias": torch.ones(4)}}, r"body.0.bias of shape \[4\] instead of \[5\]"),
        ({"buffers": {"body.0.weight": torch.ones(5, 5)}}, "buffer body.0.weight, which this model has not"),
        ({"grads": {"body.0.bias": torch.full((5,), torch.nan)}}, "is not finite in body.0.bias"),
        ({"grads": {"body.0.bias": torch.full((5,), -torch.inf)}}, "is not finite in body.0.bias"),
        ({"n": float("nan")}, "weighs n=nan"),
        ({"n": -1.0}, "weighs n=-1.0"),
        ({"samples": 0}, "for 0 samples"),
        ({"loss_sum": float("nan")}, "has a loss of nan"),
        ({"scale": float("nan")}, "scale of nan"),
        ({"scale": -1.0}, "scale of -1.0"),
        ({"damping": float("inf")}, "damping of inf"),
        ({"damping": -0.5}, "damping of -0.5"),
    ],
)
def test_what_cannot_be_used_is_named_and_changes_nothing(fields: dict[str, Any], said: str) -> None:
    master = Master(model(), sgd(0.1, momentum=0.9))
    train(master, range(1))
    before = master.digest()
    made = contributions(master.state(), batches(1))
    with pytest.raises(RunFailed, match=rf"body contribution step-00001 of body-node .*{said}"):
        master.step(_with(made, **fields))
    assert master.digest() == before
    master.step(made)
    undisturbed = Master(model(), sgd(0.1, momentum=0.9))
    train(undisturbed, range(2))
    assert master.digest() == undisturbed.digest()


@pytest.mark.parametrize("fields", [{"n": 5.0}, {"samples": 5}])
def test_both_parts_of_a_step_are_of_one_batch(fields: dict[str, Any]) -> None:
    master = Master(model(), sgd(0.1))
    before = master.digest()
    made = contributions(master.state(), batches(1))
    for order in (made, made[::-1]):
        with pytest.raises(RunFailed, match=r"contribution step-00001 of .* they are not of one batch"):
            master.step(_with(order, **fields))
    assert master.digest() == before


def saved(master: Master, folder: Path) -> str:
    """Digest of weights, optimizer state and options."""
    master.save(folder)
    with safe_open(folder / "master.safetensors", framework="pt") as file:
        return file.metadata()["digest"]


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("spec", [sgd(0.1, momentum=0.9), adam(0.1), yogi(), optimizer(torch.optim.NAdam)], ids=str)
def test_a_step_that_overflows_names_the_tensor_and_changes_nothing(
    spec: OptimizerSpec, before: int, tmp_path: Path
) -> None:
    spec = dataclasses.replace(spec, schedule=lambda version: 1e308 if version == 99 else 1.0)
    master, undisturbed = Master(model(), spec), Master(model(), spec)
    train(master, range(before))
    made = contributions(master.state(), batches(1))
    huge = [dataclasses.replace(c, grads={n: 1e300 * g for n, g in c.grads.items()}) for c in made]
    with pytest.raises(RunFailed, match=r"the optimizer's step made .*head.weight not finite"):
        master.step(huge, version=99)
    train(undisturbed, range(before))
    assert saved(master, tmp_path) == saved(undisturbed, tmp_path)
    train(master, range(before, 4))
    train(undisturbed, range(before, 4))
    assert master.digest() == undisturbed.digest()


def test_the_optimizers_memory_does_not_overflow_unnoticed() -> None:
    master = Master(model(dtype=torch.float32), adam(0.1))
    before = master.digest()
    made = contributions(master.state(), [(x.float(), y) for x, y in batches(0)])
    huge = [dataclasses.replace(c, grads={n: torch.full_like(g, 1e30) for n, g in c.grads.items()}) for c in made]
    with pytest.raises(RunFailed, match=r"made exp_avg_sq of head.weight not finite"):
        master.step(huge)
    clipped = Master(model(dtype=torch.float32), adam(0.1, clip_norm=1.0))
    with pytest.raises(RunFailed, match="norm of the averaged gradient overflows"):
        clipped.step(huge)
    assert master.digest() == clipped.digest() == before


def test_a_schedule_that_fails_on_its_way_changes_nothing() -> None:
    master = Master(model(), sgd(0.1, schedule=lambda version: 1 / (3 - version)))
    train(master, range(3))
    before = master.digest()
    with pytest.raises(RunFailed, match="fails at version 3"):
        train(master, range(3, 4))
    assert master.digest() == before


def test_the_gradient_is_clipped_by_its_norm_over_all_parameters() -> None:
    master = Master(model(), sgd(0.5, clip_norm=0.05))
    net = model()
    for step in range(3):
        train(master, range(step, step + 1))
        x, y = (torch.cat(column) for column in zip(*batches(step), strict=True))
        grads = torch.autograd.grad(F.cross_entropy(run(net, x), y), list(net.parameters()))
        length = torch.cat([grad.flatten() for grad in grads]).norm()
        assert length > 0.05
        with torch.no_grad():
            for parameter, grad in zip(net.parameters(), grads, strict=True):
                parameter -= 0.5 * grad * 0.05 / (length + 1e-6)
    torch.testing.assert_close(master.state(), dict(net.state_dict()), rtol=0, atol=1e-12)


def test_counted_twice_empty_or_overflowing() -> None:
    master = Master(model(dtype=torch.float32), sgd(0.1))
    made = contributions(master.state(), [(x.float(), y) for x, y in batches(0)])
    with pytest.raises(RunFailed, match="counted twice"):
        master.step([*made, made[0]])
    with pytest.raises(RunFailed, match="without contributions"):
        master.step([])
    huge = {"body.0.bias": torch.full((5,), 3e38)}
    with pytest.raises(RunFailed, match=r"overflows in body.0.bias"):
        master.step([dataclasses.replace(c, grads=huge) for c in made if c.part == "body"])


def test_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        Master(model().requires_grad_(False), sgd(0.1))


SCHEDULED = [
    adam(schedule=cosine(9, warmup=2), clip_norm=0.1),
    optimizer(torch.optim.Adam, schedule=cosine(9, warmup=2)),  # the rate is the class's own
]


@pytest.mark.parametrize("spec", [*SPECS, yogi(), *SCHEDULED], ids=str)
@pytest.mark.parametrize("stop", [0, 3])
def test_restored_it_goes_on_bit_for_bit(spec: OptimizerSpec, stop: int, tmp_path: Path) -> None:
    undisturbed = Master(model(norm=True), spec)
    train(undisturbed, range(stop))
    undisturbed.save(tmp_path / "new" / "folder")
    restored = Master(model(seed=9, norm=True), spec)
    restored.restore(tmp_path / "new" / "folder")
    assert restored.digest() == undisturbed.digest()
    train(undisturbed, range(stop, 6))
    train(restored, range(stop, 6))
    assert restored.digest() == undisturbed.digest()
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["master.safetensors"]


def test_options_that_the_job_states_now_are_the_jobs(tmp_path: Path) -> None:
    before = Master(model(), sgd(0.1, momentum=0.9))
    train(before, range(1))
    before.save(tmp_path)
    slower = Master(model(), sgd(0.0, momentum=0.9))
    slower.restore(tmp_path)
    slower.take_options()
    train(slower, range(1, 2))
    assert slower.digest() == before.digest()


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    master = Master(model(), sgd(0.1))
    master.save(tmp_path)
    old = master.digest()
    train(master, range(1))

    def disk_full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(StorageError, match="No space left"):
        master.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["master.safetensors"]
    master.restore(tmp_path)
    assert master.digest() == old


def test_restore_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"no saved weights at {tmp_path}/master.safetensors"):
        Master(model(), sgd(0.1)).restore(tmp_path)


def _flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:5],
        lambda content: b"",
        lambda content: _flip(content, len(content) - 1),
        lambda content: _flip(content, content.index(b"0.9")),
        lambda content: content.replace(b"digest", b"dagast"),
    ],
    ids=["short", "header", "empty", "tensor", "options", "metadata"],
)
def test_restore_of_a_corrupt_file_changes_nothing(damage: Any, tmp_path: Path) -> None:
    master = Master(model(), sgd(0.1, momentum=0.9))
    train(master, range(1))
    master.save(tmp_path)
    path = tmp_path / "master.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    fresh = Master(model(), sgd(0.1, momentum=0.9))
    before = fresh.digest()
    with pytest.raises(StorageError, match=f"{path} is corrupt"):
        fresh.restore(tmp_path)
    assert fresh.digest() == before


def test_restore_of_another_model_or_optimizer(tmp_path: Path) -> None:
    Master(model(), sgd(0.1)).save(tmp_path)
    for other in (model(norm=True), model(dtype=torch.float32)):
        with pytest.raises(ConfigError, match="another model"):
            Master(other, sgd(0.1)).restore(tmp_path)
    frozen = model()
    frozen.head.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"another model \(see head"):
        Master(frozen, sgd(0.1)).restore(tmp_path)
    with pytest.raises(ConfigError, match=r"made with SGD, and the job now says Adam\("):
        Master(model(), adam()).restore(tmp_path)


def test_digest_sees_names_values_and_signs_but_not_order() -> None:
    state = {"a": torch.zeros(2), "b": torch.ones(1).bfloat16()}
    same = state_digest(dict(reversed(state.items())))
    assert state_digest(state) == same
    others = [{**state, "a": -state["a"]}, {"c": state["a"], "b": state["b"]}]
    assert same not in {state_digest(other) for other in others}
