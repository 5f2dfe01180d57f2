"""How one node is set up: defaults, then `zsfl.toml`, then ZSFL_* variables, then flags; the last wins."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, cast, get_type_hints

import msgspec

from zsfl.bounds import CHECKS, CHOICES
from zsfl.errors import ConfigError
from zsfl.ids import Role
from zsfl.words import meant

CONFIG_FILE = Path("zsfl.toml")
"""Read from the working directory when neither the caller nor ZSFL_CONFIG names another file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WireLimits:
    """Bounds of what one node sends and accepts; reaching one is a typed error."""

    frame_bytes: int = 16 << 20
    """The longest frame, and the longest message that is not cut: what comes in one frame is not copied."""
    piece_bytes: int = 4 << 20
    """What is sent of longer messages at once, unless a tensor that fits a frame is longer; others are cut so."""
    max_message_bytes: int = 1 << 30
    """All parts of one message together, after reassembly."""
    max_header_bytes: int = 1 << 20
    """The msgpack header, checked before it is unpacked; whatever the schemas allow fits."""
    max_parts: int = 4096
    """Frames of one message."""
    max_inflight: int = 256
    """Requests that one connection may have open, and one server may be serving, at once."""
    max_arriving_bytes: int = 4 << 30
    """Half-finished messages of all peers of one socket together."""
    max_outbox_bytes: int = 1 << 30
    """Replies waiting for the peers of one server to read them, all together; no reply may be longer."""
    copy_below_bytes: int = 1 << 16
    """Shorter messages are copied into ZeroMQ, cheaper than lending it the buffer (its own threshold)."""
    default_deadline_s: float = 30.0
    """How long a request that states no deadline may be served."""
    max_deadline_s: float = 3600.0
    """No request is served for longer, whatever its asker says."""

    def deadline_of(self, stated_s: float) -> float:
        """How long a message that states this deadline (0: none) is waited for, or served."""
        return min(stated_s or self.default_deadline_s, self.max_deadline_s)


