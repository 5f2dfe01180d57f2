"""One machine invites, another one joins, and each trusts the other from then on.

The one that joins knows by the token whose key to expect, and shows its secret through a connection that only the
owner of that key can read. So whoever listens learns nothing, and whoever poses as either side gets nowhere without
the token.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import zmq.asyncio
from zmq.utils import z85

from zsfl.errors import NO_DESCRIPTORS, ConfigError, NoPeer, RemoteProtocolError, Unauthorised, Unavailable
from zsfl.ids import PublicKey, Role
from zsfl.keys.machine import machine_id
from zsfl.keys.nodes import new_node_id
from zsfl.keys.secret import own_keys
from zsfl.keys.tokens import MOST_ADDRESSES, SECRET_BYTES, Invitation, from_token, to_token
from zsfl.keys.trusted import EVERY_ROLE, Trusted, trust
from zsfl.metrics import Counters
from zsfl.settings import WireLimits
from zsfl.wire.connection import Connection
from zsfl.wire.door import Door
from zsfl.wire.enrolment import Enrol, Enrolled
from zsfl.wire.framing import Buffer
from zsfl.wire.gatekeeper import kept
from zsfl.wire.guard import Guard
from zsfl.wire.messages import Reply, Request
from zsfl.wire.server import Server

REACH_S = 15.0
"""What the machine that invites may take to be there."""
ANSWER_S = 30.0
"""What it may take to answer."""
CONFIRM_S, REPLY_S = 3.0, 0.2
"""How long the machine that invites stays to be asked again, should its answer be lost; and once it has come."""
LIMITS = WireLimits(max_message_bytes=1 << 16, frame_bytes=1 << 16, max_header_bytes=1 << 16, max_parts=1)


class _OpenDoor(Door):
    """Lets every key in, and hears of each only that it wants to be trusted: the secret it shows is what counts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.guard = _OnlyEnrol(self.name)

    def admits(self, raw_key: bytes, address: str, roles: frozenset[Role] = EVERY_ROLE) -> bool:
        """Whoever it is."""
        return True


class _OnlyEnrol(Guard):
    """Takes Enrol, from the owner of the key that it names."""

    def check(self, routing_id: bytes, key: str, body: Request) -> None:
        """Unauthorised for anything else."""
        if not isinstance(body, Enrol) or body.key != key:
            raise Unauthorised("this is `zsfl invite`, which takes but `zsfl join`, with the key of its own machine")


class Inviter:
    """Waits, at some addresses of this machine, for the one that has the token."""

    def __init__(self, folder: Path, entry: Callable[[PublicKey, str], Trusted], own_name: str) -> None:
        """`entry` says as what the machine with a key, which calls itself so, is to be trusted."""
        self._folder = folder
        self._entry = entry
        self._own_name = own_name
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._taken: PublicKey | None = None
        """By whom the token has been used."""
        self._done: asyncio.Future[Trusted] = asyncio.get_running_loop().create_future()
        self.trusted: Trusted | None = None
        """Who used the token, and is trusted, whatever comes of it afterwards."""
        self.wrong = 0
        """How often somebody came with another secret."""

    async def run(self, hosts: Sequence[str], port: int, valid_s: float, told: Callable[[str], None]) -> Trusted:
        """Whoever has come, and is trusted by now; `told` gets the token. Unavailable when nobody comes in time."""
        keys = own_keys(self._folder)
        door = _OpenDoor("zsfl invite", keys, domain="zsfl-invite")
        context = zmq.asyncio.Context()
        try:
            with kept(context, door):
                servers = [
                    Server(context, host, port, self._answer, limits=LIMITS, counters=Counters(), door=door)
                    for host in hosts[:MOST_ADDRESSES]
                ]
                addresses = tuple(f"{host}:{server.port}" for host, server in zip(hosts, servers, strict=False))
                expires_s = int(time.time() + valid_s)
                told(to_token(Invitation(addresses, z85.decode(keys.public), self._secret, expires_s)))
                serving = [asyncio.ensure_future(server.run()) for server in servers]
                try:
                    return await self._first(serving, valid_s)
                finally:
                    for one in serving:
                        one.cancel()
                    await asyncio.gather(*serving, return_exceptions=True)
        finally:
            context.destroy(linger=200)

    async def _first(self, serving: Sequence[asyncio.Future[None]], valid_s: float) -> Trusted:
        done, _ = await asyncio.wait([self._done, *serving], timeout=valid_s, return_when=asyncio.FIRST_COMPLETED)
        if not done and self.trusted is not None:
            return self.trusted
        if not done:
            raise Unavailable(f"nobody has joined within {valid_s:g} s: the token is void, invite again")
        for one in done:
            one.result()
        return self._done.result()

    async def _answer(self, request: Request, _parts: Sequence[Buffer]) -> tuple[Reply, Sequence[Buffer]]:
        if not isinstance(request, Enrol):
            raise RemoteProtocolError("this is `zsfl invite`")
        if not hmac.compare_digest(request.secret, self._secret):
            self.wrong += 1
            raise Unauthorised("that is not the secret of this invitation: copy the whole token, and the newest one")
        key = PublicKey(request.key)
        if self._taken not in (None, key):
            raise Unauthorised("this token has been used by another machine: an invitation is good for one")
        again = self._taken is not None
        self._taken = key
        entry = await asyncio.to_thread(trust, self._folder, self._entry(key, request.name), rename=True)
        self.trusted = entry
        asyncio.get_running_loop().call_later(REPLY_S if again else CONFIRM_S, self._enrolled, entry)
        return Enrolled(name=self._own_name), ()

    def _enrolled(self, entry: Trusted) -> None:
        if not self._done.done():
            self._done.set_result(entry)


