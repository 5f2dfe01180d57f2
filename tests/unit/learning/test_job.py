from __future__ import annotations

import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsfl.errors import ConfigError
from zsfl.learning.batches import by_speed
from zsfl.learning.cuts import Cuts
from zsfl.learning.job import Job, accuracy, load_job
from zsfl.learning.model import SplitModel
from zsfl.learning.modes import Async, Elastic, Exact
from zsfl.learning.optim import adam, sgd
from zsfl.learning.robust import Krum, Median, NormBound
from zsfl.learning.schedules import cosine


def model() -> SplitModel:
    return SplitModel(head=nn.Linear(4, 3), body=nn.Sequential(nn.Linear(3, 3), nn.ReLU()), tail=nn.Linear(3, 2))


def no_data(shard: int, shards: int) -> Any:
    raise AssertionError("not asked for")


def job(**fields: Any) -> Job:
    stated = {
        "name": "trial",
        "model": model,
        "loss": F.cross_entropy,
        "data": no_data,
        "optimizer": sgd(0.1),
    }
    return Job(**(stated | fields))


@pytest.mark.parametrize("name", ["a", "digits", "mnist-20", "x" * 40])
def test_good_names(name: str) -> None:
    assert job(name=name).name == name


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": ""}, "such as 'my-job'"),
        ({"name": "My Job!"}, "such as 'my-job'"),
        ({"name": "-x-"}, "such as 'x'"),
        ({"name": "x" * 41}, "at most 40"),
        ({"model": nn.Linear(1, 1)}, "job 'trial': model is a model: use a function"),
        ({"model": None}, "model is None: use a function"),
        ({"loss": 3}, "loss is 3: use a function$"),
        ({"data": "folder"}, "data is 'folder': use a function"),
        ({"metric": 1}, "metric is 1: use a function or None"),
        ({"loss_weight": 1}, "loss_weight is 1"),
        ({"most_weight": 0}, "most_weight is 0: use a number above 0"),
        ({"most_weight": math.inf}, "most_weight is inf"),
        ({"most_weight": "much"}, "most_weight is 'much'"),
        ({"optimizer": torch.optim.SGD}, r"use zsfl.sgd\(lr=0.1\)"),
        ({"batch_size": 0}, "batch_size is 0: use a whole number from 1 up"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"rounds": 0}, "rounds is 0"),
        ({"shards": True}, "shards is True"),
        ({"seed": -1}, "seed is -1: use a whole number from 0 up"),
        ({"mode": "fast"}, "mode is 'fast': use 'exact'"),
        ({"mode": None}, "mode is 'None': use 'exact'"),
        ({"steps": 0}, "steps is 0: use a whole number from 1 to 1000"),
        ({"steps": 10**6}, "steps is 1000000"),
        ({"name": 5}, "job name 5 will not do"),
        ({"shuffle": "no"}, "shuffle is 'no': use True or False"),
        ({"codec": "zip"}, "zip"),
        ({"local_lr": "x", "steps": 2}, "local_lr is 'x'"),
        ({"evaluate_every": 0}, "evaluate_every is 0"),
        ({"stop_after": 1.5}, "stop_after is 1.5"),
        ({"batches": "even"}, r"batches is 'even': use 'proportional', 'equal' or zsfl.by_speed\(\)"),
        ({"batch_norm": "none"}, "batch_norm is 'none': use 'per-client', 'merged' or 'frozen'"),
        ({"adjust_logits": "yes"}, "adjust_logits is 'yes': use 'participants', 'client' or None"),
        ({"batch_norm": "merged", "mode": "elastic"}, "batch_norm='merged' needs mode='exact'"),
        ({"batch_norm": "merged", "mode": Async()}, "batch_norm='merged' needs mode='exact'"),
        ({"mode": "async", "steps": 2}, "mode='async' has none: state its samples instead"),
        ({"mode": "async", "batches": by_speed()}, "in mode='async' fast clients step more often already"),
        ({"local_lr": 0.1}, "local_lr is 0.1: use a rate above 0, together with steps above 1"),
        ({"local_lr": 0.0, "steps": 2}, "local_lr is 0.0"),
        ({"local_lr": float("inf"), "steps": 2}, "local_lr is inf"),
        ({"average": "median"}, r"average is 'median': use 'mean', zsfl.Median\(\)"),
        ({"norm_bound": -1.0}, "job 'trial': norm_bound is -1.0: use a norm above 0"),
        ({"norm_bound": "1"}, "norm_bound is '1'"),
        (
            {"norm_bound": 1.0, "merge": True},
            "norm_bound needs the gradient of each client by itself, which merge=True",
        ),
        ({"average": Median(), "batch_norm": "merged"}, r"average=Median\(f=1\) needs .* batch_norm='merged' does not"),
        ({"average": Median(), "mode": "async"}, "those who are quick would have most of them: use mode='elastic'"),
        ({"average": Median(), "local_lr": 0.1, "steps": 2}, "with local_lr it has one for each step"),
        ({"average": Krum(f=2)}, r"average=Krum\(f=2, m=1\) needs 7 clients, and this job has 5"),
        ({"average": Krum(m=3)}, "can take the gradients of 2 of 5 clients at most"),
    ],
)
def test_wrong_values_say_what_to_do(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        job(**fields)


def test_choices_that_go_together() -> None:
    assert job(mode="elastic", steps=3, local_lr=0.1, batches=by_speed(), adjust_logits="client").how == Elastic()
    assert job(mode=Exact(return_s=1.0), batch_norm="merged").how == Exact(return_s=1.0)
    assert job(mode="async", batches="equal", evaluate_every=5, stop_after=1).how == Async()


def test_batch_sizes_are_those_of_all_steps_of_a_round() -> None:
    assert job(steps=2).batch_sizes(10, 2) == [2, 3, 2, 3]
    assert job(steps=2, batches="equal", batch_size=4).batch_sizes(10, 2) == [4, 4, 2, 0]


def test_build_is_the_same_everywhere_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    one = job(seed=3).build().state_dict()
    assert torch.equal(torch.rand(1), expected_next)
    other, third = job(seed=3).build().state_dict(), job(seed=4).build().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["head.weight"], third["head.weight"])


