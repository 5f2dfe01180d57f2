"""The chart: Helm renders it, Kubernetes would take it, and its pods, as plain processes, are a run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import write_job
from helpers.names import NameServer, needs_dnsmasq
from helpers.namespaces import machine_that_asks
from helpers.waiting import HANG_S, POLL_S

from zsfl.aggregator.audit import audit
from zsfl.front import BUSY_S, DRAIN_S, GOODBYE_LINGER_S
from zsfl.ids import Role
from zsfl.keys.secret import own_keys
from zsfl.settings import NodeSettings, load_settings

DEPLOY = Path(__file__).resolve().parents[2] / "tools" / "deploy"
CHART = DEPLOY / "chart"
HELM = shutil.which("helm")
WAYS: tuple[tuple[str, ...], ...] = (
    (),
    ("aggregators.replicas=2", "splitServers.max=4", "splitServers.gpus=1", "settings.rounds=5", "podMonitor=true"),
    ("clients.claim.resources.requests.storage=5Gi", "clients.claim.accessModes[0]=ReadWriteOnce"),
    (
        "clients.volume.persistentVolumeClaim.claimName=data",
        "clients.env.MY_DATA=/data",
        "aggregators.storageClass=fast",
    ),
)
pytestmark = pytest.mark.skipif(HELM is None, reason="there is no helm here")


def helm(job: Path, *values: str) -> subprocess.CompletedProcess[str]:
    """What Helm makes of the chart with these values."""
    given = [word for value in values for word in ("--set", value)]
    words = ["template", "run", str(CHART), "--set-file", f"job={job}", *given]
    return subprocess.run([str(HELM), *words], capture_output=True, text=True, timeout=HANG_S)


def rendered(job: Path, *values: str) -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install 'zsfl[test]'")
    done = helm(job, *values)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def workloads(documents: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By what they are called."""
    return {one["metadata"]["name"]: one["spec"] for one in documents if one["kind"] in ("Deployment", "StatefulSet")}


