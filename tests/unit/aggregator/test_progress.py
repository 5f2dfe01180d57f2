"""What a resumed run goes on from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exact import Case
from safetensors.torch import load_file

from zsfl.aggregator.journal import Journal
from zsfl.aggregator.progress import Place, Progress
from zsfl.aggregator.run_folder import RunFolder
from zsfl.errors import ConfigError, StorageError
from zsfl.ids import Version
from zsfl.learning.master import Master
from zsfl.learning.model import SplitModel

CASE = Case()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder.create(tmp_path, "mine", resume=False) as folder:
        yield folder


def progress(folder: RunFolder, **changes: Any) -> tuple[Progress, SplitModel, Master]:
    job = replace(CASE, **changes).job()
    cuts = job.build_cuts()
    master = Master(cuts.first, job.optimizer)
    return Progress(folder, job, cuts, master, Journal(folder.journal_path)), cuts.first, master


def place(kept: Progress, round_: int) -> Place:
    return Place(
        version=Version(10 * round_),
        round=round_,
        facts=kept.facts,
        samples={0: 13, 3: 4},
        memory={"pace": {"speeds": {"0": 1.5}}},
        untested=None,
        commit=f"digest-{round_}",
    )


def test_the_newest_checkpoint_is_restored_weights_and_all(folder: RunFolder) -> None:
    kept, model, master = progress(folder)
    kept.save(place(kept, 1))
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    kept.save(place(kept, 2))
    other, _, restored = progress(folder)
    assert restored.digest() != master.digest()
    assert other.restore() == place(kept, 2)
    assert restored.digest() == master.digest()
    assert not (folder.checkpoint_path / "partial").exists()


def test_a_round_that_is_made_again_replaces_its_checkpoint(folder: RunFolder) -> None:
    kept, *_ = progress(folder)
    kept.save(place(kept, 1))
    (folder.checkpoint_path / "partial").mkdir()  # as a crash leaves it
    again = place(kept, 1)
    kept.save(again)
    assert kept.restore() == again


def test_checkpoints_are_kept_until_a_later_one_is_good_and_bad_ones_go(folder: RunFolder) -> None:
    kept, *_ = progress(folder)
    for round_ in (1, 2, 10):
        kept.save(place(kept, round_))
    kept.keep_from(2, 0)
    kept.keep_to(Version(20))
    assert [path.name for path in folder.checkpoint_path.iterdir()] == ["round-000002"]
    assert kept.restore().round == 2


def test_older_checkpoints_are_kept_with_the_journal_since_as_far_as_there_is_room(folder: RunFolder) -> None:
    kept, *_ = progress(folder)
    folder.journal_path.mkdir()
    for round_ in (1, 2, 3):
        kept.save(place(kept, round_))
        for version in range(10 * round_, 10 * round_ + 10):
            (folder.journal_path / f"v{version:012d}.spills").write_bytes(bytes(1000))
    size = sum(path.stat().st_size for path in (folder.checkpoint_path / "round-000001").iterdir())

    def left(room_bytes: int) -> tuple[list[str], int]:
        kept.keep_from(3, room_bytes)
        names = sorted(path.name[-1:] for path in folder.checkpoint_path.iterdir())
        return names, min(Journal(folder.journal_path).sizes())

    assert left(2 * size + 20_000) == (["1", "2", "3"], 10)
    assert left(2 * size + 19_999) == (["2", "3"], 20)
    assert left(0) == (["3"], 30)


def test_another_job_is_not_resumed_and_what_differs_is_said(folder: RunFolder) -> None:
    kept, *_ = progress(folder)
    kept.save(place(kept, 1))
    other, *_ = progress(folder, batch_size=7, rounds=99, mode="async")
    with pytest.raises(ConfigError, match=r"batch_size was 5 and is 7; mode was Exact.* and is Async"):
        other.restore()
    same, *_ = progress(folder, rounds=99)
    assert same.restore().round == 1


def test_without_a_checkpoint_or_with_a_broken_one_it_is_said_what_to_do(folder: RunFolder) -> None:
    kept, *_ = progress(folder)
    with pytest.raises(ConfigError, match=r"there is no checkpoint .* start it anew"):
        kept.restore()
    kept.save(place(kept, 1))
    (folder.checkpoint_path / "round-000001" / "place.json").write_text("{}")
    with pytest.raises(StorageError, match=r"place\.json cannot be read: .*remove that folder, or start anew"):
        kept.restore()


def test_the_best_model_lies_beside_the_last(folder: RunFolder) -> None:
    kept, _, master = progress(folder)
    kept.keep_model(master.state())
    kept.keep_best({name: tensor + 1 for name, tensor in master.state().items()})
    last, best = (load_file(folder.path / f"{name}.safetensors") for name in ("model", "best"))
    assert last.keys() == best.keys() != set()
    assert all(torch.equal(best[name], last[name] + 1) for name in last)
