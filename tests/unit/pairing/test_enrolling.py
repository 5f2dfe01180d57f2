"""Two machines come to trust each other by a token, and nobody else by it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from helpers.doors import Machine
from helpers.waiting import HANG_S, until
from helpers.wires import HOST

from zsfl.errors import ConfigError, NoPeer, Unauthorised, Unavailable
from zsfl.ids import PublicKey, Role
from zsfl.keys.secret import own_keys
from zsfl.keys.tokens import from_token, to_token
from zsfl.keys.trusted import EVERY_ROLE, Trusted, TrustFile
from zsfl.pairing import enrolling
from zsfl.pairing.enrolling import Inviter, join
from zsfl.wire.enrolment import Enrol
from zsfl.wire.messages import Drain


def as_anything(key: PublicKey, name: str) -> Trusted:
    return Trusted(key=key, name=name)


def as_client(key: PublicKey, name: str) -> Trusted:
    return Trusted(key=key, name=name, roles=frozenset({Role.CLIENT}))


@dataclass
class Invited:
    """An invitation that waits."""

    inviter: Inviter
    token: str
    waiting: asyncio.Future[Trusted]


@asynccontextmanager
async def invited(folder: Path, valid_s: float = HANG_S) -> AsyncIterator[Invited]:
    inviter = Inviter(folder, as_client, "anna")
    token: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    waiting = asyncio.ensure_future(inviter.run([HOST, HOST], 0, valid_s, token.set_result))
    try:
        yield Invited(inviter, await until(token), waiting)
    finally:
        waiting.cancel()
        with suppress(asyncio.CancelledError, Unavailable):
            await waiting


def known(folder: Path) -> dict[str, Trusted]:
    """Whom that machine trusts, by name."""
    return {entry.name: entry for entry in TrustFile(folder, PublicKey("none")).known.values() if entry.key != "none"}


async def test_each_trusts_the_other_as_it_was_told_to(tmp_path: Path) -> None:
    anna, bob = tmp_path / "anna", tmp_path / "bob"
    async with invited(anna) as one:
        trusted = await join(bob, one.token, "bob", as_anything)
        assert (trusted.name, trusted.key) == ("anna", from_token(one.token).key)
        assert (await until(one.waiting)).name == "bob"
    assert known(anna)["bob"].roles == {Role.CLIENT}
    assert known(bob)["anna"].roles == EVERY_ROLE


async def test_a_token_is_good_for_one_machine_that_may_ask_again(tmp_path: Path) -> None:
    anna = tmp_path / "anna"
    async with invited(anna) as one:
        await join(tmp_path / "bob", one.token, "bob", as_anything)
        with pytest.raises((Unauthorised, NoPeer)):
            await join(tmp_path / "eve", one.token, "eve", as_anything)
    assert set(known(anna)) == {"bob"}


async def test_who_has_not_the_secret_is_turned_away_and_counted(tmp_path: Path) -> None:
    anna = tmp_path / "anna"
    async with invited(anna) as one:
        wrong = to_token(msgspec.structs.replace(from_token(one.token), secret=bytes(16)))
        for _ in range(2):
            with pytest.raises(Unauthorised, match="not the secret of this invitation"):
                await join(tmp_path / "eve", wrong, "eve", as_anything)
        assert one.inviter.wrong == 2
        assert not known(anna)
        assert not known(tmp_path / "eve")
        await join(tmp_path / "bob", one.token, "bob", as_anything)


async def test_nothing_but_enrolling_and_nobody_elses_key_is_taken(tmp_path: Path) -> None:
    eve, bob = Machine(tmp_path, "eve"), Machine(tmp_path, "bob")
    try:
        async with invited(tmp_path / "anna") as one:
            invitation = from_token(one.token)
            port = int(invitation.addresses[0].rpartition(":")[2])

            class At:
                """Where the invitation waits."""

            at = At()
            at.port = port  # pyright: ignore[reportAttributeAccessIssue]
            connection = eve.connect(at, invitation.key)  # pyright: ignore[reportArgumentType]
            forged = Enrol(key=bob.key, name="bob", secret=invitation.secret)
            for body in (Drain(), forged):
                with pytest.raises(Unauthorised, match="with the key of its own machine"):
                    await connection.request(body, deadline_s=HANG_S)
    finally:
        await eve.close()
        await bob.close()


async def test_nobody_comes(tmp_path: Path) -> None:
    async with invited(tmp_path / "anna", valid_s=0.01) as one:
        with pytest.raises(Unavailable, match=r"nobody has joined within 0.01 s: the token is void"):
            await one.waiting


async def test_who_used_the_token_is_named_though_it_never_came_again(tmp_path: Path) -> None:
    keys = own_keys(tmp_path / "thief")
    async with invited(tmp_path / "anna", valid_s=2.0) as one:
        await one.inviter._answer(Enrol(key=keys.public, name="thief", secret=one.inviter._secret), [])
        assert one.inviter.trusted is not None
        assert (await until(one.waiting)).key == one.inviter.trusted.key == keys.public


async def test_what_cannot_be_joined_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolling, "REACH_S", 0.1)
    anna = tmp_path / "anna"
    with pytest.raises(ConfigError, match="no token"):
        await join(tmp_path / "bob", "zsfl1.abc", "bob", as_anything)
    async with invited(anna) as one:
        with pytest.raises(ConfigError, match="of this machine itself"):
            await join(anna, one.token, "anna", as_anything)
        token = one.token
    with pytest.raises(NoPeer, match=r"machine \S+ does not answer at 127.0.0.1:\d+.*does `zsfl invite` still wait"):
        await join(tmp_path / "bob", token, "bob", as_anything)
    assert not known(tmp_path / "bob")


async def test_a_name_that_is_taken_gets_a_number(tmp_path: Path) -> None:
    anna = tmp_path / "anna"
    for folder in ("bob", "carl"):
        async with invited(anna) as one:
            await join(tmp_path / folder, one.token, "laptop", as_anything)
            await until(one.waiting)
    assert set(known(anna)) == {"laptop", "laptop-2"}
