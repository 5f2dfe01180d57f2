"""tools/deploy: what an operator starts zsfl with says nothing that zsfl, systemd or Docker do not know."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from zsfl.cli import parser
from zsfl.front import BUSY_S, DRAIN_S, GOODBYE_LINGER_S
from zsfl.ids import Role
from zsfl.ranges import parse_shards
from zsfl.settings import NODE_FLAGS, NodeSettings, load_settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "tools" / "deploy"
UNIT = DEPLOY / "zsfl@.service"
PAGE = ROOT / "docs" / "how-to" / "services.md"
COMMANDS = ("node", "invite", "join", "doctor", "ls", "demo")
LEAVING_S = DRAIN_S + BUSY_S + GOODBYE_LINGER_S
"""What a node that is asked to leave may take."""
PLACES = {"%S": "/var/lib", "%l": "gpu1", "%i": "split"}
"""What systemd puts in place of them."""


def unit(name: str) -> list[str]:
    """All values of one directive."""
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


def unit_environment() -> dict[str, str]:
    pairs = [word for line in unit("Environment") for word in shlex.split(line)]
    shown = ["".join(PLACES.get(part, part) for part in re.split(r"(%\w)", pair)) for pair in pairs]
    return dict(pair.split("=", 1) for pair in shown)


def env_file(*, all_: bool) -> dict[str, str]:
    """What node.env sets; with `all_` also what it only proposes."""
    mark = "#?" if all_ else ""
    return dict(re.findall(rf"^{mark}([A-Z_]+)=(.*)$", (DEPLOY / "node.env").read_text(), re.MULTILINE))


def compose() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install 'zsfl[test]'")
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def image_environment() -> dict[str, str]:
    said = re.findall(r"^ENV (ZSFL_.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    return dict(pair.split("=", 1) for line in said for pair in shlex.split(line))


def assert_known(env: dict[str, str]) -> NodeSettings:
    """Every variable that looks like a setting is one, and has a value that zsfl takes."""
    unknown = {name for name in env if name.startswith("ZSFL_")} - {
        f"ZSFL_{name.upper()}" for name in NodeSettings.__dataclass_fields__
    }
    assert not unknown
    return load_settings({}, env)


# --- systemd ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze here")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    installed = tmp_path / "zsfl"
    installed.write_text("#!/bin/sh\n")
    installed.chmod(0o755)
    there = tmp_path / UNIT.name
    there.write_text(UNIT.read_text().replace("/opt/zsfl/bin/zsfl", str(installed)))
    done = subprocess.run(["systemd-analyze", "verify", str(there)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("role", NODE_FLAGS)
def test_a_unit_starts_a_node_of_each_role(role: Role) -> None:
    assert str(role) in (DEPLOY / "node.env").read_text().partition("\nROLE=")[0]
    given = {"ROLE": str(role), "JOB": env_file(all_=False)["JOB"]}
    (line,) = unit("ExecStart")
    words = [re.sub(r"\$\{(\w+)\}", lambda found: given[found[1]], word) for word in line.split()]
    args = parser().parse_args(words[1:])
    assert (args.role, args.job) == (role, Path("/etc/zsfl/my_job.py"))


def test_what_a_unit_and_its_file_set_are_settings() -> None:
    settings = assert_known(unit_environment() | env_file(all_=True))
    assert settings.service
    assert settings.name == "gpu1-split"
    assert settings.keys == "/var/lib/zsfl/keys"
    assert settings.keys.removeprefix("/var/lib/") in unit("StateDirectory")[0].split()
    assert unit("StateDirectoryMode") == ["0700"]
    assert_known(unit_environment() | env_file(all_=False))


def test_a_unit_waits_for_a_node_that_leaves() -> None:
    (seconds,) = unit("TimeoutStopSec")
    assert int(seconds) > LEAVING_S


def shown() -> list[str]:
    """The commands of zsfl in docs/how-to/services.md."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [re.search(rf"\bzsfl ((?:{'|'.join(COMMANDS)}) ?.*)$", line) for line in lines]
    return [one[1].partition(" >")[0] for one in found if one]


@pytest.mark.parametrize("line", shown())
def test_the_commands_of_the_page_parse(line: str) -> None:
    parser().parse_args(shlex.split(line))


def test_the_page_names_files_that_are_there() -> None:
    assert len(shown()) >= 6
    for name in re.findall(r"tools/deploy/[\w@.-]*\w", PAGE.read_text()):
        assert (ROOT / name).exists() or name.endswith("/.env"), name


# --- containers ---------------------------------------------------------------------------------------------