@pytest.mark.parametrize("values", WAYS)
def test_kubernetes_takes_what_is_rendered(values: tuple[str, ...], tmp_path: Path) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    documents = rendered(write_job(tmp_path), *values)
    for one in documents:
        if one["kind"] != "PodMonitor":  # which is Prometheus' and not Kubernetes' own
            schemas.validate(one, schemas.latest_version(), strict=True)
    assert {one["kind"] for one in documents} >= {"ConfigMap", "Service", "Deployment", "StatefulSet"}
    (job,) = (one["data"]["job.py"] for one in documents if one["kind"] == "ConfigMap")
    assert job == (tmp_path / "tiny.py").read_text()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("shards=0",), "/shards"),
        (("splitserver.max=3",), "splitserver"),
        (("splitServers.min=3",), "max has to be min or more"),
        (("clients.claim.a=b", "clients.volume.c=d"), "leave out either"),
    ],
)
def test_wrong_values_are_said(values: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = helm(write_job(tmp_path), *values)
    assert done.returncode != 0
    assert said in done.stderr
    assert "name the job file" in helm(Path(os.devnull)).stderr


def test_scaling_goes_by_a_metric_that_nodes_have(tmp_path: Path) -> None:
    (scaler,) = (
        one["spec"]
        for one in rendered(write_job(tmp_path), "splitServers.max=4")
        if one["kind"] == "HorizontalPodAutoscaler"
    )
    name = scaler["metrics"][0]["pods"]["metric"]["name"]
    assert f'"{name.removeprefix("zsfl_")}"' in (DEPLOY.parents[1] / "zsfl/dashboard/exposition.py").read_text()
    assert scaler["scaleTargetRef"]["name"] in workloads(rendered(write_job(tmp_path)))


class Pod:
    """What kubelet would make of a pod, as far as processes go; its volumes are folders, its address is on loopback."""

    def __init__(self, spec: dict[str, Any], name: str, host: str, folder: Path, shared: dict[str, Path]) -> None:
        (self._start,), (self._node,) = spec["initContainers"], spec["containers"]
        self.name, self.host, self._folder = name, host, folder / name
        self._places = dict(shared)
        for volume in ("/keys", "/runs", "/tmp"):
            self._places[volume] = self._folder / volume[1:]
            self._places[volume].mkdir(parents=True)
        self.grace_s = spec["terminationGracePeriodSeconds"]
        self._log = self._folder / "log"
        self.process: subprocess.Popen[bytes]
        self.inside: tuple[str, ...] = ()

    def _placed(self, text: str) -> str:
        return re.sub(r"(?<![\w.])/(keys|runs|tmp|job|secret)\b", lambda found: str(self._places[found[0]]), text)

    def env(self) -> dict[str, str]:
        """Of its image and its own, as the node sees it."""
        said = re.findall(r"^ENV (ZSFL_.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
        env = dict(pair.split("=", 1) for line in said for pair in line.split())
        fields = {"metadata.name": self.name, "status.podIP": self.host}
        fields["metadata.labels['apps.kubernetes.io/pod-index']"] = self.name.rpartition("-")[2]
        for one in self._node["env"]:
            value = one["value"] if "value" in one else fields[one["valueFrom"]["fieldRef"]["fieldPath"]]
            env[one["name"]] = re.sub(r"\$\((\w+)\)", lambda found: env[found[1]], value)
        return {name: self._placed(value) for name, value in env.items()}

    def start(self, inside: tuple[str, ...], tools: Path) -> None:
        """Run the one container, and then the other."""
        env = {**os.environ, **self.env(), "PATH": f"{tools}:{os.environ['PATH']}"}
        words = [self._placed(word) for word in self._start["command"]]
        subprocess.run(words, check=True, timeout=HANG_S)
        words = self._node.get("command", ["zsfl"]) + self._node.get("args", [])
        words = [self._placed(re.sub(r"\$\((\w+)\)", lambda found: env[found[1]], word)) for word in words]
        self.inside, self._env = inside, env
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*inside, *words], env=env, cwd=self._folder, stdout=log, stderr=log, start_new_session=True
            )

    def exec(self, *words: str) -> subprocess.CompletedProcess[str]:
        """What a command comes to in there."""
        return subprocess.run(
            [*self.inside, *words], env=self._env, cwd=self._folder, capture_output=True, text=True, timeout=HANG_S
        )

    def probe(self, which: str) -> str:
        """What a probe, or whoever asks for a path, is told: `200 ok`, or why not."""
        path = which if which.startswith("/") else self._node[which]["httpGet"]["path"]
        (port,) = (one["containerPort"] for one in self._node["ports"] if one["name"] == "metrics")
        ask = (
            "import sys, urllib.request as u, urllib.error as e\n"
            "try: r = u.urlopen(sys.argv[1], timeout=60)\n"
            "except e.HTTPError as error: r = error\n"
            "except OSError: sys.exit('nobody there')\n"
            "print(r.status, r.read().decode())\n"
        )
        words = [*self.inside, sys.executable, "-ISc", ask, f"http://{self.host}:{port}{path}"]
        return subprocess.run(words, capture_output=True, text=True, timeout=HANG_S).stdout.strip()

    def until(self, which: str, pattern: str) -> None:
        """Returns once a probe is told so."""
        deadline = time.monotonic() + HANG_S
        while not re.match(pattern, told := self.probe(which)):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, f"{self.name}: {told}\n{self.said}"
            time.sleep(20 * POLL_S)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def kill(self) -> None:
        with suppress(AttributeError, ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(HANG_S)


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[dict[str, Pod]]:
    """Two aggregators, a split server and two clients, none of them started yet."""
    job, secret = tmp_path / "job", tmp_path / "secret"
    job.mkdir()
    write_job(job).rename(job / "job.py")
    own_keys(secret)
    (secret / "secret-key").chmod(0o440)  # as kubelet leaves it for whoever has the group
    values = ("shards=2", "aggregators.replicas=2", "settings.rounds=100000")
    made: dict[str, Pod] = {}
    for name, spec in workloads(rendered(job / "job.py", *values)).items():
        for number in range(spec["replicas"]):
            shared, host = {"/job": job, "/secret": secret}, f"127.0.1.{len(made) + 1}"
            pod = f"{name}-{number}"
            made[pod] = Pod(spec["template"]["spec"], pod, host, tmp_path, shared)
    try:
        yield made
    finally:
        for one in made.values():
            one.kill()


def test_pods_are_given_settings_of_nodes_and_time_to_leave(pods: dict[str, Pod]) -> None:
    for pod in pods.values():
        env = {name: value for name, value in pod.env().items() if name.startswith("ZSFL_")}
        assert {name.removeprefix("ZSFL_").lower() for name in env} <= set(NodeSettings.__dataclass_fields__)
        settings = load_settings({}, env)
        assert (settings.name, settings.clients, settings.rounds) == (pod.name, 2, 100_000)
        assert settings.stay  # as no end of a process is one to Kubernetes
        assert pod.grace_s > DRAIN_S + BUSY_S + GOODBYE_LINGER_S


@needs_dnsmasq
def test_the_pods_are_a_run_that_probes_see_and_that_leaves_when_it_is_told_to(
    pods: dict[str, Pod], tmp_path: Path
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    entry = (DEPLOY / "container-zsfl").read_text().replace("/opt/zsfl/bin", str(Path(sys.executable).parent))
    (tools / "zsfl").write_text(entry)
    (tools / "zsfl").chmod(0o755)
    leader, standby, server, *clients = (pods[f"run-{name}"] for name in (
        "aggregators-0", "aggregators-1", "split-servers-0", "clients-0", "clients-1"
    ))  # fmt: skip
    with ExitStack() as stack:
        inside = stack.enter_context(machine_that_asks("127.0.0.1")).inside
        names = NameServer("run-aggregators", inside, tmp_path)
        stack.callback(names.close)
        # Those of a StatefulSet are ready by themselves: the next one is replaced only then.
        for pod in (server, clients[0], standby):
            pod.start(inside, tools)
            pod.until("livenessProbe", "200 ok")
        server.until("readinessProbe", f"503 it knows no {Role.AGGREGATOR} yet")
        for pod in (clients[0], standby):
            pod.until("readinessProbe", "200 ok")
            pod.until("/readyz", f"503 it knows no {Role.AGGREGATOR}")
        for pod in (leader, clients[1]):
            pod.start(inside, tools)
        names.says(leader.host, standby.host)
        for pod in pods.values():
            pod.until("readinessProbe", "200 ok")
            pod.until("/readyz", "200 ok")
        ledger = leader._places["/runs"] / "tiny" / "ledger.jsonl"
        deadline = time.monotonic() + HANG_S
        while not (ledger.exists() and ledger.stat().st_size):
            assert time.monotonic() < deadline, leader.said
            time.sleep(POLL_S)
        seen = leader.exec("zsfl", "ls", "--json")
        assert {node["name"] for node in json.loads(seen.stdout)["nodes"]} == pods.keys(), seen.stderr
        for pod in (server, *clients, standby, leader):  # not all at once, as that would prove less
            pod.process.send_signal(signal.SIGTERM)
            assert pod.process.wait(HANG_S) == 0, pod.said
        assert (audit(ledger.parent).faults, audit(ledger.parent).pending) == ([], 0)
    assert f"standing by {leader.name}" in standby.said
    assert f"metrics at http://{server.host}:9464" in server.said
