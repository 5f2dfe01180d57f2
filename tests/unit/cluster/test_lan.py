"""What a file such as lan.toml may say, and how it is told what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from zsfl.cluster.lan import read_lan
from zsfl.cluster.plan import client_flags
from zsfl.cluster.remote import LanCluster
from zsfl.errors import ConfigError
from zsfl.ids import Role

GOOD = """
job = "job.py"
[settings]
rounds = 5
[machines.desk]
host = "192.168.1.10"
aggregator = true
[machines.gpu]
ssh = "anna@192.168.1.20"
split_servers = 2
shards = "0-2,5"
client_processes = 2
settings = { device = "cuda" }
[machines.ward]
ssh = "ward"
host = "192.168.1.30"
standby = true
shards = "3-4"
"""


def lan_file(folder: Path, text: str) -> Path:
    path = folder / "lan.toml"
    path.write_text(text)
    return path


def test_it_says_who_plays_what(tmp_path: Path) -> None:
    path = lan_file(tmp_path, GOOD)
    lan = read_lan(path)
    assert lan.shards == 6
    assert lan.uses_keys
    assert [machine.address for machine in lan.machines.values()] == ["192.168.1.10", "192.168.1.20", "192.168.1.30"]
    assert lan.machines["desk"].roles == {Role.AGGREGATOR, Role.STANDBY}
    assert lan.machines["gpu"].roles == {Role.SPLIT_SERVER, Role.CLIENT}
    assert lan.machines["ward"].roles == {Role.AGGREGATOR, Role.STANDBY, Role.CLIENT}
    (tmp_path / "job.py").write_text("")
    plan = LanCluster(path, runs=tmp_path, rounds=7)._plan()
    assert plan.aggregator == {"host": "192.168.1.10", "keys": None}
    gpu = {"device": "cuda", "host": "192.168.1.20", "keys": None}
    assert plan.split_servers == {"split-server-gpu": gpu, "split-server-gpu-1": gpu}
    assert {name: flags["shards"] for name, flags in plan.clients.items()} == {
        "client-0-1": "0-1", "client-2_5": "2, 5", "client-3": "3", "client-4": "4",
    }  # fmt: skip
    assert list(plan.standbys) == ["standby-ward"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('job = "job.py"', ""), "missing required field `job`"),
        (("aggregator = true", ""), r"\[machines.desk\] has nothing to do"),
        (("aggregator = true", "split_servers = 1"), "no machine has aggregator = true: one machine has to"),
        (("standby = true", "aggregator = true"), "desk, ward have aggregator = true: one machine has to"),
        (("split_servers = 2", ""), "no machine has split_servers"),
        (("split_servers = 2", "split_servers = -1"), "`int` >= 0"),
        (('"3-4"', '"4"'), "shards 3 are on no machine: number them from 0 without gaps"),
        (('"3-4"', '"2-4"'), "shards 2 are on several machines"),
        (('"3-4"', '"4-3"'), r"\[machines.ward\] shards is '4-3': expected shard numbers"),
        (('host = "192.168.1.30"', ""), r"\[machines.ward\] says not where the others reach it"),
        (('host = "192.168.1.30"', 'host = "ward.lan"'), "host is 'ward.lan': expected an IPv4 address"),
        (('"ward"', '"-oProxyCommand=x"'), "ssh is '-oProxyCommand=x': expected USER@HOST"),
        (("standby = true", "standbys = 1"), "unknown field `standbys`"),
        (("rounds = 5", "round = 5"), r"\[settings\] has an unknown key 'round'"),
        (("rounds = 5", 'rounds = "x"'), r"\[settings\] rounds is 'x': expected a whole number"),
        (('device = "cuda"', 'device = "gpu"'), r"\[machines.gpu.settings\] device is 'gpu': expected auto, cpu"),
        (('device = "cuda"', 'host = "1.2.3.4"'), r"\[machines.gpu.settings\] has 'host', which is said otherwise"),
        (("[settings]", 'files = ["../x.py"]\n[settings]'), "files has '../x.py': name files in the job's folder"),
        (("[machines.ward]", "[machines.'my ward']"), "matching regex"),
        (("[settings]", 'ssh = "ssh \'"\n[settings]'), "ssh is .*: No closing quotation"),
        (('"3-4"', '"0-20000000"'), "has 20000001 shards: use at most"),
        (('host = "192.168.1.30"', 'host = "127.0.0.1"'), "no other machine reaches ward at 127.0.0.1"),
        (("split_servers = 2", 'split_servers = 2\nfolder = "~/zsfl"'), "folder is '~/zsfl': give the whole path"),
        (("[settings]", "[settings"), "lan.toml is not a TOML file"),
    ],
)
def test_what_is_wrong_with_it_is_named(change: tuple[str, str], said: str, tmp_path: Path) -> None:
    assert change[0] in GOOD
    with pytest.raises(ConfigError, match=said):
        read_lan(lan_file(tmp_path, GOOD.replace(*change, 1)))


def test_without_a_job_file_nothing_begins(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"names the job .*job.py, and there is no such file"):
        LanCluster(lan_file(tmp_path, GOOD))
    with pytest.raises(ConfigError, match=r"cannot read .*none.toml: No such file"):
        LanCluster(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (("rounds = 5", "insecure = true"), False),
        (("192.168.1", "127.0.0"), False),
        (("rounds = 5", 'keys = "/etc/zsfl"'), True),
    ],
)
def test_what_leaves_a_machine_is_encrypted(change: tuple[str, str], keys: bool, tmp_path: Path) -> None:
    lan = read_lan(lan_file(tmp_path, GOOD.replace(*change)))
    assert lan.uses_keys is keys
    assert lan.keys_of("gpu") == ("/etc/zsfl" if "etc" in change[1] else "")


def test_clients_are_divided_among_processes() -> None:
    odd = client_flags(range(1, 60, 2), 1)
    assert list(odd) == ["client-1_and_29_more"]
    assert client_flags(range(5), 2) == {"client-0-1": {"shards": "0-1"}, "client-2-4": {"shards": "2-4"}}


def keys_told(cluster: LanCluster) -> dict[str, str | None]:
    """Which keys the nodes of each machine are told to use, and its fork server."""
    plan = cluster._plan()
    nodes = {**plan.split_servers, **plan.clients, **plan.standbys, "aggregator": plan.aggregator}
    places = {cluster._places[node]: flags["keys"] for node, flags in nodes.items()}
    assert {name: keys or None for name, keys in ((name, cluster._lan.keys_of(name)) for name in places)} == places
    return places


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("", ""), {"desk": "mine", "gpu": None, "ward": None}),
        (("rounds = 5", 'keys = "all"'), {"desk": "mine", "gpu": "all", "ward": "all"}),
        (('device = "cuda"', 'keys = "there"'), {"desk": "mine", "gpu": "there", "ward": None}),
        (("aggregator = true", 'aggregator = true\nenv.ZSFL_KEYS = "e"'), {"desk": None, "gpu": None, "ward": None}),
    ],
)
def test_keys_of_whoever_runs_it_are_those_of_this_machine_alone(
    change: tuple[str, str], told: dict[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lan_file(tmp_path, GOOD.replace(*change) if change[0] else GOOD)
    (tmp_path / "job.py").touch()
    assert keys_told(LanCluster(path, keys="mine")) == told
    if "all" not in told.values():
        monkeypatch.setenv("ZSFL_KEYS", "mine")
        assert keys_told(LanCluster(path)) == told
