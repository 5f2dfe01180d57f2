from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zsfl.errors import ConfigError
from zsfl.ids import Role
from zsfl.learning.modes import ModeName
from zsfl.ranges import parse_shards
from zsfl.settings import NODE_FLAGS, NodeSettings, add_flags, load_settings

ALL = tuple(NodeSettings.__dataclass_fields__)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def parsed(*argv: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_flags(parser, ALL)
    return vars(parser.parse_args(argv))


def test_without_any_layer_the_defaults_hold() -> None:
    assert load_settings(parsed(), {}) == NodeSettings()


def test_each_layer_wins_over_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "zsfl.toml"
    file.write_text("[node]\nport = 1\nslots = 2\nthreads = 3\n")
    found = load_settings(parsed("--threads", "7"), {"ZSFL_SLOTS": "5", "ZSFL_THREADS": "6"})
    assert (found.port, found.slots, found.threads) == (1, 5, 7)


@pytest.mark.parametrize("mode", ["", *get_args(ModeName)])
def test_every_mode_may_be_chosen(mode: str) -> None:
    assert load_settings({"mode": mode}, {}).mode == mode


def test_every_role_is_told_how_many_shards_and_which_mode_and_one_when_to_begin() -> None:
    assert all({"clients", "mode"} <= set(flags) for flags in NODE_FLAGS.values())
    assert [role for role, flags in NODE_FLAGS.items() if "start_with" in flags] == [Role.AGGREGATOR]


def test_the_file_is_the_one_given_then_the_one_in_the_environment(tmp_path: Path) -> None:
    for name, port in (("zsfl.toml", 1), ("env.toml", 2), ("given.toml", 3)):
        (tmp_path / name).write_text(f"[node]\nport = {port}\n")
    assert load_settings({}, {"ZSFL_CONFIG": "env.toml"}).port == 2
    assert load_settings({}, {"ZSFL_CONFIG": "env.toml"}, tmp_path / "given.toml").port == 3


def test_every_type_can_come_from_every_layer(tmp_path: Path) -> None:
    expected = NodeSettings(
        port=4100, peers=("a:1", "10.0.0.2:2"), mdns=False, runs=Path("r"), rounds=3, patience_s=1.0
    )
    file = tmp_path / "all.toml"
    file.write_text(
        '[node]\nport = 4100\npeers = ["a:1", "10.0.0.2:2"]\nmdns = false\nruns = "r"\nrounds = 3\npatience_s = 1\n'
    )
    variables = {
        "ZSFL_PORT": "4100",
        "ZSFL_PEERS": "a:1, 10.0.0.2:2",
        "ZSFL_MDNS": "false",
        "ZSFL_RUNS": "r",
        "ZSFL_ROUNDS": "3",
        "ZSFL_PATIENCE_S": "1",
    }
    flags = ["--port=4100", "--peer=a:1", "--peer=10.0.0.2:2", "--no-mdns", "--runs=r", "--rounds=3"]
    flags.append("--patience-s=1")
    assert load_settings({}, {}, file) == expected
    assert load_settings({}, variables) == expected
    assert load_settings(parsed(*flags), {}) == expected
    typed = {"port": 4100, "peers": ("a:1", "10.0.0.2:2"), "mdns": False, "runs": Path("r"), "rounds": 3}
    assert load_settings({**typed, "patience_s": 1.0}, {}) == expected


@pytest.mark.parametrize(
    ("flags", "env", "message"),
    [
        ({"port": "http"}, {}, "--port is 'http': expected a whole number"),
        ({"port": 70000}, {}, "--port is 70000: expected a whole number from 0 to 65535"),
        ({"peers": ["nowhere"]}, {}, "--peer is .*expected host:port"),
        ({"host": "0.0.0.0"}, {}, "--host is '0.0.0.0': expected the IPv4 address of one interface"),
        ({"host": "localhost"}, {}, "expected the IPv4 address"),
        ({"device": "gpu"}, {}, "--device is 'gpu': expected auto, cpu, cuda or cuda:N"),
        ({"patience_s": "nan"}, {}, "--patience-s is nan: expected a number of seconds above 0"),
        ({"shards": "5-3"}, {}, "--shards is '5-3': expected shard numbers and rising ranges"),
        ({"name": "../x"}, {}, "--name is '../x': expected up to 63 letters"),
        ({"run": ".."}, {}, "--run is '..'"),
        ({"rounds": 0}, {}, "--rounds is 0: expected a whole number from 1 to 2147483648"),
        ({"start_with": -1}, {}, "--start-with is -1: expected a whole number from 0 upwards"),
        ({"clients": -1}, {}, "--clients is -1: expected a whole number from 0 upwards"),
        ({"mode": "sync"}, {}, "--mode is 'sync': expected exact, elastic or async"),
        ({}, {"ZSFL_MODE": "fast"}, "ZSFL_MODE is 'fast': expected exact, elastic or async"),
        ({}, {"ZSFL_MDNS": "perhaps"}, "ZSFL_MDNS is 'perhaps': expected true or false"),
        ({}, {"ZSFL_CONFIG": "absent.toml"}, "cannot read the settings file absent.toml"),
        ({"beat_s": 2.0}, {}, "lost_after_s must be longer than beat_s"),
    ],
)
def test_a_bad_value_is_refused_by_its_source(flags: dict[str, Any], env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(flags, env)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[node]\nport = "5"\n', r"zsfl.toml \[node\] port is '5': expected a whole number"),
        ("[node]\nport = true\n", "port is True: expected a whole number"),
        ("[node]\nmdns = 1\n", "mdns is 1: expected true or false"),
        ('[node]\npeers = "a:1"\n', "peers is 'a:1': expected a list"),
        ("[node]\nruns = 3\n", "runs is 3: expected a path"),
        (
            "[node]\nprot = 5\n",
            r"zsfl.toml .node. has an unknown key 'prot': did you mean port\?; known are host, port",
        ),
        ("[nodes]\nport = 5\n", r"zsfl.toml: unknown table or key 'nodes': did you mean node\?"),
        ("port = 5\n", r"zsfl.toml: port is outside of any table: put it below a line \[node\]"),
        ("node = 3\n", r"expected a table \[node\]"),
        ("[node\n", "is not a TOML file"),
    ],
)
def test_a_bad_file_is_refused_by_its_name_and_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "zsfl.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_settings({}, {})


