"""The pytest plugin and its checks, as users have them: in a pytest of its own, and on histories that were altered."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.exact import Case, in_process
from helpers.jobs import write_job

import zsfl
from zsfl.testing import check_equal_weights, check_history, check_undisturbed

ROOT = Path(__file__).resolve().parents[2]
CASE = Case(sizes=(13, 7, 20))
VERSIONS = 8
Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run to which nothing happened."""
    return asyncio.run(in_process(CASE, tmp_path_factory.mktemp("straight"), run="straight")).folder


@pytest.fixture
def altered(straight: Path, tmp_path: Path) -> Path:
    """A copy of it, to be tampered with."""
    return shutil.copytree(straight, tmp_path / "altered")


def rewrite(folder: Path, change: Callable[[Records], object], *, chained: bool = True) -> None:
    """Change the records of a ledger; `chained` like somebody who knows how they name one another."""
    path = folder / "ledger.jsonl"
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    change(records)
    lines: list[bytes] = []
    for record in records:
        if chained:
            record["predecessor"] = hashlib.sha256(lines[-1]).hexdigest() if lines else ""
        lines.append(json.dumps(record, separators=(",", ":")).encode())
    path.write_bytes(b"\n".join(lines) + b"\n")


def count_again(records: Records) -> None:
    records[5]["counted"].append(records[2]["counted"][0])


def wrong_digest(version: int) -> Callable[[Records], None]:
    return lambda records: records[version - 1].update(weights="0" * 64)


@pytest.mark.parametrize(
    ("change", "chained", "message"),
    [
        (count_again, True, r"-v00000002-s\S+ was counted in version 3, and counted in version 6"),
        (wrong_digest(3), False, r"the record of version 4 does not follow the one before it: the chain is broken"),
        (wrong_digest(3), True, r"the checkpoint round-000001 is not of version 4 as the ledger has it"),
        (wrong_digest(VERSIONS), True, r"the checkpoint round-000002 is not of version 8 as the ledger has it"),
        (lambda records: records.pop(3), True, r"version 4 has no record of its own; line 4 is that of version 5"),
        (lambda records: records[6]["counted"].pop(), True, r"version 7 counts \d+ samples, its contributions have"),
        (list.clear, True, r"no version was made"),
    ],
)
def test_records_that_were_altered(
    altered: Path, change: Callable[[Records], object], chained: bool, message: str
) -> None:
    check_history(altered)
    rewrite(altered, change, chained=chained)
    with pytest.raises(AssertionError, match=rf"the history of .*altered is not clean:[\s\S]*{message}"):
        check_history(altered)


def test_a_journal_file_that_is_lost_or_altered(altered: Path) -> None:
    path = altered / "journal" / "v000000000005.spills"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AssertionError, match=r"version 6: the \w+ contribution of \S+-v00000005-\S+ cannot be read"):
        check_history(altered)
    path.unlink()
    with pytest.raises(AssertionError, match=r"version 6: the \w+ contribution of \S+-v00000005-\S+ is not kept"):
        check_history(altered)


def test_what_was_acknowledged_and_has_no_fate_is_pending(altered: Path) -> None:
    rewrite(altered, lambda records: records.pop())
    shutil.rmtree(altered / "checkpoint" / "round-000002")
    with pytest.raises(AssertionError, match=r"acknowledged, and neither counted nor dropped: \d of its steps"):
        check_history(altered)
    check_history(altered, may_be_pending=True)


def test_versions_with_other_weights_are_named(straight: Path, altered: Path) -> None:
    check_equal_weights(straight, altered)
    rewrite(altered, wrong_digest(3))
    with pytest.raises(AssertionError, match=r"differ from version 3 of 8 on, which counts the same steps"):
        check_equal_weights(straight, altered)
    with pytest.raises(AssertionError, match=r"altered and a run in which nothing happened differ from version 3"):
        check_undisturbed(altered, CASE.job())
    check_undisturbed(straight, CASE.job())
    shutil.copy(straight / "ledger.jsonl", altered)
    rewrite(altered, lambda records: records.pop())
    with pytest.raises(AssertionError, match=r"has 8 versions, .*altered has 7: the same as far as both go"):
        check_equal_weights(straight, altered)
    check_undisturbed(altered, CASE.job())


def test_what_is_no_run_and_what_cannot_be_the_same_is_said(altered: Path, tmp_path: Path) -> None:
    with pytest.raises(zsfl.ConfigError, match=r"has no ledger.jsonl: name the folder of a run"):
        check_history(tmp_path)
    with pytest.raises(AssertionError, match="has no versions to compare: is it the folder of a run"):
        check_equal_weights(altered, tmp_path)
    settings = json.loads((altered / "settings.json").read_text())
    settings["job"]["mode"] = "Async(samples=None)"
    (altered / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(zsfl.ConfigError, match="only in exact mode"):
        check_undisturbed(altered, CASE.job())


# --- in a pytest of its own -----------------------------------------------------------------------------


@pytest.fixture
def run_pytest(tmp_path: Path) -> Callable[..., str]:
    """Run pytest in `tmp_path` where zsfl is installed as pyproject.toml says; what it prints. It must pass."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = tmp_path / "site" / "zsfl-0.dist-info"
    installed.mkdir(parents=True)
    ((name, module),) = project["entry-points"]["pytest11"].items()
    (installed / "entry_points.txt").write_text(f"[pytest11]\n{name} = {module}\n")
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: zsfl\nVersion: 0\n")
    env = {**os.environ, "PYTHONPATH": f"{installed.parent}{os.pathsep}{ROOT}"}

    def run(*args: str) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", "temp", *args]
        ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    return run


OWN_TESTS = """
import asyncio, sys
import pytest
from zsfl.testing import check_history

def test_costs_nothing_until_it_is_used():
    assert not {"torch", "zmq", "numpy", "zsfl.cluster"} & set(sys.modules)

def test_in_a_coroutine(zsfl_cluster):
    async def run():
        async with zsfl_cluster("tiny.py", in_process=True) as cluster:
            assert not cluster._mdns
            return [report.round async for report in cluster.train(1)], cluster.result.folder
    rounds, folder = asyncio.run(run())
    assert rounds == [1]
    check_history(folder)
    open(folder + "/ledger.jsonl", "ab").write(b"{}\\n")
    with pytest.raises(AssertionError, match="is no commit record"):
        check_history(folder)
"""


def test_a_cluster_of_ones_own_and_nothing_loaded_before(run_pytest: Callable[..., str], tmp_path: Path) -> None:
    write_job(tmp_path)
    (tmp_path / "test_own.py").write_text(OWN_TESTS)
    assert "2 passed" in run_pytest("-p", "no:hypothesispytest", "test_own.py")
