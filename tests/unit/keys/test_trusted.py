"""The file of trusted keys: written by hand or by command, and read again when it changes."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import pytest
import zmq
from helpers.descriptors import none_left

from zsfl.errors import ConfigError
from zsfl.ids import PublicKey, Role
from zsfl.keys.machine import machine_id
from zsfl.keys.trusted import EVERY_ROLE, MAX_TRUSTED, TRUSTED, Trusted, TrustFile, read_key, read_line, revoke, trust


def new_key() -> PublicKey:
    return PublicKey(zmq.curve_keypair()[0].decode())


OWN, ONE, OTHER = new_key(), new_key(), new_key()


def written(folder: Path, text: str) -> TrustFile:
    (folder / TRUSTED).write_text(text, encoding="utf-8")
    (folder / TRUSTED).chmod(0o600)
    return TrustFile(folder, OWN)


def test_a_line_is_key_name_and_roles() -> None:
    assert read_line(f"{ONE} gpu client,split-server") == Trusted(
        key=ONE, name="gpu", roles=frozenset({Role.CLIENT, Role.SPLIT_SERVER})
    )
    assert read_line(f"  {ONE}\tgpu ") == Trusted(key=ONE, name="gpu", roles=EVERY_ROLE)
    assert read_line(ONE) == Trusted(key=ONE, name=machine_id(ONE), roles=EVERY_ROLE)
    for nothing in ("", "   ", "# a comment", f"#{ONE} gpu"):
        assert read_line(nothing) is None
    for entry in (Trusted(key=ONE, name="a.b-c_d"), Trusted(key=ONE, name="x", roles=frozenset({Role.CLIENT}))):
        assert read_line(entry.line()) == entry


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (f"{ONE[:-1]} gpu", "is no key"),
        ("~" * 40, "is no key"),
        ("%" * 40, "is no key"),  # in the alphabet, but above 2**32
        (f"{ONE} ../gpu", "is no name"),
        (f"{ONE} {machine_id(OTHER)}", "is no name but the id of a machine, and not of the one with this key"),
        (f"{ONE} {machine_id(OTHER).lower().replace('-', '')}", "is no name but the id of a machine"),
        (f"{ONE} gpu president", "are no roles"),
        (f"{ONE} gpu client split-server", "no blanks"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(line: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        read_line(line)


def test_no_key_reads_like_a_comment() -> None:
    with pytest.raises(ValueError, match="is no key"):
        read_key("#" + "0" * 39)


def test_the_machine_itself_is_always_trusted_and_nobody_else_without_a_file(tmp_path: Path) -> None:
    file = TrustFile(tmp_path, OWN)
    assert file.roles_of(OWN) == EVERY_ROLE
    assert file.roles_of(ONE) == frozenset() == file.roles_of("")
    assert list(written(tmp_path, f"{OWN} me client\n").known) == [OWN]
    assert TrustFile(tmp_path, OWN).roles_of(OWN) == EVERY_ROLE


def test_lines_that_make_no_sense_trust_nobody_and_are_told_of_once(tmp_path: Path) -> None:
    notes: list[str] = []
    (tmp_path / TRUSTED).write_text(f"# hello\nnonsense\n{ONE} gpu\n{OTHER} b role\n", encoding="utf-8")
    (tmp_path / TRUSTED).chmod(0o600)
    file = TrustFile(tmp_path, OWN, notes.append)
    assert set(file.known) == {OWN, ONE}
    os.utime(tmp_path / TRUSTED, ns=(1, 1))
    assert not file.refresh()
    assert [note.split(" of ")[0] for note in notes] == ["line 2", "line 4"]


def test_it_is_read_again_when_it_has_changed(tmp_path: Path) -> None:
    file = TrustFile(tmp_path, OWN)
    assert not file.refresh()
    trust(tmp_path, Trusted(key=ONE, name="one"))
    assert ONE not in file.known
    assert file.refresh()
    assert ONE in file.known
    assert not file.refresh()
    trust(tmp_path, Trusted(key=ONE, name="one", roles=frozenset({Role.CLIENT})))
    assert file.refresh()
    assert file.roles_of(ONE) == {Role.CLIENT}
    (tmp_path / TRUSTED).unlink()
    assert file.refresh()
    assert set(file.known) == {OWN}


def test_a_file_that_others_may_write_to_trusts_nobody(tmp_path: Path) -> None:
    notes: list[str] = []
    trust(tmp_path, Trusted(key=ONE, name="one"))
    file = TrustFile(tmp_path, OWN, notes.append)
    (tmp_path / TRUSTED).chmod(0o660)
    assert file.refresh()
    assert set(file.known) == {OWN}
    assert len(notes) == 1
    assert "chmod 600" in notes[0]


@pytest.mark.parametrize("trouble", ["no descriptor", "no disk", "no look"])
def test_while_it_cannot_be_read_those_are_trusted_that_were_and_it_is_looked_at_again(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    trust(tmp_path, Trusted(key=ONE, name="one"))
    file = TrustFile(tmp_path, OWN, notes.append)
    trust(tmp_path, Trusted(key=OTHER, name="other"))

    def fails(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched, none_left() if trouble == "no descriptor" else nullcontext():
        if trouble == "no disk":
            patched.setattr(Path, "read_text", fails)
        if trouble == "no look":
            patched.setattr(os, "stat", fails)
        for _ in range(3):
            assert not file.refresh()
        assert set(file.known) == {OWN, ONE}
    assert [note.split(": ")[1].split(";")[0] for note in notes] == [
        "this process may open no more files and connections" if trouble == "no descriptor" else "Input/output error"
    ]
    assert file.refresh()
    assert set(file.known) == {OWN, ONE, OTHER}
    revoke(tmp_path, "one")
    assert file.refresh()
    assert set(file.known) == {OWN, OTHER}


def test_commands_leave_other_lines_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    trust(folder, Trusted(key=ONE, name="one"))
    path = folder / TRUSTED
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text(f"# mine\n\nnonsense\n{ONE} one # client\n{OTHER} other\n", encoding="utf-8")
    path.chmod(0o600)
    trust(folder, Trusted(key=OTHER, name="other", roles=frozenset({Role.CLIENT})))
    assert path.read_text(encoding="utf-8").splitlines()[:3] == ["# mine", "", "nonsense"]
    assert path.read_text(encoding="utf-8").splitlines()[-1] == f"{OTHER} other client"
    assert revoke(folder, machine_id(OTHER).lower())[0].key == OTHER
    assert path.read_text(encoding="utf-8").splitlines() == ["# mine", "", "nonsense", f"{ONE} one # client"]


def test_a_key_is_revoked_by_itself_its_name_or_its_id(tmp_path: Path) -> None:
    for which in (ONE, "one", machine_id(ONE)):
        trust(tmp_path, Trusted(key=ONE, name="one"))
        trust(tmp_path, Trusted(key=OTHER, name="other"))
        assert [entry.name for entry in revoke(tmp_path, which)] == ["one"]
        assert set(TrustFile(tmp_path, OWN).known) == {OWN, OTHER}
        with pytest.raises(ConfigError, match="no key, name or machine id"):
            revoke(tmp_path, which)
    mistyped = ("B" if machine_id(OTHER)[0] != "B" else "C") + machine_id(OTHER)[1:]
    with pytest.raises(ConfigError, match="mistyped"):
        revoke(tmp_path, mistyped)


def test_of_two_keys_with_one_name_the_second_is_refused_or_gets_a_number(tmp_path: Path) -> None:
    trust(tmp_path, Trusted(key=ONE, name="gpu"))
    with pytest.raises(ConfigError, match="another key named gpu"):
        trust(tmp_path, Trusted(key=OTHER, name="gpu"))
    assert trust(tmp_path, Trusted(key=OTHER, name="gpu"), rename=True).name == "gpu-2"
    assert trust(tmp_path, Trusted(key=OTHER, name="gpu"), rename=True).name == "gpu-2"
    assert {entry.name for entry in TrustFile(tmp_path, OWN).known.values()} == {"this-machine", "gpu", "gpu-2"}


@pytest.fixture
def linked(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of keys in which `trusted` is a link, and where that points, which is not there yet."""
    folder, real = tmp_path / "keys", tmp_path / "dotfiles" / "zsfl-trusted"
    folder.mkdir(mode=0o700)
    real.parent.mkdir(mode=0o755)
    (folder / TRUSTED).symlink_to("../dotfiles/zsfl-trusted")
    return folder, real