async def join(folder: Path, token: str, own_name: str, entry: Callable[[PublicKey, str], Trusted]) -> Trusted:
    """Have this machine trusted by the one that invites, and trust it.

    ConfigError for what is no token; NoPeer when nobody is there; Unauthorised when the token has been used.
    """
    invitation = from_token(token)
    keys = own_keys(folder)
    if invitation.key == keys.public:
        raise ConfigError("that token is of this machine itself: run `zsfl join` on the other one")
    door = Door("zsfl join", keys, domain="zsfl-join")
    context = zmq.asyncio.Context()
    try:
        async with AsyncExitStack() as stack:
            connection = await _reach(context, invitation, door, stack)
            asked = Enrol(key=keys.public, name=own_name, secret=invitation.secret)
            answer = (await connection.request(asked, deadline_s=ANSWER_S)).expect(Enrolled)
            trusted = await asyncio.to_thread(trust, folder, entry(invitation.key, answer.name), rename=True)
            with suppress(Unavailable):  # said again, so that the other side knows that its answer has come
                await connection.request(asked, deadline_s=CONFIRM_S)
        return trusted
    finally:
        context.destroy(linger=0)


async def _reach(context: zmq.asyncio.Context, invitation: Invitation, door: Door, stack: AsyncExitStack) -> Connection:
    """A connection to whichever address of the machine that invites answers first."""
    wired: dict[str, Any] = {"limits": LIMITS, "counters": Counters(), "door": door, "watch": True}
    connections = [
        Connection(
            context,
            f"tcp://{address}",
            peer="the machine that invites",
            own_id=new_node_id(door.key),
            key=invitation.key,
            **wired,
        )
        for address in invitation.addresses
    ]
    for one in connections:
        stack.callback(one.close)
    if not any(one.is_open for one in connections):
        raise NoPeer(f"the machine that invites cannot be asked: {NO_DESCRIPTORS}")
    met, _ = await asyncio.wait([one.met for one in connections], timeout=REACH_S, return_when=asyncio.FIRST_COMPLETED)
    for one in connections:
        if one.met in met:
            one.met.result()
            return one
    over = " (the token is void by the clock of this machine)" if time.time() > invitation.expires_s else ""
    raise NoPeer(
        f"machine {machine_id(invitation.key)} does not answer at {', '.join(invitation.addresses)} within "
        f"{REACH_S:g} s{over}: does `zsfl invite` still wait there, and does the firewall let TCP pass?"
    )


def checked(value: float) -> float:
    """Seconds that an invitation is valid; ConfigError for what makes no sense."""
    if not 0 < value <= 86_400:
        raise ConfigError(f"--valid-s is {value:g}: expected a number of seconds above 0, and a day at most")
    return value
