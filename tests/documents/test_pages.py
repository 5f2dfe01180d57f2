"""What README.md and docs/ show works: every program and every command in them runs as it is written there."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers.documents import ROOT, Block, Reader, blocks, environment
from helpers.namespaces import machines_at
from helpers.sshd import reached

import zsfl
from zsfl.cli import parser

PAGES = {
    str(page.relative_to(ROOT)): blocks(page)
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if blocks(page)
}
ADDRESSES = ("192.168.1.10", "192.168.1.20")
LAN = (
    "zsfl node aggregator my_job.py --host 192.168.1.10 --port 7700",
    "zsfl node client my_job.py --host 192.168.1.10 --shards 0-4",
    "zsfl node split-server my_job.py --host 192.168.1.20",
)
HERE = tuple(re.sub(" --(host|port) \\S+", "", line) for line in LAN)
GIVEN = {"docs/how-to/doctor.md": LAN, "docs/how-to/watch.md": HERE}
"""What a page takes to be running already."""
NOT_HERE = {
    "make": "the tests are run by it",
    "pip": "it is how zsfl came here",
    "sudo": "it changes this machine; tests/unit/test_deploy.py and tests/cluster/test_services.py try what it sets up",
    "systemctl": "as sudo",
    "journalctl": "as sudo",
    "docker": "as sudo",
    "sbatch": "it needs SLURM; tests/engines/test_slurm.py follows the page where there is one",
    "squeue": "as sbatch",
    "kubectl": "it needs a cluster; tests/engines/test_kubernetes_page.py follows the page where there is one",
    "helm": "as kubectl",
}
"""Commands that no test can run, and why."""
ELSEWHERE = {"docs/how-to/ray.md": "tests/engines/test_ray.py follows it, where there is a Ray: make test-engines"}
"""Pages that are followed by other tests."""


def shells(page: str) -> list[str]:
    return [line for block in PAGES[page] if block.language == "sh" for line in block.lines()]


@pytest.fixture
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Reader]:
    """On one machine, or on two where a page names the addresses of others."""
    page = request.getfixturevalue("page")
    if page in ELSEWHERE:
        pytest.skip(ELSEWHERE[page])
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    with ExitStack() as stack:
        places: dict[str, tuple[Path, Sequence[str]]] = {"here": (tmp_path / "here" / "work", ())}
        # A port or a LAN of its own, where a page says which.
        if re.search(r"192\.168\.1\.|zsfl join|--port|--metrics", "\n".join(shells(page))):
            machines = stack.enter_context(machines_at(*ADDRESSES))
            places = {each.host: (tmp_path / each.host / "work", each.inside) for each in machines}
            if any("lan.toml" in line for line in shells(page)):
                homes = {address: folder.parent for address, (folder, _) in places.items()}
                how = stack.enter_context(reached(machines, tmp_path / "ssh", environment(bin_folder)["PATH"], homes))
                ssh = bin_folder / "ssh"
                ssh.write_text(f'#!/bin/sh\nexec {how.ssh.replace("ssh", str(shutil.which("ssh")), 1)} "$@"\n')
                ssh.chmod(0o755)
        for folder, _ in places.values():
            folder.mkdir(parents=True)
            for name in ("benchmarks", "nodes", "tools"):
                (folder / name).symlink_to(ROOT / name)
        reader = Reader(places, environment(bin_folder))
        reader.write("my_job.py", next(b.text for b in PAGES["docs/tutorial.md"] if b.file == "my_job.py"))
        try:
            if len(places) > 1 and not any("zsfl join" in line for line in shells(page)):
                reader.follow("zsfl invite")
                reader.follow("zsfl join TOKEN")
            for line in GIVEN.get(page, ()):
                reader.follow(line)
            yield reader
        finally:
            for command in reader.running:
                command.kill()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_followed(page: str, reader: Reader) -> None:
    lines = shells(page)
    for block in PAGES[page]:
        if block.file:
            reader.write(block.file, block.text)
        if block.language == "python":
            assert block.file, f"a program without a name:\n{block.text}"
            if not any(re.search(rf"\b{re.escape(block.file)}\b", line) for line in lines):
                reader.follow(_tried(block))
        elif block.language == "sh":
            for line in block.lines():
                if line.split()[0] not in NOT_HERE:
                    reader.follow(line)
        elif block.language == "end":
            reader.end_all()
    reader.end_all()


def _tried(program: Block) -> str:
    """How a reader would try a program that the page gives no command for."""
    if program.file.startswith("test_"):
        return f"python -m pytest -q {program.file}"
    if re.search(r"^job = ", program.text, re.MULTILINE):
        return f"ZSFL_ROUNDS=1 zsfl up {program.file} --in-process"
    return f"python {program.file}"


def test_targets_that_pages_name_exist() -> None:
    targets = {line.split(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if re.match(r"\w+:", line)}
    named = {line.split()[1] for page in PAGES for line in shells(page) if line.startswith("make ")}
    assert named
    assert named <= targets


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    made = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, env={**environment(folder), "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    return folder


def test_the_site_is_whole_and_needs_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="https?:', text) == []
        assert re.findall(r'<link[^>]*rel="stylesheet"[^>]*href="https?:', text) == []


def test_the_site_has_every_public_name_command_and_setting(site: Path) -> None:
    python = (site / "reference" / "python.html").read_text(encoding="utf-8")
    for name in zsfl.__all__:
        assert f'id="zsfl.{name}' in python, name
    commands = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    for action in parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            assert [name for name in action.choices if f"zsfl {name}" not in commands] == []
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert any("patience_s" in entry["text"] for entry in index["docs"])
