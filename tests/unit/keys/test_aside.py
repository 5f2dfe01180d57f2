"""What is written aside while it is not whole: nothing of it stays, also of those who are killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq
from helpers.waiting import HANG_S

from zsfl.ids import PublicKey
from zsfl.keys.aside import written_aside
from zsfl.keys.secret import KEY_FILE, own_keys
from zsfl.keys.trusted import TRUSTED, Trusted, trust

STOPS = """
import os, sys
from pathlib import Path

def stop(*_):
    print("written", flush=True)
    sys.stdin.read()

os.link = os.replace = os.rename = Path.replace = stop
from zsfl.ids import PublicKey
from zsfl.keys.secret import own_keys
from zsfl.keys.trusted import Trusted, trust

if sys.argv[2:]:
    trust(Path(sys.argv[1]), Trusted(key=PublicKey(sys.argv[2]), name="other"))
else:
    own_keys(Path(sys.argv[1]))
"""
"""Writes a file aside, and comes no further."""
KEY = PublicKey(zmq.curve_keypair()[0].decode())


@contextmanager
def stopped(*args: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has written its file aside, and lives."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", STOPS, *map(str, args)], stdin=pipe, stdout=pipe, text=True) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "written\n"
            yield writer
        finally:
            writer.kill()
            writer.wait(HANG_S)


def aside(folder: Path, name: str) -> list[Path]:
    return list(folder.glob(f".{name}-*"))


def test_a_secret_of_who_was_killed_is_gone_at_the_next_start_and_not_sooner(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    with stopped(folder):
        (left,) = aside(folder, KEY_FILE)
        keys = own_keys(folder)
        assert keys.secret not in left.read_text()
        assert aside(folder, KEY_FILE) == [left]  # its writer lives
    assert left.exists()
    assert own_keys(folder) == keys
    assert [path.name for path in folder.iterdir()] == [KEY_FILE]


def test_keys_that_were_trusted_by_who_was_killed_are_gone_at_the_next_write(tmp_path: Path) -> None:
    with stopped(tmp_path, KEY):
        (left,) = aside(tmp_path, TRUSTED)
    entry = trust(tmp_path, Trusted(key=KEY, name="one"))
    assert not left.exists()
    assert aside(tmp_path, TRUSTED) == []
    assert (tmp_path / TRUSTED).read_text().endswith(f"{entry.line()}\n")


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), written_aside(tmp_path / "file", "text") as path:
        path.replace(tmp_path / "gone" / "file")
    assert list(tmp_path.iterdir()) == []


def test_what_only_looks_like_it_stays(tmp_path: Path) -> None:
    others = {f".{KEY_FILE}-old", f".{KEY_FILE}-0123abcd.txt", f"{KEY_FILE}-0123abcd", ".other-0123abcd"}
    for name in others:
        (tmp_path / name).write_text("")
    (tmp_path / f".{KEY_FILE}-00000000").symlink_to("elsewhere")
    own_keys(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others, f".{KEY_FILE}-00000000", KEY_FILE}