def _doc(text: str, *flags: str, metavar: str = "") -> dict[str, Any]:
    """Metadata of a field: its help text, and its flags and what to write after them, where that is not as usual."""
    return {"help": text, "flags": flags, "metavar": metavar}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """The settings of one node; `ConfigError` when a value is out of range."""

    host: str = field(default="127.0.0.1", metadata=_doc("the one IPv4 address to bind, announce and multicast on"))
    port: int = field(default=0, metadata=_doc("control port, 0 being any free one"))
    behind_nat: bool = field(
        default=False,
        metadata=_doc("nobody can dial this node: it dials the others, also those that have something to ask it"),
    )
    peers: tuple[str, ...] = field(default=(), metadata=_doc("a node to ask for the others; may be repeated", "--peer"))
    dns: tuple[str, ...] = field(
        default=(),
        metadata=_doc("a name whose DNS records are nodes at that port; may be repeated", metavar="NAME:PORT"),
    )
    meet: str = field(
        default="", metadata=_doc("folder of a shared disk where nodes leave their addresses", metavar="FOLDER")
    )
    connections: int = field(
        default=0,
        metadata=_doc("connections to each split server; 0: one, and up to 4 where a long link is busy (on Linux)"),
    )
    keys: str = field(
        default="", metadata=_doc("folder with this machine's key and those that it trusts; default: ~/.config/zsfl")
    )
    insecure: bool = field(
        default=False, metadata=_doc("use no keys, and serve whoever reaches this node, on a LAN too")
    )
    zap_domain: str = field(default="zsfl", metadata=_doc("name under which ZeroMQ asks whether a key may come in"))
    io_threads: int = field(
        default=1, metadata=_doc("threads that send, receive and encrypt; more where encryption keeps one busy")
    )
    mdns: bool = field(default=True, metadata=_doc("announce and find nodes by multicast DNS"))
    name: str = field(default="", metadata=_doc("what reports and logs call this node; default: its role"))
    runs: Path = field(default=Path("runs"), metadata=_doc("folder that holds one folder for each run"))
    run: str = field(default="", metadata=_doc("name of the run; default: the job's name"))
    cluster: str = field(default="", metadata=_doc("nodes are peers only if they all name the same cluster, or none"))
    device: str = field(default="auto", metadata=_doc("where tensors live: auto, cpu, cuda or cuda:N"))
    threads: int = field(default=1, metadata=_doc("torch threads of this process"))
    slots: int = field(default=192, metadata=_doc("requests a split server admits at once"))
    spill_mib: int = field(
        default=0, metadata=_doc("MiB that this node's spills may take on the disk; 0: as much as there is")
    )
    spill: str = field(
        default="",
        metadata=_doc(
            "store that spills go to, a bucket or a folder of a shared file system, such as s3://bucket/zsfl or "
            "file:///mnt/shared/zsfl; default: this node's own disk. An aggregator reads there what nodes left that "
            "are gone",
            metavar="URL",
        ),
    )
    shards: str = field(
        default="",
        metadata=_doc("shards a client holds: 3, or 0-19, or 1,4-6", "--shards", "--shard"),
    )
    clients: int = field(default=0, metadata=_doc("how many shards the data is divided among; 0: what the job says"))
    resume: bool = field(default=False, metadata=_doc("continue the run of that name"))
    service: bool = field(
        default=False,
        metadata=_doc("for system services: continue the run, or begin it, or leave it if it is finished; print words"),
    )
    stay: bool = field(
        default=False,
        metadata=_doc("once its run is over, stay until told to leave, so that nothing starts it again and again"),
    )
    durability: str = field(
        default="process",
        metadata=_doc(
            "what a committed version outlasts: process, its end; power, that of the power (slower); replica, the end "
            "of this machine, as one that stands by has it too; store, the same, as the store of --spill has it"
        ),
    )
    takeover: str = field(
        default="majority",
        metadata=_doc(
            "when one that stands by takes over: majority, where most clients agree; always, by itself alone; never"
        ),
    )
    keep_mib: int = field(
        default=256, metadata=_doc("MiB of counted contributions and old checkpoints that are kept for audits")
    )
    rounds: int | None = field(default=None, metadata=_doc("rounds to train; default: what the job says"))
    start_with: int = field(
        default=0, metadata=_doc("clients' shards that must be there before training begins; default: all of them")
    )
    clients_per_key: int = field(
        default=256, metadata=_doc("shards that the clients with one key may hold, where keys are used")
    )
    reassign: str = field(
        default="",
        metadata=_doc("shards, such as 3 or 1,4-6, that another machine may take from one that is still trusted, once"),
    )
    mode: str = field(default="", metadata=_doc("exact, elastic or async; default: what the job says"))
    hold: bool = field(default=False, metadata=_doc("the aggregator waits for an order to train"))
    join_s: float = field(default=600.0, metadata=_doc("seconds without any aggregator after which a node gives up"))
    patience_s: float = field(
        default=60.0, metadata=_doc("seconds a run may stand still for a missing peer before it fails")
    )
    request_s: float = field(default=30.0, metadata=_doc("deadline of one request, in seconds"))
    beat_s: float = field(default=0.5, metadata=_doc("seconds between two heartbeats"))
    lost_after_s: float = field(default=2.0, metadata=_doc("seconds of silence after which a peer counts as lost"))
    metrics: str = field(
        default="",
        metadata=_doc(
            "serve at this port of this machine what is counted, for Prometheus, and /healthz and /readyz",
            metavar="[HOST:]PORT",
        ),
    )
    tensorboard: bool = field(default=False, metadata=_doc("leave the curves in RUN/tensorboard, for TensorBoard, too"))
    codec: str = field(default="", metadata=_doc("how tensors travel, and weights=CODEC; default: what the job says"))

    @property
    def named(self) -> tuple[str, ...]:
        """Where other nodes are said to be."""
        return (*self.peers, *self.dns, *([self.meet] if self.meet else []))

    def __post_init__(self) -> None:
        for name in _FIELDS:
            _check(name, getattr(self, name), f"NodeSettings.{name}")
        if self.lost_after_s <= self.beat_s:
            raise ConfigError(
                f"lost_after_s is {self.lost_after_s:g} and beat_s is {self.beat_s:g}: "
                "lost_after_s must be longer than beat_s, or every healthy peer is lost between two beats"
            )


LOOKING = ("host", "peers", "dns", "meet", "keys", "insecure", "mdns", "runs")
"""Settings of commands that look at nodes."""
_COMMON = (
    "clients", "mode", "codec", "cluster", "host", "port", "behind_nat", "peers", "dns", "meet", "keys", "insecure",
    "io_threads", "mdns", "name", "runs", "run", "threads", "join_s", "patience_s", "request_s", "metrics", "service",
    "stay",
)  # fmt: skip
NODE_FLAGS: dict[Role, tuple[str, ...]] = {
    Role.CLIENT: ("shards", "device", "spill", "spill_mib", "connections", *_COMMON),
    Role.SPLIT_SERVER: ("device", "slots", "spill", "spill_mib", *_COMMON),
    Role.AGGREGATOR: (
        "rounds", "start_with", "resume", "hold", "durability", "spill", "keep_mib", "takeover", "clients_per_key",
        "reassign", "tensorboard", *_COMMON,
    ),
    Role.STANDBY: ("rounds", "durability", "spill", "keep_mib", "takeover", "clients_per_key", "tensorboard", *_COMMON),
}  # fmt: skip
"""Settings that make sense for a role on the command line."""