def test_a_link_stays_one_and_what_it_points_to_is_changed(linked: tuple[Path, Path]) -> None:
    folder, real = linked
    file = TrustFile(folder, OWN)
    trust(folder, Trusted(key=ONE, name="one"))
    assert stat.S_IMODE(real.stat().st_mode) == 0o600
    real.chmod(0o644)
    trust(folder, Trusted(key=OTHER, name="other"))
    assert file.refresh()
    assert set(file.known) == {OWN, ONE, OTHER}
    revoke(folder, "one")
    assert (folder / TRUSTED).is_symlink()
    assert [path.name for path in real.parent.iterdir()] == [real.name]
    assert real.read_text(encoding="utf-8").splitlines()[1:] == [f"{OTHER} other"]
    assert stat.S_IMODE(real.stat().st_mode) == 0o644
    real.with_name("new").write_text(f"{ONE} one\n", encoding="utf-8")
    (folder / TRUSTED).unlink()
    (folder / TRUSTED).symlink_to(real.with_name("new"))
    assert file.refresh()
    assert set(file.known) == {OWN, ONE}


@pytest.mark.parametrize(("what", "mode"), [("file", 0o664), ("folder", 0o775)])
def test_where_others_may_change_what_it_points_to_nobody_is_trusted(
    linked: tuple[Path, Path], what: str, mode: int
) -> None:
    folder, real = linked
    trust(folder, Trusted(key=ONE, name="one"))
    notes: list[str] = []
    file, before = TrustFile(folder, OWN, notes.append), real.read_text(encoding="utf-8")
    (real if what == "file" else real.parent).chmod(mode)
    assert file.refresh()
    assert set(file.known) == {OWN}
    fix = f"chmod 600 {real}" if what == "file" else f"chmod go-w {real.parent}"
    assert fix in notes[0]
    with pytest.raises(ConfigError, match=fix):
        trust(folder, Trusted(key=OTHER, name="other"))
    assert real.read_text(encoding="utf-8") == before