def test_values_given_in_python_are_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"NodeSettings\.port is -1"):
        NodeSettings(port=-1)


def test_help_names_every_flag_and_its_default() -> None:
    parser = argparse.ArgumentParser(prog="x")
    add_flags(parser, ALL)
    text = " ".join(parser.format_help().split())
    for flag in (
        "--host",
        "--peer HOST:PORT",
        "--no-mdns",
        "--shards SHARDS, --shard SHARDS",
        "--patience-s S",
    ):
        assert flag in text
    assert "(default: 127.0.0.1)" in text
    assert "multicast DNS (default: on)" in text


def test_shards() -> None:
    assert parse_shards("3", 4) == (3,)
    assert parse_shards(" 4-6, 1,5 ", 20) == (1, 4, 5, 6)
    for text in ("", "a", "1,", "-1", "3-1", "1-2-3", "0x1", "٣"):
        with pytest.raises(ConfigError, match="expected shard numbers"):
            parse_shards(text, 10)
    with pytest.raises(ConfigError, match="shard 999999999 is out of range: the data has 4 shards, 0 to 3"):
        parse_shards("0-999999999", 4)


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(0, 50), min_size=1))
def test_shards_written_one_by_one_are_read_back(shards: set[int]) -> None:
    assert parse_shards(",".join(map(str, shards)), 51) == tuple(sorted(shards))
