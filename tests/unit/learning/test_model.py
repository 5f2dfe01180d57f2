from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from zsfl.learning.model import SplitModel
from zsfl.learning.split import split


def three_parts() -> SplitModel:
    return SplitModel(
        head=nn.Linear(6, 5),
        body=nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU()),
        tail=nn.Linear(4, 3),
    )


def run_lines(lines: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The model that the three lines make in a folder with `model.safetensors`."""
    assert len(lines.splitlines()) == 3
    assert "zsfl" not in lines
    monkeypatch.chdir(folder)
    names: dict[str, nn.Module] = {}
    exec(lines, names)
    return names["model"]


def test_forward_is_the_composition_and_names_follow_the_parts() -> None:
    model, x = three_parts(), torch.randn(7, 6)
    assert model.tail is not None
    assert torch.equal(model(x), model.tail(model.body(model.head(x))))
    assert list(model.parts()) == ["head", "body", "tail"]
    assert {name.split(".")[0] for name in model.state_dict()} == {"head", "body", "tail"}
    assert model.u_shaped


def test_without_a_tail_the_body_ends_the_network() -> None:
    model = SplitModel(nn.Linear(2, 3), nn.Linear(3, 1))
    assert not model.u_shaped
    assert list(model.parts()) == ["head", "body"]
    assert model(torch.randn(4, 2)).shape == (4, 1)


def test_a_direct_model_keeps_its_names() -> None:
    state = three_parts().state_dict()
    merged = three_parts().merged_state(state)
    assert merged.keys() == state.keys()
    assert all(merged[name] is state[name] for name in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_lines_load_a_direct_model(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = three_parts().to(dtype).eval()
    save_file(model.merged_state(model.state_dict()), tmp_path / "model.safetensors")
    loaded = run_lines(model.load_lines(), tmp_path, monkeypatch).eval()
    x = torch.randn(5, 6, dtype=dtype)
    assert torch.equal(loaded(x), model(x))


def test_the_lines_load_a_cut_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 3))
    model = split(original, after="0", tail="3")
    save_file(model.merged_state(model.state_dict()), tmp_path / "model.safetensors")
    loaded = run_lines(model.load_lines(), tmp_path, monkeypatch)
    x = torch.randn(5, 6)
    assert torch.equal(loaded(x), original(x))


def test_the_lines_name_a_users_class_and_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(nn.Sequential):
        pass

    model = split(Net(nn.Linear(2, 2), nn.Linear(2, 2)), after="0")
    assert "model = Net()" in model.load_lines()
    monkeypatch.setattr(Net, "__module__", "shop.nets")
    Net.__qualname__ = "Net"
    model = split(Net(nn.Linear(2, 2), nn.Linear(2, 2)), after="0")
    assert model.load_lines().splitlines()[:2] == [
        "import safetensors.torch, shop.nets",
        "model = shop.nets.Net()",
    ]


def test_parts_that_are_not_numbered_in_order_are_spelled_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    cut = split(sequence, after="0")
    model = SplitModel(cut.head, cut.body)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = run_lines(model.load_lines(), tmp_path, monkeypatch)
    x = torch.randn(5, 6)
    assert torch.equal(loaded(x), sequence(x))