def load_settings(flags: Mapping[str, Any], env: Mapping[str, str], toml: Path | None = None) -> NodeSettings:
    """Settings from all layers; `flags` holds field names, None meaning not given; other keys are ignored.

    `toml` None means the file that ZSFL_CONFIG names, else `zsfl.toml` where there is one.
    `ConfigError` names the file and key, variable or flag at fault, and what it accepts.
    """
    values = _from_toml(toml, env)
    for name in _FIELDS:
        variable = f"ZSFL_{name.upper()}"
        if variable in env:
            values[name] = _value(name, env[variable], variable, is_text=True)
        if flags.get(name) is not None:
            values[name] = _value(name, flags[name], _flags(name)[0], is_text=True)
    return NodeSettings(**values)


def add_flags(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Give `parser` the flags of these fields; parsed values are for `load_settings`, which checks them."""
    for name in names:
        entry, kind = _FIELDS[name], _kind(name)
        options: dict[str, Any] = {"dest": name, "default": None, "help": _help(entry)}
        if kind == "bool":
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = entry.metadata["metavar"] or _METAVARS.get(kind, name.upper())
        if kind == "tuple[str, ...]":
            options["action"] = "append"
        if name in CHOICES:
            options["choices"] = CHOICES[name]
        parser.add_argument(*_flags(name), **options)


def _from_toml(path: Path | None, env: Mapping[str, str]) -> dict[str, Any]:
    """The [node] table, which is all that the file may have."""
    named = path or (Path(env["ZSFL_CONFIG"]) if env.get("ZSFL_CONFIG") else None)
    file = named or CONFIG_FILE
    if named is None and not file.exists():
        return {}
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as err:
        raise ConfigError(f"cannot read the settings file {file} ({err.strerror}); correct ZSFL_CONFIG or it") from None
    except ValueError as err:
        raise ConfigError(f"{file} is not a TOML file: {err}") from None
    for name, value in document.items():
        if name in _FIELDS and not isinstance(value, dict):
            raise ConfigError(f"{file}: {name} is outside of any table: put it below a line [node]")
        if name != "node":
            raise ConfigError(
                f"{file}: unknown table or key {name!r}{meant(name, ['node'])}; all settings are in [node]"
            )
    table = document.get("node", {})
    if not isinstance(table, dict):
        raise ConfigError(f"{file}: expected a table [node], found {table!r}")
    return check_settings(cast(dict[str, Any], table), f"{file} [node]")


def check_settings(table: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Settings of a table in a file, as what they are; ConfigError, naming the place, when one is unknown or wrong."""
    for key in table:
        if key not in _FIELDS:
            near = meant(key, _FIELDS)
            raise ConfigError(f"{place} has an unknown key {key!r}{near}; known are {', '.join(_FIELDS)}")
    return {key: _value(key, value, f"{place} {key}", is_text=False) for key, value in table.items()}


def _value(name: str, given: object, source: str, *, is_text: bool) -> Any:
    """`given` as the type of the field, checked; `is_text` also lets it be written as a string."""
    kind = _kind(name)
    if is_text and isinstance(given, str) and kind == "tuple[str, ...]":
        given = [part.strip() for part in given.split(",") if part.strip()]
    try:
        value = msgspec.convert(given, _TYPES[name], strict=not is_text, dec_hook=_to_path)
    except msgspec.ValidationError:
        raise ConfigError(f"{source} is {given!r}: expected {_EXPECTED[kind]}") from None
    _check(name, value, source)
    return value


def _to_path(_type: type, given: object) -> Path:
    if not isinstance(given, str | Path):
        raise ValueError(given)
    return Path(given)


def _check(name: str, value: Any, source: str) -> None:
    check = CHECKS.get(name)
    if check is None:
        return
    try:
        check(value)
    except ValueError as err:
        raise ConfigError(f"{source} is {value!r}: expected {err}") from None


def _kind(name: str) -> str:
    return str(_FIELDS[name].type)


def _flags(name: str) -> tuple[str, ...]:
    return _FIELDS[name].metadata["flags"] or ("--" + name.replace("_", "-"),)


def _help(entry: Field[Any]) -> str:
    tail = "" if entry.default in ("", None, ()) else f" (default: {_shown(entry.default)})"
    return (entry.metadata["help"] + tail).replace("%", "%%")


def _shown(default: object) -> str:
    match default:
        case bool():
            return "on" if default else "off"
        case float():
            return f"{default:g}"
        case _:
            return str(default)


_FIELDS: dict[str, Field[Any]] = {entry.name: entry for entry in fields(NodeSettings)}

_TYPES = get_type_hints(NodeSettings)

_EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "int | None": "a whole number",
    "float": "a number",
    "str": "a text",
    "Path": "a path",
    "tuple[str, ...]": 'a list of "host:port"',
}
_METAVARS = {"int": "N", "int | None": "N", "float": "S", "tuple[str, ...]": "HOST:PORT"}
