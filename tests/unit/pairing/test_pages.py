"""The commands about keys, as they are typed."""

from __future__ import annotations

import argparse
import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import zmq
from helpers.waiting import HANG_S
from zmq.utils import z85

from zsfl.cli import main
from zsfl.ids import PublicKey, Role
from zsfl.keys.machine import machine_id
from zsfl.keys.secret import own_keys
from zsfl.keys.tokens import MAX_TOKEN, Invitation, to_token
from zsfl.keys.trusted import EVERY_ROLE, named
from zsfl.pairing.pages import _entry


@pytest.fixture
def key() -> PublicKey:
    public = b"-"
    while public.startswith(b"-"):
        public, _ = zmq.curve_keypair()
    return PublicKey(public.decode())


def keys(folder: Path, *words: str) -> int:
    """`zsfl keys WORDS`."""
    return main(["keys", *words, "--keys", str(folder)])


def roles_of(folder: Path, which: str) -> frozenset[Role]:
    (entry,) = named(folder, which)
    return entry.roles


def test_what_one_may_be_is_changed_by_its_key_its_name_or_its_id(
    tmp_path: Path, key: PublicKey, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keys(tmp_path, "trust", key, "lab") == 0
    out = capsys.readouterr().out
    assert machine_id(key) in out
    assert "Is that the id which `zsfl keys show` says there?" in out
    for which, said, roles in (
        ("lab", ("client",), {Role.CLIENT}),
        ("lab", (), {Role.CLIENT}),
        (machine_id(key), ("client", "split-server"), {Role.CLIENT, Role.SPLIT_SERVER}),
        (key, ("aggregator,standby",), {Role.AGGREGATOR, Role.STANDBY}),
    ):
        assert keys(tmp_path, "trust", which, "lab", *said) == 0
        assert roles_of(tmp_path, "lab") == roles
    assert "Is that the id" not in capsys.readouterr().out.splitlines()[-1]


def test_what_is_neither_is_said(tmp_path: Path, key: PublicKey, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys(tmp_path, "trust", "nobody", "lab") == 2
    assert "or the name or machine id of one that is trusted" in capsys.readouterr().err
    assert keys(tmp_path, "trust", key, "lab", "gardener") == 2
    assert "'gardener' are no roles" in capsys.readouterr().err


def test_who_is_paired_again_may_be_what_it_was(tmp_path: Path, key: PublicKey) -> None:
    own_keys(tmp_path)
    said = argparse.Namespace(keys=str(tmp_path), roles=None)
    assert _entry(said)(key, "lab").roles == EVERY_ROLE
    assert keys(tmp_path, "trust", key, "lab", "client") == 0
    assert _entry(said)(key, "lab").roles == {Role.CLIENT}
    said.roles = "split-server"
    assert _entry(said)(key, "lab").roles == {Role.SPLIT_SERVER}


JOIN = [sys.executable, "-m", "zsfl", "join", "-", "--keys"]


def join(said: bytes, folder: Path) -> tuple[int, str]:
    """`zsfl join -` with this on its standard input; how it ended, and what it said of errors."""
    done = subprocess.run([*JOIN, str(folder)], input=said, capture_output=True, check=False, timeout=HANG_S)
    return done.returncode, done.stderr.decode()


@pytest.fixture
def token(tmp_path: Path) -> str:
    """One that is right, and refused at once by its own machine."""
    raw_key = z85.decode(own_keys(tmp_path).public)
    return to_token(Invitation(("127.0.0.1:1",), raw_key, bytes(16), 1 << 40))


OWN = "that token is of this machine itself"


@pytest.mark.parametrize("said", [b"", b" \n", b"\xff\n", b"A" * 3 * MAX_TOKEN])
def test_what_is_no_token_on_standard_input_is_said(said: bytes, tmp_path: Path) -> None:
    code, err = join(said, tmp_path)
    assert code == 2
    assert ("is no token" if said.strip() else "there is no token on standard input") in err


def test_the_token_is_read_from_a_pipe(token: str, tmp_path: Path) -> None:
    code, err = join(f"{token[:50]}\n{token[50:]}\n".encode(), tmp_path)
    assert (code, OWN in err) == (2, True), err


def test_no_terminal_shows_the_token_that_is_asked_for(token: str, tmp_path: Path) -> None:
    terminal, its_end = pty.openpty()
    with subprocess.Popen([*JOIN, str(tmp_path)], stdin=its_end, stderr=its_end, start_new_session=True) as process:
        os.close(its_end)
        shown = b""
        while not shown.endswith(b"Token: "):
            shown += os.read(terminal, 4096)
        os.write(terminal, f"{token}\n".encode())
        with suppress(OSError):  # by which Linux says that the other end is closed
            while more := os.read(terminal, 4096):
                shown += more
        assert process.wait(HANG_S) == 2
    os.close(terminal)
    assert OWN in shown.decode()
    assert token not in shown.decode()
