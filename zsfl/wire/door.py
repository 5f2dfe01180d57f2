"""The lock on the sockets of one node: CURVE (rfc.zeromq.org/spec/26) with the keys of its machine, or none."""

from __future__ import annotations

import ipaddress
import socket as sockets
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any, cast

import zmq
from zmq.utils import z85

from zsfl.errors import ConfigError
from zsfl.ids import PublicKey, Role
from zsfl.keys.machine import machine_id
from zsfl.keys.secret import KeyPair, keys_folder, own_keys
from zsfl.keys.trusted import EVERY_ROLE, TRUSTED, TrustFile, read_roles
from zsfl.metrics import Counters
from zsfl.settings import NodeSettings
from zsfl.wire.guard import Guard
from zsfl.wire.sockets import connection_of

CURVE_BYTES = 64
"""By which an encrypted frame is longer than what is in it, at most."""
MAX_NOTED = 256
"""Strangers that are told of one by one; all are counted."""
MOST_REMEMBERED = 1024
"""What was told of that is told no more; of more, the oldest may be told of again."""


class Door:
    """Locks and unlocks sockets; tells of whom it turned away, once each. May be used from any thread."""

    def __init__(
        self,
        name: str,
        keys: KeyPair | None = None,
        trust: TrustFile | None = None,
        *,
        domain: str = "zsfl",
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Without `keys` and `trust`, which come together, whoever reaches the sockets comes in."""
        self.name = name
        self.domain = domain
        """Of ZAP; in one context each door has its own."""
        self.trust = trust
        self.guard = Guard(name, trust.roles_of if trust else None)
        self.counters = Counters()
        """Of whom was turned away before anything could be heard of it; touched in the main loop alone."""
        self._keys = keys
        self._note = note
        self._noted: dict[Hashable, None] = {}
        self._strangers = 0
        self._trusted = {key: entry.roles for key, entry in trust.known.items()} if trust else {}
        self._lock = threading.Lock()

    @property
    def locked(self) -> bool:
        """Whether keys are used."""
        return self._keys is not None

    @property
    def key(self) -> str:
        """The public key of this machine; empty without keys."""
        return self._keys.public if self._keys else ""

    def lock(self, socket: zmq.Socket[bytes], roles: frozenset[Role] = EVERY_ROLE) -> None:
        """Let nobody connect to this socket, not bound yet, without a key that is admitted by ZAP, for one of these
        roles.
        """
        if self._keys is None:
            return
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret.encode())
        # What follows the # is told to the authenticator with each key that comes to this socket.
        domain = self.domain if roles == EVERY_ROLE else f"{self.domain}#{','.join(sorted(roles))}"
        socket.setsockopt(zmq.ZAP_DOMAIN, domain.encode())
        # Without it CURVE lets everybody in while nobody answers ZAP.
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        _lengthen(socket)

    def unlock(self, socket: zmq.Socket[bytes], key: str) -> None:
        """Have this socket, not connected yet, talk to the machine with that key and to no other."""
        if self._keys is None:
            return
        _lengthen(socket)
        socket.setsockopt(zmq.CURVE_SERVERKEY, key.encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.public.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret.encode())

    def lost_trust(self) -> frozenset[str]:
        """Keys that were trusted when this was asked last, and are not any more, or for less."""
        known = {key: entry.roles for key, entry in self.trust.known.items()} if self.trust else {}
        lost = frozenset(key for key, roles in self._trusted.items() if not roles <= known.get(key, frozenset()))
        self._trusted = known
        self.guard.forget(lost - known.keys())
        return lost

    def admits(self, raw_key: bytes, address: str, roles: frozenset[Role] = EVERY_ROLE) -> bool:
        """Whether a key may come in where one of these roles is needed; who may not is told of."""
        key = PublicKey(z85.encode(raw_key).decode())
        if self.trust is None or roles & (trusted := self.trust.roles_of(key)):
            return True
        if trusted:
            self.counters.add("refused_roles")
            self.tell_once(
                ("role", key),
                f"the machine {machine_id(key)} at {address} may not listen to what {self.name} publishes: it is "
                f"trusted as {', '.join(sorted(trusted))}, and that is for {', '.join(sorted(roles))}",
            )
            return False
        self.counters.add("refused_keys")
        self.tell_once(
            ("key", key),
            f"the machine {machine_id(key)} at {address} was turned away, as its key is not trusted, or not any more; "
            "if you know that machine, and `zsfl keys show` there says the same id, pair the two with `zsfl invite`",
            of_stranger=True,
        )
        return False

    def tell_once(self, what: Hashable, message: str, *, of_stranger: bool = False) -> None:
        """One line in the log, the first time; of strangers, who make as many keys as they like, only of the first."""
        with self._lock:
            if what in self._noted or (of_stranger and self._strangers >= MAX_NOTED):
                return
            self._noted[what] = None
            while len(self._noted) > MOST_REMEMBERED:
                del self._noted[next(iter(self._noted))]
            self._strangers += of_stranger
        self._note(message)

    def failed(self, event: int, value: int) -> None:
        """A handshake on one of its sockets came to nothing (`watch.py`); ZAP has told of untrusted keys already."""
        if event != zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            return
        # Who takes this machine for another one may just have an address and not know whose it is: no news for anybody.
        if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            self.tell_once("no key", f"somebody who uses no keys tried to connect to {self.name} and was turned away")


def _lengthen(socket: zmq.Socket[bytes]) -> None:
    """Let frames that are as long as they may be be encrypted."""
    longest = cast(int, socket.getsockopt(zmq.MAXMSGSIZE))
    if longest >= 0:
        socket.setsockopt(zmq.MAXMSGSIZE, longest + CURVE_BYTES)


def of_domain(domain: bytes) -> tuple[bytes, frozenset[Role]]:
    """The domain of a door, and the roles that one of its sockets is for."""
    door, some, roles = domain.partition(b"#")
    return door, read_roles(roles.decode()) if some else EVERY_ROLE


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        return host == "localhost"


def door_for(settings: NodeSettings, name: str, note: Callable[[str], None]) -> Door:
    """The door of a node: locked wherever other machines can reach it, or where a folder of keys is named.

    ConfigError for a node that other machines can reach, on a machine that has been paired with none.
    """
    if settings.insecure and settings.keys:
        raise ConfigError(
            f"keys are to be used, those in {settings.keys}, and --insecure says not to: leave out either"
        )
    local = is_loopback(settings.host) and not settings.behind_nat
    where = "this node or its peers" if settings.behind_nat else settings.host
    if settings.insecure and not local:
        note(
            f"INSECURE: whoever reaches {where} can join, read what travels, give orders and spoil the run; "
            "pair the machines with `zsfl invite`, and leave out --insecure"
        )
    if settings.insecure or (local and not settings.keys):
        return Door(name, note=note)
    folder = keys_folder(settings.keys)
    if not settings.keys and not (folder / TRUSTED).exists():
        raise ConfigError(
            f"other machines can reach {where}, and this one has no keys to know them by: run `zsfl invite` "
            "here, and there what it prints, or the other way round. To serve whoever comes, start all nodes with "
            "--insecure"
        )
    keys = own_keys(folder)
    trust = TrustFile(folder, keys.public, note)
    if not local and len(trust.known) == 1:
        note(f"{folder} trusts no other machine, so that none can join: pair this one with another by `zsfl invite`")
    return Door(name, keys, trust, domain=settings.zap_domain, note=note)


def key_shown(frame: zmq.Frame) -> str:
    """The key by which the sender of a frame came in (User-Id, set by the authenticator)."""
    try:
        return cast(str, cast(Any, frame).get("User-Id"))
    except zmq.ZMQError:
        return ""


def cut(frame: zmq.Frame, port: int) -> None:
    """Tear the connection that a frame came by, to the socket at `port`.

    ZeroMQ cannot do it. Should it have closed the descriptor by now and used it for another connection to this port,
    that one is torn, and made again by whoever is let in.
    """
    with suppress(zmq.ZMQError, OSError), connection_of(cast(int, cast(Any, frame).get(zmq.SRCFD))) as connection:
        if connection.family == sockets.AF_INET and connection.getsockname()[1] == port:
            connection.shutdown(sockets.SHUT_RDWR)
