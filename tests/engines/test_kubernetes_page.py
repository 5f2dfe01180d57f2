"""docs/how-to/kubernetes.md, followed as it is written on the cluster that kubectl leads to.

Where there is one, KUBECONFIG (or ~/.kube/config) names it, and ZSFL_IMAGE an image, REPOSITORY:TAG, that it can start;
it has to give out volumes. All is done in a namespace of its own, which is deleted at the end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from helpers import documents
from helpers.documents import ROOT, Reader, blocks, environment
from helpers.waiting import HANG_S

from zsfl.aggregator.audit import audit

IMAGE = os.environ.get("ZSFL_IMAGE", "")
TOOLS = {name: shutil.which(name) or "" for name in ("kubectl", "helm")}
FEW = [
    f"--set={part}.resources.requests.{what}"
    for part in ("aggregators", "splitServers", "clients")
    for what in ("cpu=20m", "memory=128Mi")
]
"""What a pod asks for, so that the smallest cluster takes them all."""
UNHURRIED = """

import dataclasses, functools, os, time


@functools.wraps(job.loss)
def unhurried(*args, _loss=job.loss):
    if not os.path.exists("/tmp/hurry"):
        time.sleep(0.5)
    return _loss(*args)


job = dataclasses.replace(job, loss=unhurried)
"""
"""Added to the job, so that its run is still under way when it is disturbed."""
SCRIPTS = [block for block in blocks(ROOT / "docs" / "how-to" / "kubernetes.md") if block.language in ("sh", "yaml")]


def missing() -> str:
    """What there has to be for this, and is not."""
    if lacking := [name for name, path in TOOLS.items() if not path]:
        return f"there is no {' and no '.join(lacking)} here"
    if not IMAGE:
        return "ZSFL_IMAGE names no image that a cluster can start"
    words = [TOOLS["kubectl"], "get", "nodes", "--request-timeout=10s"]
    told = subprocess.run(words, capture_output=True, text=True, timeout=HANG_S)
    return "" if told.returncode == 0 else f"kubectl leads to no cluster: {told.stderr.strip().splitlines()[-1]}"


class Cluster:
    """What kubectl says, in a namespace of its own."""

    def __init__(self, folder: Path) -> None:
        self.namespace, self._config = f"zsfl-{uuid4().hex[:8]}", folder / "kubeconfig"
        self.said("create", "namespace", self.namespace)
        view = self.said("config", "view", "--raw", "--flatten", "--minify")
        self._config.touch(0o600)
        self._config.write_text(view)
        self.env = {"KUBECONFIG": str(self._config)}
        self.said("config", "set-context", "--current", f"--namespace={self.namespace}")

    def said(self, *words: str, fails: bool = False) -> str:
        """What a command says, which ends well unless it may fail."""
        env = {**os.environ, **getattr(self, "env", {})}
        done = subprocess.run([TOOLS["kubectl"], *words], env=env, capture_output=True, text=True, timeout=HANG_S)
        assert fails or done.returncode == 0, f"kubectl {' '.join(words)}: {done.stderr}"
        return done.stdout

    def got(self, *words: str) -> Any:
        return json.loads(self.said("get", *words, "-o", "json"))

    def pods(self, part: str = "") -> dict[str, Any]:
        """By name; of one part, or all."""
        label = f"app.kubernetes.io/component={part}" if part else "app.kubernetes.io/name=zsfl"
        return {one["metadata"]["name"]: one for one in self.got("pods", "-l", label)["items"]}

    def until(self, is_so: Callable[[], Any], what: str, deadline_s: float = 3 * HANG_S) -> Any:
        """What `is_so` says, once it says something."""
        deadline = time.monotonic() + deadline_s
        while not (found := is_so()):
            if time.monotonic() > deadline:
                state = self.said("get", "pods,events", fails=True) + self.log("night-aggregators-0")[-2000:]
                raise AssertionError(f"not {what}:\n{state}")
            time.sleep(0.5)
        return found

    def log(self, pod: str) -> str:
        return self.said("logs", pod, fails=True)

    def close(self) -> None:
        self.said("delete", "namespace", self.namespace, "--wait=false", fails=True)
        self.until(
            lambda: not self.said("get", "namespace", self.namespace, "--ignore-not-found"), "the namespace is gone"
        )


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    if why := missing():
        pytest.skip(why)
    made = Cluster(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def reader(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """Whose helm takes this image, and few resources; the log is read until a round is over."""
    keeps_on = (*documents.KEEPS_ON, (r"kubectl logs -f", r"round \d+/\d+"))
    monkeypatch.setattr(documents, "KEEPS_ON", keeps_on)
    repository, _, tag = IMAGE.rpartition(":")
    given = [f"--set=image.repository={repository}", f"--set=image.tag={tag}", *FEW]
    bin_folder, work = tmp_path / "bin", tmp_path / "here" / "work"
    for folder in (bin_folder, work):
        folder.mkdir(parents=True)
    (work / "tools").symlink_to(ROOT / "tools")
    helm = bin_folder / "helm"
    helm.write_text(
        f'#!/bin/sh\nwhat=$1\ncase $what in install | upgrade) set -- "$@" {" ".join(given)} ;; esac\n'
        f'exec {TOOLS["helm"]} "$@"\n'
    )
    helm.chmod(0o755)
    made = Reader({"here": (work, ())}, {**environment(bin_folder), **cluster.env})
    try:
        yield made
    finally:
        for command in made.running:
            command.kill()


def follow(reader: Reader, number: int) -> None:
    """All that one block says."""
    block = SCRIPTS[number]
    if block.file:
        return reader.write(block.file, block.text)
    folder, _ = reader.places["here"]
    for line in block.lines():
        reader.follow(line)
        if line.startswith("zsfl demo"):
            with (folder / "my_job.py").open("a") as job:
                job.write(UNHURRIED)


def aggregated(cluster: Cluster) -> str:
    """What aggregators say, whichever of them it is by now."""
    return "".join(cluster.log(pod) for pod in cluster.pods("aggregators"))


def finishes(cluster: Cluster, rounds: int) -> None:
    """The run is over at once, its pods stay, and nothing of it is lost."""
    said = rf"finished: {rounds} rounds in .* test accuracy (\d+\.\d+)%"

    def hurried() -> re.Match[str] | None:
        for pod in cluster.pods("clients"):  # which may be other pods by now
            cluster.said("exec", pod, "--", "touch", "/tmp/hurry", fails=True)
        return re.search(said, aggregated(cluster))

    done = cluster.until(hurried, f"finished with {rounds} rounds")
    assert float(done[1]) > 90
    cluster.until(lambda: all("stays, with nothing to do" in cluster.log(pod) for pod in cluster.pods()), "at rest")
    states = {name: one["status"]["containerStatuses"][0] for name, one in cluster.pods().items()}
    assert {name: (one["ready"], one["restartCount"]) for name, one in states.items()} == dict.fromkeys(
        states, (True, 0)
    )
    assert "all is well" in cluster.said("exec", "night-aggregators-0", "--", "zsfl", "audit", "/runs/digits")


def is_training(cluster: Cluster) -> bool:
    seen = json.loads(cluster.said("exec", "night-clients-0", "--", "zsfl", "ls", "--json"))
    return bool(seen["nodes"]) and "finished:" not in aggregated(cluster)


def disturb(cluster: Cluster) -> None:
    """One split server is asked to leave, one is lost, and then the aggregator leaves and comes back."""
    deployment = ("deployment", "night-split-servers")
    cluster.until(lambda: cluster.got(*deployment)["status"].get("readyReplicas") == 3, "three split servers ready")
    asked, lost = sorted(cluster.pods("split-servers"))[:2]
    began = time.monotonic()
    cluster.said("delete", "pod", asked)
    grace_s = cluster.got(*deployment)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert time.monotonic() - began < grace_s, "it was killed"
    cluster.said("delete", "pod", lost, "--force", "--grace-period=0")
    uid = cluster.got("pod", "night-aggregators-0")["metadata"]["uid"]
    cluster.said("delete", "pod", "night-aggregators-0")
    cluster.until(
        lambda: [
            one
            for name, one in cluster.pods("aggregators").items()
            if name == "night-aggregators-0" and one["metadata"]["uid"] != uid and one["status"]["phase"] == "Running"
        ],
        "an aggregator again",
    )


def test_the_page_can_be_followed_and_a_run_outlasts_what_happens_to_its_pods(cluster: Cluster, reader: Reader) -> None:
    folder, _ = reader.places["here"]
    secret, install, scale, fetch, more, end, values, again, _, doctor = range(len(SCRIPTS))
    for number in (secret, install, scale):
        follow(reader, number)
    disturb(cluster)
    reader.follow(next(SCRIPTS[scale].lines()).replace("=3", "=1"))
    cluster.until(lambda: len(cluster.pods("split-servers")) == 1, "one split server")
    words = ("exec", "night-clients-0", "--", "zsfl", "doctor")
    cluster.until(lambda: "all is well" in cluster.said(*words, fails=True), "well by what zsfl doctor says")
    follow(reader, doctor)
    assert is_training(cluster)
    finishes(cluster, 50)
    follow(reader, fetch)
    run = audit(folder / "digits")
    assert (run.faults, run.pending) == ([], 0)
    follow(reader, more)
    finishes(cluster, 60)
    follow(reader, end)
    cluster.until(lambda: not cluster.pods(), "all pods are gone")
    claims = {one["metadata"]["name"] for one in cluster.got("persistentvolumeclaims")["items"]}
    assert claims == {"runs-night-aggregators-0", "runs-night-aggregators-1"}
    follow(reader, values)
    follow(reader, again)
    scaler = cluster.got("hpa", "night-split-servers")
    assert scaler["spec"]["scaleTargetRef"]["name"] == "night-split-servers"
    cluster.said("wait", "--for=condition=Ready", "pod/night-clients-0", f"--timeout={HANG_S - 5:.0f}s")
    cluster.said("exec", "night-clients-0", "--", "sh", "-c", "test -d /data && ! touch /data/x 2>&1")
    follow(reader, end)
