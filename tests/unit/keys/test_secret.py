"""The key pair of a machine: made once, and nobody else's to read."""

from __future__ import annotations

import multiprocessing
import os
import stat
from pathlib import Path

import pytest
import zmq

from zsfl.errors import ConfigError
from zsfl.keys.secret import KEY_FILE, keys_folder, own_keys


def test_a_key_pair_is_made_at_first_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "keys"
    before = os.umask(0)  # whatever the umask is
    try:
        keys = own_keys(folder)
    finally:
        os.umask(before)
    assert keys.public == zmq.curve_public(keys.secret.encode()).decode()
    assert own_keys(folder) == keys
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in folder.iterdir()] == [KEY_FILE]
    assert stat.S_IMODE((folder / KEY_FILE).stat().st_mode) == 0o600
    assert keys.secret not in repr(keys)


def test_its_file_is_never_anybody_elses_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    real = os.open

    def watched(path: str, flags: int, mode: int = 0o777, **more: int) -> int:
        descriptor = real(path, flags, mode, **more)
        if KEY_FILE in str(path):
            assert flags & os.O_EXCL
            opened.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    monkeypatch.setattr(os, "open", watched)
    before = os.umask(0)
    try:
        own_keys(tmp_path / "keys")
    finally:
        os.umask(before)
    assert opened[0] == 0o600  # while it was still empty


def _public(folder: Path) -> str:
    return own_keys(folder).public


def test_of_several_who_make_one_at_once_all_get_the_same(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        made = pool.map(_public, [tmp_path / "keys"] * 8)
    assert len(set(made)) == 1
    assert [path.name for path in (tmp_path / "keys").iterdir()] == [KEY_FILE]


def test_what_is_not_safe_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    own_keys(folder)
    (folder / KEY_FILE).chmod(0o640)
    with pytest.raises(ConfigError, match=f"chmod 600 {folder / KEY_FILE}"):
        own_keys(folder)
    (folder / KEY_FILE).chmod(0o600)
    folder.chmod(0o720)
    with pytest.raises(ConfigError, match=f"chmod 700 {folder}"):
        own_keys(folder)
    folder.chmod(0o700)
    for text in ("", "# nothing but a comment\n", "no key\n", "ä\n"):
        (folder / KEY_FILE).write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match="holds no secret key: remove it"):
            own_keys(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError):
        own_keys(tmp_path / "file")


def test_no_key_looks_like_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [(b"-" + bytes([65 + number]) * 39, b"s" * 40) for number in range(3)]
    good = next(pair for pair in iter(zmq.curve_keypair, None) if not pair[0].startswith(b"-"))
    pairs = iter([*made, good])
    monkeypatch.setattr(zmq, "curve_keypair", lambda: next(pairs))
    assert not own_keys(tmp_path / "keys").public.startswith("-")
    assert list(pairs) == []


@pytest.mark.parametrize("name", ["", KEY_FILE])
def test_what_belongs_to_another_user_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "keys"
    own_keys(folder)
    if os.geteuid() == 0:
        os.chown(folder / name, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ConfigError, match="belongs to another user: chown"):
        own_keys(folder)


def test_where_keys_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert keys_folder() == tmp_path / ".config" / "zsfl"
    assert keys_folder("~/elsewhere") == tmp_path / "elsewhere"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert keys_folder() == tmp_path / "config" / "zsfl"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")  # which the standard has programs ignore
    assert keys_folder() == tmp_path / ".config" / "zsfl"
