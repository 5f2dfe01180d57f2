"""An audit finds what does not add up, and says nothing of what does."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.exact import Case, in_process

from zsfl.aggregator import audit as audits
from zsfl.aggregator.audit import audit, replay_versions
from zsfl.aggregator.commit import Record as CommitRecord
from zsfl.aggregator.journal import Kept
from zsfl.aggregator.pages import print_audit
from zsfl.aggregator.progress import Place, checkpoints, place_of
from zsfl.aggregator.run_folder import CHECKPOINT, JOURNAL
from zsfl.cli import main
from zsfl.errors import ConfigError, StorageError
from zsfl.learning.averaging import Contribution

CASE = Case(optimizer="adam", sizes=(13, 7), rounds=3)
VERSIONS = 9
Record = dict[str, Any]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that went well."""
    return asyncio.run(in_process(CASE, tmp_path_factory.mktemp("sound"), run="mine")).folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(sound, tmp_path / "mine"))


def rewritten(folder: Path, change: Callable[[list[Record]], object], *, chained: bool = True) -> None:
    """Change the records of a ledger, and chain them anew, as somebody would who knows how."""
    path = folder / "ledger.jsonl"
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    change(records)
    before, lines = "", list[str]()
    for record in records:
        if chained:
            record["predecessor"] = before
        lines.append(json.dumps(record, separators=(",", ":")))
        before = hashlib.sha256(lines[-1].encode()).hexdigest()
    path.write_text("".join(f"{line}\n" for line in lines))


def test_a_sound_run_has_no_faults(sound: Path) -> None:
    found = audit(sound)
    assert found.faults == []
    assert (found.versions, found.verified, found.dropped, found.pending) == (VERSIONS, VERSIONS, 0, 0)
    assert (found.counted, found.samples) == (3 * 5, 3 * 20)


def test_what_a_run_in_progress_drops_meanwhile_is_no_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    window_of = audits.window_of

    def dropping(record: CommitRecord, kept: Kept) -> Sequence[Contribution]:
        if record.version == 2:
            *old, _ = checkpoints(folder / CHECKPOINT)
            for path in old:
                shutil.rmtree(path)
            for path in (folder / JOURNAL).iterdir():
                path.unlink()
        return window_of(record, kept)

    monkeypatch.setattr(audits, "window_of", dropping)
    found = audit(folder)
    assert (found.faults, found.verified) == ([], 1)


def test_checkpoints_are_not_looked_at_again_for_each_version_that_is_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *old, newest = checkpoints(folder / CHECKPOINT)
    for path in (*old, folder / JOURNAL):
        shutil.rmtree(path)
    looked: list[Path] = []

    def seen(path: Path) -> Place:
        looked.append(path)
        return place_of(path)

    monkeypatch.setattr(audits, "place_of", seen)
    found = audit(folder)
    assert (found.faults, found.versions, found.verified) == ([], VERSIONS, 0)
    assert looked == [newest]


@pytest.mark.parametrize("versions", [(1, 9), (4, 4), (5, 8)])
def test_versions_are_made_again_bit_for_bit(sound: Path, versions: tuple[int, int]) -> None:
    first, last = versions
    assert list(replay_versions(sound, CASE.job(), first, last)) == list(range(first, last + 1))


def test_another_job_makes_other_weights(sound: Path) -> None:
    other = replace(CASE.job(), optimizer=replace(CASE.job().optimizer, clip_value=1e-6))
    with pytest.raises(StorageError, match="version 4 cannot be made again: it comes out with other weights"):
        list(replay_versions(sound, other, 5, 6))


def _twice(records: list[Record]) -> None:
    records[4]["counted"].append(records[3]["counted"][0])


def _dropped_too(records: list[Record]) -> None:
    records[5]["dropped"][records[2]["counted"][0]] = "came too late"


def _too_early(records: list[Record]) -> None:
    records[0]["counted"] = records[2]["counted"]
    records[2]["counted"] = []


def _other_samples(records: list[Record]) -> None:
    records[6]["samples"] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_twice, "was counted in version 4, and counted in version 5"),
        (_dropped_too, "was counted in version 3, and dropped in version 6"),
        (_too_early, "was counted in version 1, before it can have been made"),
        (_other_samples, "version 7 counts 11 samples, its contributions have others"),
        (lambda records: records.pop(3), "version 4 has no record of its own"),
        (lambda records: records.pop(), "round-000003 is not of version 9 as the ledger has it"),
    ],
)
def test_records_that_do_not_add_up_are_found(
    change: Callable[[list[Record]], object], message: str, folder: Path
) -> None:
    rewritten(folder, change)
    assert any(message in fault for fault in audit(folder).faults)


def test_a_record_that_was_changed_breaks_the_chain(folder: Path) -> None:
    rewritten(folder, lambda records: records[4]["dropped"].update({}) or records[4].update(n=1.0), chained=False)
    assert any("version 6 does not follow the one before it" in fault for fault in audit(folder).faults)


@pytest.mark.parametrize("line", [b"{}\n", b'{"\xb0": 1}\n', b"\xff\n"])
def test_a_line_that_is_no_record_is_told_by_its_place(line: bytes, folder: Path) -> None:
    with (folder / "ledger.jsonl").open("ab") as file:
        file.write(line)
    assert any("line 10 of" in fault for fault in audit(folder).faults)