def test_build_wraps_what_the_factory_does_wrong() -> None:
    def failing() -> SplitModel:
        return SplitModel(head=nn.Linear(4, "x"), body=nn.Identity())  # pyright: ignore[reportArgumentType]

    with pytest.raises(ConfigError, match=r"job 'trial': model\(\) failed: TypeError: .*line \d+"):
        job(model=failing).build()
    with pytest.raises(ConfigError, match=r"returned a Linear: return a zsfl.SplitModel"):
        job(model=lambda: nn.Linear(1, 1)).build()


def test_what_makes_a_run_other_than_expected_is_said() -> None:
    assert job(steps=2, local_lr=0.1, optimizer=sgd(lr=0.1)).warnings() == []
    assert job(mode="elastic", batches=by_speed()).warnings() == []
    assert "no two runs are equal" in job(batches=by_speed()).warnings()[0]
    for optimizer in (sgd(lr=0.2), sgd(lr=0.1, momentum=0.9), adam(lr=0.1), sgd(lr=0.1, schedule=cosine(5))):
        (said,) = job(steps=2, local_lr=0.1, optimizer=optimizer).warnings()
        assert "is not FedAvg of deltas" in said


def test_facts_are_short_words_that_differ_where_the_jobs_do() -> None:
    mine = job(batch_size=64)
    facts = mine.facts(mine.build_cuts())
    assert all(isinstance(value, str) and len(value) < 100 for value in facts.values())
    assert facts == job(rounds=99, seed=0).facts(Cuts(model()))
    theirs = job(batch_size=32, optimizer=adam(lr=0.1)).facts(Cuts(model()))
    assert {name for name in facts if facts[name] != theirs[name]} == {"batch_size", "optimizer"}
    assert facts == job(evaluate_every=3, stop_after=2).facts(Cuts(model()))
    for field, value in (("steps", 2), ("mode", Exact(return_s=1.0)), ("batch_norm", "frozen"), ("batches", "equal")):
        assert {name for name, fact in job(**{field: value}).facts(Cuts(model())).items() if fact != facts[name]} == {
            field
        }


def test_facts_name_what_keeps_bad_gradients_out_only_where_something_does() -> None:
    plain = job().facts(Cuts(model()))
    defended = job(average=Median(f=2), norm_bound=10).facts(Cuts(model()))
    assert dict(defended.items() - plain.items()) == {
        "average": "Median(f=2)",
        "norm_bound": "NormBound(norm=10, beyond='clip')",
    }
    assert defended == job(average=Median(f=2), norm_bound=NormBound(10)).facts(Cuts(model()))


def test_votes_do_not_go_with_running_statistics() -> None:
    def normed() -> SplitModel:
        return SplitModel(head=nn.Linear(4, 3), body=nn.BatchNorm1d(3), tail=nn.Linear(3, 2))

    with pytest.raises(ConfigError, match="any client could spoil the running statistics of batch norm"):
        job(model=normed, average=Median()).build()
    job(model=normed, average=Median(), batch_norm="frozen").build()
    job(model=normed, norm_bound=1.0).build()