def test_the_image_is_made_of_files_that_are_there_and_sent() -> None:
    ignoring = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    sent = [line[1:] for line in ignoring if line.startswith("!")]
    assert ignoring[0] == "*"
    copies = re.findall(r"^COPY (?!--from)(?:--\S+ )?(.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    names = [name for line in copies for name in line.split()]
    assert "zsfl" in names
    for name in names:
        assert (ROOT / name).exists(), name
        assert any(fnmatch.fnmatch(name, pattern) for pattern in sent), name


def test_what_the_image_sets_are_settings() -> None:
    assert assert_known(image_environment()).service


def test_services_are_nodes_of_one_run() -> None:
    file = compose()
    shards: list[int] = []
    divided: set[int] = set()
    for service in file["services"].values():
        env = image_environment() | service["environment"]
        settings = assert_known(env | {"ZSFL_ROUNDS": "20"})
        divided.add(settings.clients)
        args = parser().parse_args(shlex.split(service["command"]))
        assert str(args.job) in [mount["target"] for mount in service["volumes"] if isinstance(mount, dict)]
        shards += parse_shards(args.shards, settings.clients) if getattr(args, "shards", None) else ()
        (port,) = {peer.split(":")[1] for peer in settings.peers} or {str(settings.port)}
        assert int(port) == settings.port
        assert {peer.split(":")[0] for peer in settings.peers} <= set(file["services"])
    assert divided == {len(shards)}
    assert sorted(shards) == list(range(len(shards)))


def test_services_name_nothing_that_is_not_there() -> None:
    file = compose()
    for service in file["services"].values():
        assert set(service.get("depends_on", [])) <= set(file["services"])
        assert set(service["networks"]) <= set(file["networks"])
        assert {mount.split(":")[0] for mount in service["volumes"] if isinstance(mount, str)} == set(file["volumes"])
        assert float(service["stop_grace_period"].removesuffix("s")) > LEAVING_S
        assert service["user"].split(":")[0] in (DEPLOY / "Dockerfile").read_text()
        assert "ports" not in service  # nothing is reached from outside
    assert (DEPLOY / file["services"]["aggregator"]["build"]["context"] / "pyproject.toml").resolve().is_file()


@pytest.mark.skipif(
    not shutil.which("docker") or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode != 0,
    reason="there is no docker compose here",
)
def test_docker_takes_the_file() -> None:
    command = ["docker", "compose", "-f", str(DEPLOY / "compose.yaml"), "config", "--quiet"]
    env = {**os.environ, "JOB": str(ROOT / "zsfl" / "demo.py")}
    assert subprocess.run(command, env=env, timeout=60).returncode == 0


def in_container(tmp_path: Path, addresses: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """What `zsfl ARGS` comes to in a container with these addresses: its ZSFL_HOST and arguments, a line each."""
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    for name, says in (("hostname", f"echo '{addresses}'"), ("zsfl", 'printf "%s\\n" "${ZSFL_HOST-none}" "$@"')):
        (tools / name).write_text(f"#!/bin/sh\n{says}\n")
        (tools / name).chmod(0o755)
    entry = tmp_path / "entry"
    entry.write_text((DEPLOY / "container-zsfl").read_text().replace("/opt/zsfl/bin", str(tools)))
    search = f"{tools}:{os.environ['PATH']}"
    return subprocess.run(
        ["/bin/sh", str(entry), *args], env={"PATH": search, **env}, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("addresses", ["172.18.0.3", "fd00::3 172.18.0.3", "172.18.0.3 172.19.0.2"])
def test_a_node_in_a_container_is_told_its_address(addresses: str, tmp_path: Path) -> None:
    done = in_container(tmp_path, addresses, "node", "client", "my job.py")
    assert done.stdout.splitlines() == ["172.18.0.3", "node", "client", "my job.py"]


def test_in_a_container_an_address_that_is_given_stays(tmp_path: Path) -> None:
    assert in_container(tmp_path, "172.18.0.3", "bench", "--serve").stdout.splitlines()[0] == "172.18.0.3"
    done = in_container(tmp_path, "172.18.0.3", "ls", ZSFL_HOST="192.168.1.20")
    assert done.stdout.splitlines() == ["192.168.1.20", "ls"]
    assert in_container(tmp_path, "172.18.0.3", "demo").stdout.splitlines() == ["none", "demo"]


@pytest.mark.parametrize("addresses", ["127.0.1.1", "::1", ""])
def test_in_a_container_without_an_address_no_node_listens_in_vain(addresses: str, tmp_path: Path) -> None:
    done = in_container(tmp_path, addresses, "node", "aggregator", "job.py")
    assert done.returncode == 2
    assert "set ZSFL_HOST" in done.stderr
