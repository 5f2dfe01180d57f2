"""The commands about keys, as they are typed."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import zmq

from zsfl.cli import main
from zsfl.ids import PublicKey, Role
from zsfl.keys.machine import machine_id
from zsfl.keys.secret import own_keys
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