def test_facts_see_shapes_dtypes_and_what_is_frozen_but_not_values() -> None:
    def digest(change: Any) -> str:
        changed = model()
        change(changed)
        return job().facts(Cuts(changed))["parameters"]

    same = digest(lambda m: None)
    assert digest(lambda m: m.head.weight.data.zero_()) == same
    changes = [
        lambda m: m.double(),
        lambda m: m.head.requires_grad_(False),
        lambda m: setattr(m, "tail", nn.Linear(3, 3)),
        lambda m: m.body.append(nn.BatchNorm1d(3)),
    ]
    assert len({same, *(digest(change) for change in changes)}) == 5


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (F.mse_loss, "mse_loss"),
        (functools.partial(F.cross_entropy, label_smoothing=0.1), "cross_entropy(label_smoothing=0.1)"),
        (nn.CrossEntropyLoss(), "CrossEntropyLoss()"),
    ],
)
def test_losses_have_names_without_addresses(loss: Any, name: str) -> None:
    assert job(loss=loss).facts(Cuts(model()))["loss"] == name


def test_accuracy_counts_samples() -> None:
    logits = torch.eye(3)
    assert accuracy(logits, torch.tensor([0, 1, 0])) == 2.0
    pixels = torch.stack([logits, logits])  # two samples of three classes over three places
    assert accuracy(pixels, torch.tensor([[0, 1, 2], [0, 0, 0]])) == pytest.approx(1 + 1 / 3)


@pytest.mark.parametrize(
    ("output", "target"),
    [
        (torch.zeros(4, 1), torch.zeros(4, 1)),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(4, 2), torch.zeros(3, dtype=torch.int64)),
    ],
)
def test_accuracy_of_what_are_no_classes(output: Tensor, target: Tensor) -> None:
    with pytest.raises(ConfigError, match="state metric=None"):
        accuracy(output, target)


JOB_FILE = """
from zsfl.learning.job import Job
from zsfl.learning.optim import sgd
import helper_of_trial

stated = Job(name="trial", model=helper_of_trial.model, loss=lambda o, t: o, data=print, optimizer=sgd(0.1))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "helper_of_trial.py").write_text("def model(): ...\n")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "helper_of_trial", raising=False)
    return tmp_path


@pytest.mark.parametrize("line", ["job = stated", "def job(): return stated"])
def test_load_job(folder: Path, line: str) -> None:
    before = list(sys.path)
    path = folder / "json.py"  # named like a module of Python, which stays what it is
    path.write_text(JOB_FILE + line)
    loaded = load_job(path)
    assert loaded.name == "trial"
    assert dataclasses.replace(loaded, batch_size=3).batch_size == 3
    assert sys.path == before
    assert sys.modules[loaded.loss.__module__].__file__ == str(path)
    assert "loads" in vars(sys.modules.get("json", __import__("json")))


def test_a_relative_path_starts_at_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "here.py").write_text(JOB_FILE + "job = stated")
    assert load_job(Path("here.py")).name == "trial"
    with pytest.raises(ConfigError, match=f"no job file {folder}/gone.py"):
        load_job(Path("gone.py"))
    with pytest.raises(ConfigError, match=f"{folder} is a folder"):
        load_job(Path("."))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import sys\nx = undefined_name\n", r"NameError: .*undefined_name.* \(.*broken.py, line 2\)"),
        ("x = (\n", r"SyntaxError: .* \(.*broken.py, line 1\)"),
        ("import nonexistent_module_x\n", r"ModuleNotFoundError: .*nonexistent_module_x.*line 1\)"),
        ("import sys\nsys.exit(3)\n", r"SystemExit: 3 \(.*broken.py, line 2\)"),
        (JOB_FILE.replace('"trial"', '"No Name"'), r"cannot be imported: job name 'No Name'.*line 6\)"),
        ("def job():\n    return 1 / 0\n", r"ZeroDivisionError: .*line 2\)"),
        ("\0", "cannot be imported"),
        ("x = 1\n", "has no `job`: add a line"),
        ("job = 'mnist'\n", "`job` in .*broken.py is a str: make it a zsfl.Job"),
        ("class job: ...\n", "is a type: make it a zsfl.Job"),
        ("def job():\n    return 3\n", "is a int: make it"),
    ],
)
def test_job_files_that_will_not_do(folder: Path, text: str, said: str) -> None:
    path = folder / "broken.py"
    path.write_text(text)
    before = list(sys.path)
    with pytest.raises(ConfigError, match=said):
        load_job(path)
    assert sys.path == before


def test_an_error_in_a_neighbour_names_the_neighbour(folder: Path) -> None:
    (folder / "helper_of_trial.py").write_text("\n\nraise ValueError('no')\n")
    path = folder / "broken.py"
    path.write_text(JOB_FILE)
    with pytest.raises(ConfigError, match=r"ValueError: no \(.*helper_of_trial.py, line 3\)"):
        load_job(path)


def test_long_facts_are_shortened_and_still_tell_jobs_apart() -> None:
    def facts(last: int) -> dict[str, str]:
        loss = nn.Sequential(*[nn.Identity() for _ in range(20)], nn.Linear(1, last))
        return job(loss=loss).facts(Cuts(model()))

    assert len(facts(1)["loss"]) <= 120
    assert facts(1)["loss"].startswith("Sequential(")
    assert facts(1) == facts(1) != facts(2)
