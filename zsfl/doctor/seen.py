"""What was seen of this machine, of the network and of the nodes on it; and what is found of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from zsfl.ids import NodeCard
from zsfl.wire.examining import Condition

Reach = Literal["open", "refused", "silent", "unreachable"]
"""refused: nobody listens there, as its system says; silent: no word from it; unreachable: no way there."""
Silence = Literal[
    "", "refused", "silent", "unreachable", "stranger", "mute", "keys", "unknown", "turned away", "forbidden", "old",
    "behind NAT",
]  # fmt: skip
"""Why a node did not say how it is: the port as in `Reach`; `stranger`: it is no zsfl; `mute`: it takes connections and
does not answer; `keys`: it uses some, and this machine has none; `unknown`: no key that is trusted here; `turned away`:
it does not trust this machine; `forbidden`: not for this; `old`: it does not know how;
`behind NAT`: others hear it, and nobody can ask it."""
State = Literal["good", "warn", "bad"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line of what the doctor says."""

    check: str
    state: State = "bad"
    what: str
    do: str = ""
    """What helps; empty where nothing is wrong."""


class Interface(msgspec.Struct, frozen=True, kw_only=True):
    """An IPv4 address of this machine."""

    name: str
    address: str


class Multicast(msgspec.Struct, frozen=True, kw_only=True):
    """What came of mDNS at one address of this machine."""

    host: str
    error: str = ""
    """Why it could not be tried."""
    came_back: bool = False
    """Whether a probe that was announced there was heard there."""


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """The folder of runs, and of spills in it."""

    folder: str
    free_bytes: int | None
    error: str = ""
    """Why a file of some size could not be written there."""
    spilled_bytes: int = 0
    spill_mib: int = 0
    """The bound that is set; 0: none."""


class Store(msgspec.Struct, frozen=True, kw_only=True):
    """The store that spills go to."""

    url: str
    error: str = ""
    """Why nothing could be written there, or deleted again."""
    once: bool = True
    """Whether of two who create the same only one does."""


class Keys(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of this machine."""

    used: bool
    """Whether a node with these settings would use them."""
    folder: str
    machine: str = ""
    """Its id; empty where it has no key."""
    trusted: Mapping[str, str] = {}
    """Other machines, name by key."""
    errors: Sequence[str] = ()


class Torch(msgspec.Struct, frozen=True, kw_only=True):
    """What a process of its own found out: importing torch may take seconds, or fail."""

    version: str = ""
    devices: Sequence[str] = ()
    """GPUs, by name."""
    error: str = ""
    """Why it, or the device that is asked for, cannot be used."""
    job: str = ""
    facts: Mapping[str, str] = {}
    """Of the job file that was named, if any; see `Hello`."""
    job_error: str = ""


class Here(msgspec.Struct, frozen=True, kw_only=True):
    """This machine."""

    host: str
    """The address that zsfl would use."""
    interfaces: Sequence[Interface]
    mdns: bool
    multicast: Sequence[Multicast] = ()
    disk: Disk
    store: Store | None = None
    keys: Keys
    torch: Torch
    device: str
    versions: Mapping[str, str]
    protocol: int


class SeenNode(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody who is, or is said to be, at an address."""

    address: str
    sources: frozenset[str]
    """How it is known: `mdns`, `peer` (by --peer), `run` (a run's folder), or the address of a node that hears it."""
    silence: Silence = ""
    said: str = ""
    """What it refused with."""
    condition: Condition | None = None
    card: NodeCard | None = None
    """Its own, or one that others showed."""
    off_s: float = 0.0
    """By how much its clock is ahead of ours."""
    within_s: float = 0.0
    """As far as that can be told."""
    locked: bool | None = None
    """Whether it uses keys."""
    key: str = ""
    """Of its machine, where it showed one that is trusted here."""
    ports: Mapping[str, Reach] = {}
    announced: tuple[str, str] | None = None
    """Node id and hashes, as mDNS has them."""

    @property
    def name(self) -> str:
        """What to call it."""
        return f"{self.card.name} at {self.address}" if self.card else f"the node at {self.address}"

    @property
    def short(self) -> str:
        """The same, where addresses are told elsewhere."""
        return self.card.name if self.card else self.name


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """Everything."""

    here: Here
    nodes: Sequence[SeenNode]
    job: str = ""
    """The name of the job that is looked for; empty: whatever there is."""
    cluster: str = ""
    left_out: int = 0
    """Addresses that were too many to ask."""