def test_a_link_that_leads_nowhere_is_said(tmp_path: Path) -> None:
    for target in ("gone/trusted", TRUSTED):
        (tmp_path / TRUSTED).symlink_to(target)
        assert set(TrustFile(tmp_path, OWN).known) == {OWN}
        with pytest.raises(ConfigError, match=f"cannot change {tmp_path / TRUSTED}"):
            trust(tmp_path, Trusted(key=ONE, name="one"))
        assert (tmp_path / TRUSTED).is_symlink()
        (tmp_path / TRUSTED).unlink()


def test_nobody_is_added_where_no_line_is_read_any_more(tmp_path: Path) -> None:
    file = written(tmp_path, "#\n" * (MAX_TRUSTED - 1))
    trust(tmp_path, Trusted(key=ONE, name="one"))
    trust(tmp_path, Trusted(key=ONE, name="again"))
    assert file.refresh()
    assert ONE in file.known
    with pytest.raises(ConfigError, match="has as many lines as are read"):
        trust(tmp_path, Trusted(key=OTHER, name="other"))


def test_nobody_is_trusted_by_the_id_of_another_machine(tmp_path: Path) -> None:
    """Who revokes that id would else let go of the wrong one."""
    trust(tmp_path, Trusted(key=ONE, name="gpu"))
    with pytest.raises(ConfigError, match=r"cannot trust this machine: .* is no name but the id of a machine"):
        trust(tmp_path, Trusted(key=OTHER, name=machine_id(ONE)))
    assert [entry.name for entry in revoke(tmp_path, machine_id(ONE))] == ["gpu"]
