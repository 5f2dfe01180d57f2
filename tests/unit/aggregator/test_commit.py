"""Which steps made which weights, one record a version."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.ledger import ledger

from zsfl.aggregator.commit import Ledger, check_losses, record_of
from zsfl.aggregator.run_folder import RunFolder
from zsfl.errors import RunFailed, StorageError
from zsfl.ids import Cid, PartName, RunId, Version, step_cid
from zsfl.learning.averaging import Contribution


def step(
    version: int, shard: int, *, loss: float = 1.5, scale: float = 1.0, damping: float = 1.0
) -> list[Contribution]:
    """Both parts of a step of 10 samples and a weight of 2.5."""
    parts: Sequence[PartName] = ("body", "client")
    return [
        Contribution(
            cid=step_cid(RunId("3fa9c1"), shard, Version(version)),
            part=part,
            version=Version(version),
            n=2.5,
            loss_sum=loss if part == "client" else None,
            samples=10,
            grads={},
            buffers={},
            node="client-7",
            scale=scale,
            damping=damping,
        )
        for part in parts
    ]


def cids(*steps: tuple[int, int]) -> list[Cid]:
    return [step_cid(RunId("3fa9c1"), shard, Version(version)) for version, shard in steps]


def three_commits(folder: RunFolder) -> list[str]:
    """Three versions; the digest of the record of each."""
    commits, digests = Ledger(folder), list[str]()
    late = cids((0, 9))[0]
    commits.commit(record_of(Version(0), [*step(0, 0), *step(0, 1)], {}, "w1"))
    digests.append(commits.last)
    window = [*step(0, 2, damping=0.5), *step(1, 0, scale=2.0), *step(1, 1)]
    commits.commit(record_of(Version(1), window, {late: "too late"}, "w2"))
    digests.append(commits.last)
    commits.commit(record_of(Version(2), [], {}, "w2"))
    return [*digests, commits.last]


def test_a_record_says_what_was_counted_dropped_and_weighed(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "digits", resume=False) as folder:
        three_commits(folder)
        first, second, third = ledger(folder.path)
    assert (first["counted"], first["dropped"], first["weighed"]) == (cids((0, 0), (0, 1)), {}, {})
    assert (first["version"], first["samples"], first["n"], first["weights"]) == (1, 20, 5.0, "w1")
    assert second["counted"] == cids((0, 2), (1, 0), (1, 1))
    assert second["weighed"] == dict(zip(cids((0, 2), (1, 0)), ([1.0, 0.5], [2.0, 1.0]), strict=True))
    assert second["dropped"] == {cids((0, 9))[0]: "too late"}
    assert (third["counted"], third["samples"], third["weights"]) == ([], 0, "w2")


def test_each_record_names_the_one_before_by_its_bytes(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "digits", resume=False) as folder:
        digests = three_commits(folder)
        lines = folder.ledger_path.read_bytes().splitlines()
        assert [hashlib.sha256(line).hexdigest() for line in lines] == digests
        assert [record["predecessor"] for record in ledger(folder.path)] == ["", *digests[:2]]


def test_a_resumed_ledger_tells_what_follows_the_checkpoint_and_goes_on_where_it_is_cut(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "digits", resume=False) as folder:
        digests = three_commits(folder)
    with RunFolder.create(tmp_path, "digits", resume=True) as folder:
        commits = Ledger(folder)
        assert [line.digest for line in commits.resume("")] == digests
        assert [line.digest for line in commits.resume(digests[0])] == digests[1:]
        commits.cut()
        commits.commit(record_of(Version(1), step(1, 3), {}, "other"))
        assert [record["weights"] for record in ledger(folder.path)] == ["w1", "other"]
        with pytest.raises(StorageError, match="has no record of the checkpoint beside it"):
            commits.resume(digests[2])
        commits.cut_after(Version(0))
        assert (commits.last, commits.records()) == ("", [])


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "digits", resume=False) as folder:
        three_commits(folder)
        with folder.ledger_path.open("ab") as file:
            file.write(b'{"version": 1}\n')
        with pytest.raises(StorageError, match=r"line 4 of .*ledger\.jsonl is no commit record: .*predecessor"):
            Ledger(folder).records()


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1.7e308])
def test_a_loss_that_is_no_number_ends_the_run_and_names_the_step(loss: float) -> None:
    check_losses([*step(0, 0), *step(0, 1)], "here")
    with pytest.raises(
        RunFailed,
        match=rf"the loss became {re.escape(str(loss))} at round 3, in the step {cids((0, 1))[0]} of client-7",
    ):
        check_losses([*step(0, 0), *step(0, 1, loss=loss)], "round 3")