def test_contributions_that_were_altered_are_found_and_those_that_a_resume_would_miss(folder: Path) -> None:
    path = folder / "journal" / "v000000000004.spills"
    altered = bytearray(path.read_bytes())
    altered[-1] ^= 1
    path.write_bytes(altered)
    assert any("version 5" in fault and "checksum" in fault for fault in audit(folder).faults)
    path.unlink()
    assert any("version 5: the" in fault and "is not kept any more" in fault for fault in audit(folder).faults)
    for round_ in (0, 1):
        shutil.rmtree(folder / "checkpoint" / f"round-{round_:06d}")
    found = audit(folder)
    assert (found.faults, found.verified) == ([], VERSIONS - 1), "nobody needs it to go on"
    shutil.rmtree(folder / "checkpoint" / "round-000002")
    shutil.rmtree(folder / "checkpoint" / "round-000003")
    assert any("no checkpoint" in fault for fault in audit(folder).faults)


def test_what_is_gone_cannot_be_made_again(folder: Path) -> None:
    (folder / "journal" / "v000000000004.spills").unlink()
    with pytest.raises(StorageError, match=r"version 5 cannot be made again: .* is not kept any more"):
        list(replay_versions(folder, CASE.job(), 5, 5))


def test_a_checkpoint_of_other_weights_is_found(folder: Path) -> None:
    checkpoint = folder / "checkpoint"
    shutil.copy(checkpoint / "round-000001" / "master.safetensors", checkpoint / "round-000002" / "master.safetensors")
    assert any("round-000002 is not of version 6" in fault for fault in audit(folder).faults)


def test_spills_that_nobody_settled_are_pending(folder: Path) -> None:
    kept = folder.parent / "spills" / "mine" / "server"
    kept.mkdir(parents=True)
    spilled = (folder / "journal" / "v000000000008.spills").read_bytes()
    (kept / "00000001.spills").write_bytes(spilled)
    assert audit(folder).pending == 0, "what is counted and not released yet is settled"
    rewritten(folder, lambda records: records.pop())
    shutil.rmtree(folder / "checkpoint" / "round-000003")
    found = audit(folder)
    assert (found.faults, found.pending) == ([], 1)


@pytest.mark.parametrize("versions", [(0, 3), (3, 2), (9, 10)])
def test_versions_that_there_are_not_are_refused(sound: Path, versions: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="the ledger has 1 to 9"):
        list(replay_versions(sound, CASE.job(), *versions))


def test_without_an_earlier_checkpoint_it_is_said_how_to_keep_more(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoint" / "round-000000")
    with pytest.raises(ConfigError, match=r"no checkpoint from before version 2 is kept: .*--keep-mib"):
        list(replay_versions(folder, CASE.job(), 2, 2))


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_says_that_all_is_well(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = CASE.job_file(tmp_path)
    assert main(["audit", str(sound), "--replay", "2..9", "--job", str(job)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{sound}: 9 versions in one unbroken chain, 15 steps of 60 samples counted, 0 dropped, 0 pending",
        "contributions kept whole for 9 versions",
        "versions 2 to 9 made again: the same weights, bit for bit",
        "all is well",
    ]


def test_files_of_others_are_none_of_its_business(folder: Path) -> None:
    (folder.parent / "spills" / "x" / "y").mkdir(parents=True)
    (folder.parent / "spills" / "x" / "y" / "foo.safetensors").write_bytes(b"")
    (folder / "checkpoint" / "round-000001.bak").mkdir()
    assert audit(folder).faults == []


def test_a_record_that_names_what_is_no_step_is_a_fault(folder: Path) -> None:
    rewritten(folder, lambda records: records[2]["counted"].append("nonsense"))
    assert any("names what is no step" in fault for fault in audit(folder).faults)


def test_the_command_says_what_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewritten(folder, _twice)
    assert print_audit(folder, None, None) == 1
    said = capsys.readouterr().out
    assert "WRONG: " in said
    assert said.endswith("wrong\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--replay", "x"], "expected one version or two"),
        (["--replay", "3"], "add --job JOB"),
        (["--replay", "1..2", "--job", "nowhere.py"], "nowhere.py"),
    ],
)
def test_flags_that_make_no_sense_are_told(
    flags: list[str], message: str, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(sound), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_run_is_named_as_elsewhere_and_what_is_none_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.parent / "logs").mkdir()
    runs = ("--runs", str(folder.parent))
    for named in ([], ["mine"], [str(folder)]):
        assert main(["audit", *named, *runs]) == 0
        assert capsys.readouterr().out.startswith(f"{folder}: ")
    assert main(["audit", "logs", *runs]) == 2
    assert capsys.readouterr().err == f"zsfl: there is no run logs: {folder.parent} has mine\n"


def test_which_versions_are_without_whom_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def leave(records: list[Record]) -> None:
        records[7]["without"], records[8]["without"] = [1, 3], [0, 1, 3]

    rewritten(folder, leave)
    print_audit(folder, None, None)
    said = capsys.readouterr().out
    assert "without shard 0 in 1 of 9 versions, as nobody was there who holds it\n" in said
    assert "without shards 1, 3 in 2 of 9 versions, as nobody was there who holds them\n" in said


def test_an_audit_of_a_run_in_progress_changes_nothing(folder: Path) -> None:
    def all_bytes() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    torn = folder / "journal" / "v000000000009.spills"
    torn.write_bytes((folder / "journal" / "v000000000008.spills").read_bytes()[:-5])
    before = all_bytes()
    assert audit(folder).faults == []
    assert all_bytes() == before
